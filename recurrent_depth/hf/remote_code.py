"""Write a copy of the model's code into a saved folder, so that it loads without this package."""

import re
import shutil
from pathlib import Path

import recurrent_depth
from recurrent_depth.hf.modeling import RecurrentDepthForCausalLM

AUTO_MAP = {
    "AutoConfig": "configuration_recurrent_depth.RecurrentDepthConfig",
    "AutoModelForCausalLM": "modeling_recurrent_depth.RecurrentDepthForCausalLM",
}

_CODE = {
    "model": (
        "attention", "config", "gate", "layers", "loss", "ops", "random", "recurrence", "rope_scaling", "transformer",
    ),
    "hf": ("caches", "clock", "configuration", "modeling"),
}  # fmt: skip
"""The files to copy, by package."""

_BELOW = {"config": "ModelConfig", "gate": "Gate", "random": "philox", "rope_scaling": "scaled_frequencies"}
"""Files (and a name in each) that modeling.py imports only indirectly; older transformers do not copy such files."""


def write_code(model: RecurrentDepthForCausalLM, folder: Path) -> None:
    """Write a flat copy of the code into `folder`, and its location into the model's configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    package = Path(recurrent_depth.__file__).parent
    for part, names in _CODE.items():
        for name in names:
            text = (package / part / f"{name}.py").read_text(encoding="utf-8")
            text = re.sub(r"from recurrent_depth\.(?:model|hf)\.(\w+) import", r"from .\1_recurrent_depth import", text)
            if name == "modeling":
                text += "".join(f"\nfrom .{n}_recurrent_depth import {x}  # noqa" for n, x in _BELOW.items()) + "\n"
            (folder / f"{name}_recurrent_depth.py").write_text(text, encoding="utf-8")
    licence = package.parent / "LICENSE"
    if licence.is_file():
        shutil.copyfile(licence, folder / "LICENSE")
    model.config.auto_map = dict(AUTO_MAP)
