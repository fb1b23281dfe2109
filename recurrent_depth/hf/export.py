"""`recurrent-depth export`: a folder that transformers loads, with our package or without it."""

import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import recurrent_depth
from recurrent_depth.hf.configuration import RecurrentDepthConfig
from recurrent_depth.hf.loading import load_model
from recurrent_depth.hf.modeling import RecurrentDepthForCausalLM
from recurrent_depth.runs import CheckpointError, find_checkpoint, is_run, load_run_model, read_details

_CODE = {
    "model": ("attention", "config", "layers", "loss", "ops", "random", "recurrence", "transformer"),
    "hf": ("clock", "configuration", "modeling", "slots"),
}
"""The files an export carries, so that it loads where this package is not installed."""

_BELOW = {"config": "ModelConfig", "random": "philox"}
"""Files (and a name in each) that modeling.py imports through others only; older transformers copy no such file."""

_AUTO_MAP = {
    "AutoConfig": "configuration_recurrent_depth.RecurrentDepthConfig",
    "AutoModelForCausalLM": "modeling_recurrent_depth.RecurrentDepthForCausalLM",
}
_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


@dataclass(frozen=True)
class ExportConfig:
    """Write a folder in the released Huginn format.

    Args:
        model: run folder, checkpoint, export or hub name.
        out: folder to write; it must not exist, or be empty.
        dtype: of the weights; the rotary table stays in fp32.
        max_shard_size: weights beyond it are split over files, for example 5GB.
        results: results.json of `recurrent-depth eval`, for the model card; null leaves evaluation out.
    """

    model: str
    out: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_shard_size: str = "5GB"
    results: str | None = None


def export(config: ExportConfig) -> Path:
    """Write the folder, load it again with the code it carries, compare logits; it is there whole or not at all."""
    out = Path(config.out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists and is not empty; name another --out or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, config.dtype)
    model, tokenizer = load_model(config.model, dtype)
    card = model_card(config, model)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        folder = Path(scratch) / "export"
        model.config.architectures = ["RavenForCausalLM"]
        model.save_pretrained(folder, max_shard_size=config.max_shard_size)
        _write_config(folder, model.config, config.dtype)
        copy_code(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card)
        difference = check(folder, config.model, dtype)
        if difference > _TOLERANCE[config.dtype]:
            raise CheckpointError(
                f"the exported folder gives other logits than {config.model} (relative difference {difference:.1e}); "
                "nothing was written; please report this with your versions"
            )
        if out.exists():
            out.rmdir()
        folder.rename(out)
    print(f"{out}: {model.num_parameters():,} parameters; logits differ by {difference:.1e} of their largest")
    return out


def _write_config(folder: Path, config: RecurrentDepthConfig, dtype: str) -> None:
    """config.json with every field of the released one, and where the code is."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | config.released_fields()
    values |= {"architectures": ["RavenForCausalLM"], "auto_map": _AUTO_MAP, "torch_dtype": dtype}
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def copy_code(folder: Path) -> None:
    """A flat copy of the model's files, imports rewritten to neighbours."""
    package = Path(recurrent_depth.__file__).parent
    for part, names in _CODE.items():
        for name in names:
            text = (package / part / f"{name}.py").read_text()
            text = re.sub(r"from recurrent_depth\.(?:model|hf)\.(\w+) import", r"from .\1_recurrent_depth import", text)
            if name == "modeling":
                text += "".join(f"\nfrom .{n}_recurrent_depth import {x}  # noqa" for n, x in _BELOW.items()) + "\n"
            (folder / f"{name}_recurrent_depth.py").write_text(text)
    licence = package.parent / "LICENSE"
    if licence.is_file():
        shutil.copy(licence, folder)


@torch.no_grad()
def check(folder: Path, source: str, dtype: torch.dtype) -> float:
    """How far the folder's logits, by its own code, are from the source's, relative to their largest."""
    shipped = get_class_from_dynamic_module(_AUTO_MAP["AutoModelForCausalLM"], str(folder))
    exported = shipped.from_pretrained(folder, dtype=dtype).eval()
    model: Any
    if Path(source).exists() and is_run(source):
        model = load_run_model(source)
        table = model.freqs_cis
        model = model.to(dtype)
        model.freqs_cis = table
    else:
        model, _ = load_model(source, dtype)
    tokens = min(32, exported.config.block_size)
    ids = torch.randint(exported.config.vocab_size, (2, tokens), generator=torch.Generator().manual_seed(0))
    worst = 0.0
    for num_steps in sorted({1, exported.config.mean_recurrence}):
        expected = model(ids, num_steps=num_steps).logits
        actual = exported(ids, num_steps=num_steps).logits
        worst = max(worst, ((actual - expected).abs().max() / expected.abs().max()).item())
    return worst


def model_card(config: ExportConfig, model: RecurrentDepthForCausalLM) -> str:
    """README.md of an export: what it is, what it was trained on, at which depths, how it did."""
    c = model.config
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [recurrent-depth]", "---",
        f"# {Path(config.out).name}", "",
        "A transformer that reasons in latent space (arXiv 2502.05171): a prelude, a recurrent core, a coda.", "",
        f"- {model.num_parameters():,} parameters; width {c.n_embd}, {c.n_heads} heads, layers "
        f"{c.n_layers_in_prelude} + {c.n_layers_in_recurrent_block} x steps + {c.n_layers_in_coda}",
        f"- context {c.block_size} tokens, vocabulary {c.vocab_size}, weights in {config.dtype}",
        f"- trained depth: {c.sampling_scheme}, mean {c.mean_recurrence}; last "
        f"{c.mean_backprop_depth or 'all'} steps with gradient",
        f"- state at test time: {'zeros' if c.state_seed is None else f'seed {c.state_seed}'}; state in training: "
        f"{c.state_init}",
        *_training_lines(config.model), "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        'model = AutoModelForCausalLM.from_pretrained("DIR", trust_remote_code=True)',
        'tokenizer = AutoTokenizer.from_pretrained("DIR")',
        'inputs = tokenizer("Hello", return_tensors="pt")',
        f"model.generate(**inputs, num_steps={c.mean_recurrence}, max_new_tokens=32)",
        "```", "",
        "## Evaluation", "",
        *_evaluation_lines(config.results), "",
        f"Written by recurrent-depth {version('recurrent-depth')}.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _training_lines(source: str) -> list[str]:
    if not (Path(source).exists() and is_run(source)):
        return [f"- exported from {Path(source).name}"]
    checkpoint = find_checkpoint(source)
    details = read_details(checkpoint)
    lines = [f"- trained for {details['step']:,} steps"]
    run_file = checkpoint.parent.parent / "run.yaml"
    if run_file.is_file():
        run = yaml.safe_load(run_file.read_text())
        lines.append(f"- training data: `{json.dumps(run['data'])}`")
        lines.append(f"- optimizer: `{json.dumps(run['optimizer'])}`, {run['batch_size']} rows a step")
    return lines


def _evaluation_lines(results: str | None) -> list[str]:
    if results is None:
        return ["Not evaluated."]
    try:
        record = json.loads(Path(results).read_text())
        versions = ", ".join(f"{name} {value}" for name, value in record["versions"].items())
        return [record["table"], f"Versions: {versions}."]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"results: {results} is not a results.json of `recurrent-depth eval` ({type(error).__name__}: {error}); "
            "give that file, or leave results out"
        ) from error
