"""`recurrent-depth export`: write a folder that transformers loads, with or without this package."""

import json
import os
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from recurrent_depth.depth_range import copy_to
from recurrent_depth.extras import package_version
from recurrent_depth.files import atomic_folder, check_new_folder
from recurrent_depth.hf.conversion.retrofit import load_retrofit, write_retrofit
from recurrent_depth.hf.loading import ModelError, load_model
from recurrent_depth.hf.modeling import RecurrentDepthForCausalLM
from recurrent_depth.hf.remote_code import AUTO_MAP
from recurrent_depth.options import ExportConfig
from recurrent_depth.runs import find_checkpoint, is_run, read_details
from recurrent_depth.terminal import stage

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def export(config: ExportConfig) -> Path:
    """Write the folder, and check its logits by loading it with the code it carries. Nothing is left after an error."""
    out = Path(config.out)
    check_new_folder(config.out)
    evaluation, efforts = _evaluation(config.results)
    with stage(f"export: reading {config.model}"):
        model, tokenizer = load_model(config.model, getattr(torch, config.dtype))
    if not isinstance(model, RecurrentDepthForCausalLM):
        raise ModelError(f"model: {config.model} is not a recurrent-depth model; only those are exported")
    if efforts is not None:
        model.generation_config.reasoning_effort = efforts
    with stage(f"export: writing {out} and comparing its logits"), atomic_folder(out) as folder:
        if config.format == "retrofit":
            write_retrofit(model, folder, config.max_shard_size)
        else:
            model.save_pretrained(folder, max_shard_size=config.max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        copy_to(folder, config.model)
        (folder / "README.md").write_text(model_card(config, model, evaluation), encoding="utf-8")
        written = (
            load_retrofit(folder, model.dtype) if config.format == "retrofit" else load_with_own_code(folder, model)
        )
        difference = check_folder(folder, written, model, config.model)
    print(f"{out}: {model.num_parameters():,} parameters; logits differ by {difference:.1e} of their largest")
    return out


def load_with_own_code(folder: Path, model: RecurrentDepthForCausalLM) -> Any:
    """Return the model of a written folder, loaded with the code that the folder carries."""
    shipped = get_class_from_dynamic_module(AUTO_MAP["AutoModelForCausalLM"], str(folder))
    return shipped.from_pretrained(folder, dtype=model.dtype)


def check_folder(folder: Path, written: Any, model: RecurrentDepthForCausalLM, source: str) -> float:
    """Return the largest relative difference between the logits of a written folder and those of the model.

    Also gives every file the mode of a new file; safetensors writes files that only the owner can read.

    Args:
        written: the model loaded from the folder.
        source: where the model came from, for the message.

    Raises:
        ModelError: if the logits differ by more than the dtype explains.
    """
    difference = largest_difference(written, model)
    if not difference <= _TOLERANCE[model.dtype]:  # true for NaN as well
        raise ModelError(
            f"the logits of the written folder differ from those of {source} (relative difference {difference:.1e}); "
            "nothing was written. Please report this with your versions"
        )
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~mask)
    return difference


@torch.no_grad()
def largest_difference(exported: Any, model: RecurrentDepthForCausalLM) -> float:
    """Return the largest difference between the logits of two models, relative to the largest logit."""
    exported = exported.to(model.device).eval()
    tokens = min(32, exported.config.block_size)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(exported.config.vocab_size, (2, tokens), generator=generator, device="cpu").to(model.device)
    differences = []
    for num_steps in sorted({1, exported.config.mean_recurrence}):
        expected = model(ids, num_steps=num_steps).logits
        actual = exported(ids, num_steps=num_steps).logits
        differences.append((actual - expected).abs().max() / expected.abs().max())
    return torch.stack(differences).max().item()  # host: a number for the user


def model_card(config: ExportConfig, model: RecurrentDepthForCausalLM, evaluation: list[str]) -> str:
    """Return README.md of an export: architecture, training, how to load it, and evaluation."""
    c = model.config
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [recurrent-depth]", "---",
        f"# {Path(config.out).name}", "",
        "A transformer that reasons in latent space (arXiv 2502.05171): a prelude, a recurrent core, a coda.", "",
        f"- {model.num_parameters():,} parameters; width {c.n_embd}, {c.n_heads} heads, layers "
        f"{c.n_layers_in_prelude} + {c.n_layers_in_recurrent_block} x iterations + {c.n_layers_in_coda}",
        f"- context {c.block_size} tokens, vocabulary {c.vocab_size}, weights in {config.dtype}",
        f"- trained depth: {c.sampling_scheme}, mean {c.mean_recurrence}; last "
        f"{c.mean_backprop_depth or 'all'} iterations with gradient",
        f"- state at test time: {'zeros' if c.state_seed is None else f'seed {c.state_seed}'}; state in training: "
        f"{c.state_init}",
        *([] if model.transformer.gate is None else ["- an exit gate, for the exit rule `gate` of recurrent-depth"]),
        *_training_lines(config.model), "",
        "```python",
        "from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast", "",
        'model = AutoModelForCausalLM.from_pretrained("DIR", trust_remote_code=True)',
        'tokenizer = PreTrainedTokenizerFast.from_pretrained("DIR")  # AutoTokenizer would ask to run code',
        'inputs = tokenizer("Hello", return_tensors="pt")',
        f"model.generate(**inputs, num_steps={c.mean_recurrence}, max_new_tokens=32)",
        "```", "",
        "## Evaluation", "",
        *evaluation, "",
        f"Written by recurrent-depth {package_version('recurrent-depth') or 'from a checkout'}.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _training_lines(source: str) -> list[str]:
    if not is_run(source):
        return [f"- exported from {Path(source).name}"]
    checkpoint = find_checkpoint(source)
    lines = [f"- trained for {read_details(checkpoint)['step']:,} training steps"]
    run_file = checkpoint.parent.parent / "run.yaml"
    if run_file.is_file():
        try:
            run = yaml.safe_load(run_file.read_text(encoding="utf-8"))
            lines.append(f"- training data: `{json.dumps(run['data'])}`")
            lines.append(f"- optimizer: `{json.dumps(run['optimizer'])}`, {run['batch_size']} rows per training step")
        except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ModelError(
                f"{run_file} is damaged ({type(error).__name__}: {error}); restore it, or remove it for a model card "
                "without training data"
            ) from error
    return lines


def _evaluation(results: str | None) -> tuple[list[str], dict[str, Any] | None]:
    """Return lines for the model card from a results.json, and its table of reasoning efforts if it has one."""
    if results is None:
        return ["Not evaluated."], None
    try:
        record = json.loads(Path(results).read_text())
        versions = ", ".join(f"{name} {value}" for name, value in record["versions"].items())
        return [record["table"], f"Versions: {versions}."], record.get("reasoning_effort")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"results: {results} is not a results.json of `recurrent-depth eval` ({type(error).__name__}: {error}); "
            "give that file, or leave results out"
        ) from error
