"""Float8 products in the core (torchao, one scale per row): the option runtime.float8.

Weights, gradients and the optimizer keep their dtype; each product casts its factors. The weights of the core are cast
in every iteration, since they are gathered once for the whole loop. The adapter is not converted: the core adds the
half of its product that does not change (`Transformer.injection`).
"""

import dataclasses

import torch

from recurrent_depth.extras import require
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.transformer import RecurrentDepthModel

ALIGNMENT = 16  # torch._scaled_mm needs sizes that are multiples of this


def use_float8(model: RecurrentDepthModel, device: torch.device, dtype: torch.dtype) -> None:
    """Convert the linear layers of the core for training on `device` in `dtype`.

    Raises:
        MissingPackageError: if torchao is not installed.
        ValueError: if the GPU has no float8 products, or the dtype or the shape of the model does not allow them.
    """
    require("torchao", "torchao", "runtime.float8")
    reason = _missing(device)
    if reason is not None:
        raise ValueError(f"runtime.float8 is true, but {reason}; set it to false, or use such a GPU")
    if dtype != torch.bfloat16:
        raise ValueError(f"runtime.float8 is true, but runtime.dtype is {dtype}; set it to bfloat16 or auto")
    check_sizes(model.config)
    convert_core(model)


def _missing(device: torch.device) -> str | None:
    """Return why a device cannot multiply in float8, or None."""
    needed = "float8 needs a GPU of compute capability 8.9 or higher, or of gfx94x or gfx95x (MI300, MI350)"
    if device.type != "cuda":
        return f"the device is {device.type}: {needed}"
    if torch.version.hip:
        found = torch.cuda.get_device_properties(device).gcnArchName
        return None if found.startswith(("gfx94", "gfx95")) else f"the GPU is {found}: {needed}"
    major, minor = torch.cuda.get_device_capability(device)
    return None if (major, minor) >= (8, 9) else f"the GPU has compute capability {major}.{minor}: {needed}"


def check_sizes(config: ModelConfig) -> None:
    """Raise unless the widths of the model are multiples of ALIGNMENT."""
    for name in ("n_embd", "intermediate_size"):
        if getattr(config, name) % ALIGNMENT:
            raise ValueError(
                f"model.{name} is {getattr(config, name)}; runtime.float8 needs a multiple of {ALIGNMENT}: change it, "
                "or set runtime.float8 to false"
            )


def convert_core(model: RecurrentDepthModel, emulate: bool = False) -> None:
    """Replace the linear layers of the core by torchao's, which multiply in float8. Names and weights stay.

    Args:
        emulate: multiply rounded values in the original dtype, which works on every device; for tests.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    # Padded: the gradient of a weight sums over the tokens of a micro-step, whose number may not be a multiple of 16.
    rowwise = Float8LinearConfig.from_recipe_name("rowwise")
    recipe = dataclasses.replace(rowwise, emulate=emulate, pad_inner_dim=True)
    convert_to_float8_training(model.transformer.core_block, config=recipe)
