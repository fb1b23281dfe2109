"""Rotary embedding of transformers in our terms: the order of channels within a head, and scaled frequencies.

Half-split RoPE pairs channels (i, i + K/2), interleaved RoPE (2i, 2i + 1). Models of transformers are
half-split; this library is interleaved, as Huginn is. Permuting the channels of q and k alike changes no score.
"""

from typing import Any

from torch import Tensor

from recurrent_depth.model.config import RopeScaling


def interleaved(rows: Tensor, head_size: int) -> Tensor:
    """Return the rows [n K, ...] of a half-split projection, its bias or its norm in interleaved order."""
    return rows.unflatten(0, (-1, 2, head_size // 2)).transpose(1, 2).flatten(0, 2)


def half_split(rows: Tensor, head_size: int) -> Tensor:
    """Return interleaved rows [n K, ...] in half-split order: the inverse of `interleaved`."""
    return rows.unflatten(0, (-1, head_size // 2, 2)).transpose(1, 2).flatten(0, 2)


_SCALING = ("default", "linear", "llama3", "yarn")


def rotary_scaling(rope: dict[str, Any], max_length: int) -> RopeScaling | None:
    """Return the scaling of `rope_parameters` (transformers 5) or `rope_scaling` (transformers 4)."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _SCALING:
        raise ValueError(f"rope_type is {kind!r}; implemented are {', '.join(_SCALING)}: choose another model")
    if kind == "default":
        return None
    names = RopeScaling.__dataclass_fields__
    values = {name: value for name, value in rope.items() if name in names and value is not None}
    values["rope_type"] = kind
    others = set(rope) - set(names) - {"type", "rope_theta"}
    if any(rope[name] is not None for name in others):
        raise ValueError(
            f"the scaling of the rotary embedding has {', '.join(sorted(others))}, which is not implemented; choose "
            "another model"
        )
    if kind != "linear":
        values.setdefault("original_max_position_embeddings", max_length)
    return RopeScaling(**values)
