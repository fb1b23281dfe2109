"""Which tokens see which: the mask of a forward pass, and the attention function the blocks call.

A block calls `attend(q, k, v, slot)` and knows nothing of masks or caches. `slot` names the layer's place in a
cache: [prelude | coda | core step 0 | core step 1 | ...].
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from recurrent_depth.model.ops import Ops


class ProjectedAttend(ABC):
    """An attention function that takes the fused projection whole: it rotates, stores and attends by itself."""

    @abstractmethod
    def attend(self, ops: Ops, qkv: Tensor, qk_bias: Tensor | None, rotary: tuple[Tensor, Tensor], slot: int) -> Tensor:
        """qkv [B, T, 3 H K], qk_bias [2, 1, H, K], cos and signed sin [B or 1, T, K] -> [B, H, T, K]."""


Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor] | ProjectedAttend
"""(q, k, v [B, H, T, K], slot) -> [B, H, T, K]; or one that begins at the projection."""


class Cache(Protocol):
    """What the model needs of a key-value cache."""

    def length(self) -> int:
        """Columns already written, counted in tokens (padding included)."""

    def update(self, k: Tensor, v: Tensor, slot: int) -> tuple[Tensor, Tensor]:
        """Store k, v [B, H, T, K] of this forward pass at `slot`; return all keys and values [B, H, S, K]."""

    def advance(self, tokens: int) -> None:
        """Called once, when all layers of a forward pass have written `tokens` new columns."""


def causal(q: Tensor, k: Tensor, v: Tensor, slot: int) -> Tensor:
    """Plain causal attention over one sequence, no padding, no cache."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def attention_for(
    query_length: int,
    *,
    attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    cache: Cache | None = None,
) -> Attend:
    """The attention function of one forward pass.

    Args:
        attention_mask: [B, S], nonzero where a token is real; S covers the cached columns and the new ones.
        document_ids: [B, T], equal where two tokens share a document; not together with a cache.
        cache: past keys and values.
    """
    if document_ids is not None:
        if cache is not None or attention_mask is not None:
            raise ValueError("document_ids are for training on packed rows: pass no cache and no attention_mask")
        return _documents(document_ids)
    if cache is None and attention_mask is None:
        return causal
    past = cache.length() if cache is not None else 0
    mask = _mask(query_length, past, attention_mask)

    def attend(q: Tensor, k: Tensor, v: Tensor, slot: int) -> Tensor:
        if cache is not None:
            k, v = cache.update(k, v, slot)
        if mask is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] == k.shape[2] > 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return attend


def _mask(query_length: int, past: int, attention_mask: Tensor | None) -> Tensor | None:
    """Boolean [B or 1, 1, T, S], or None where causal attention or a single query needs no mask."""
    if attention_mask is None and (past == 0 or query_length == 1):
        return None
    total = past + query_length
    device = attention_mask.device if attention_mask is not None else None
    queries = torch.arange(past, total, device=device)[:, None]
    visible = (torch.arange(total, device=device)[None, :] <= queries)[None]  # [1, T, S]
    if attention_mask is None:
        return visible[:, None]
    if attention_mask.shape[-1] != total:
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[-1]} columns, but cache and input have {total}; "
            "it must span the cached tokens as well as the new ones"
        )
    if bool(attention_mask.all()):
        return _mask(query_length, past, None)
    # A padded query would see nothing and turn to NaN: it may see itself.
    itself = torch.arange(total, device=device)[None, :] == queries
    return (visible & attention_mask[:, None, :].bool() | itself)[:, None]


def _documents(document_ids: Tensor) -> Attend:
    """Causal attention within documents: flex on a GPU; a dense mask on a CPU, where flex has no backward."""
    if document_ids.is_cuda:
        return _flex_documents(document_ids)
    T = document_ids.shape[1]
    order = torch.arange(T, device=document_ids.device)
    same = document_ids[:, :, None] == document_ids[:, None, :]
    mask = (same & (order[None, :] <= order[:, None]))[:, None]  # [B, 1, T, T]

    def attend(q: Tensor, k: Tensor, v: Tensor, slot: int) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return attend


def _flex_documents(document_ids: Tensor) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask

    def same_document(b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        return (q_index >= k_index) & (document_ids[b, q_index] == document_ids[b, k_index])

    B, T = document_ids.shape
    block_mask = create_block_mask(same_document, B, None, T, T, device=str(document_ids.device))

    def attend(q: Tensor, k: Tensor, v: Tensor, slot: int) -> Tensor:
        return _compiled_flex()(q, k, v, block_mask=block_mask)

    return attend


_FLEX: list[Callable[..., Tensor]] = []


def _compiled_flex() -> Callable[..., Tensor]:
    """flex_attention, compiled once: eagerly it would materialise the scores."""
    if not _FLEX:
        from torch.nn.attention.flex_attention import flex_attention

        _FLEX.append(torch.compile(flex_attention))
    return _FLEX[0]
