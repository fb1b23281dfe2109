"""`recurrent-depth convert`: turn a dense model into a recurrent one, and prove that it computes the same."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from recurrent_depth.files import atomic_folder, check_new_folder, write_json
from recurrent_depth.hf.configuration import RecurrentDepthConfig
from recurrent_depth.hf.conversion.dense import block_names, converted_weights, model_config
from recurrent_depth.hf.conversion.layer_choice import Similarities, chosen_layers, measured_similarities
from recurrent_depth.hf.export import check_folder, load_with_own_code, model_card
from recurrent_depth.hf.loading import ModelError, load_model
from recurrent_depth.hf.modeling import RecurrentDepthForCausalLM
from recurrent_depth.options import ConvertConfig, ExportConfig
from recurrent_depth.terminal import stage

TOLERANCE = 1e-4
"""Largest difference of logits from the dense model, relative to the largest logit, in fp32."""

RETROFIT_STATE_STD = 0.0087039
"""Standard deviation of the initial state of released retrofits, sqrt(2 / (5 * 5280)): Huginn's weight init."""

_TEXT_ROWS, _TEXT_TOKENS = 16, 256  # of the text on which layers are chosen
_CHECKED_TOKENS = 64


def convert(config: ConvertConfig) -> Path:
    """Write the recurrent model. Nothing is written if its logits differ from those of the dense model."""
    out = Path(config.out)
    check_new_folder(out)
    with stage(f"convert: reading {config.model}"):
        dense, tokenizer = load_model(config.model, torch.float32)
    if isinstance(dense, RecurrentDepthForCausalLM):
        raise ModelError(f"model: {config.model} is recurrent already; convert takes a dense model")
    if tokenizer is None:
        raise ModelError(f"model: {config.model} has no tokenizer; add its tokenizer files to the folder")
    split = (config.prelude, config.core, config.coda)
    shape = model_config(
        dense.config,
        split,
        tie_embeddings=dense.get_output_embeddings().weight is dense.get_input_embeddings().weight,
        mean_recurrence=config.mean_recurrence,
        mean_backprop_depth=config.mean_backprop_depth,
        state_init="like-init" if config.init == "random" else "zero",
        initial_state_std=RETROFIT_STATE_STD,
    )
    with stage("convert: choosing layers"):
        similarities = _similarities(config, dense, tokenizer)
    n_layers = dense.config.num_hidden_layers
    layers = chosen_layers(n_layers, split, config.layers, config.core_layers, similarities)
    model = RecurrentDepthForCausalLM(RecurrentDepthConfig.from_model_config(shape))
    weights = converted_weights(dense, shape, layers)
    weights["transformer.adapter.weight"] = initial_adapter(config.init, shape.n_embd, config.seed)
    load_exactly(model, weights)
    ids = _checked_ids(tokenizer, shape.vocab_size)
    with stage("convert: comparing logits with the dense model"):
        difference = difference_from_dense(model.eval(), dense, layers, ids, config)
    if not difference <= TOLERANCE:  # true for NaN as well
        raise ModelError(
            f"the logits of the converted model differ from those of the dense one by {difference:.1e} of the largest; "
            "nothing was written. Please report this with the name of the model and your versions"
        )
    report = {
        "source": config.model,
        "model_type": dense.config.model_type,
        "init": config.init,
        "seed": config.seed,
        "layers": dict(zip(block_names(shape), layers, strict=True)),
        "dropped_layers": sorted(set(range(n_layers)) - set(layers)),
        "block_influence": None if similarities is None else similarities.influences(),
        "parameters": model.num_parameters(),
        "new_parameters": weights["transformer.adapter.weight"].numel(),
        "difference_from_dense": difference,
    }
    model.generation_config = dense.generation_config
    with stage(f"convert: writing {out}"):
        _write(config, model.to(getattr(torch, config.dtype)), tokenizer, report)
    print("\n".join(_report_lines(report)[2:]))
    return out


def load_exactly(model: RecurrentDepthForCausalLM, weights: dict[str, Tensor]) -> None:
    """Copy weights into the model; every parameter must be given, and no others."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if name != "freqs_cis"]
    if missing or unexpected:
        raise ModelError(
            f"the weights lack {missing[:3]} or have {unexpected[:3]} beyond the configuration; this is a variant "
            "that is not supported"
        )


def initial_adapter(init: str, width: int, seed: int) -> Tensor:
    """Return the adapter [D, 2 D], which multiplies [state; e].

    `identity` is [I I]: with a state of zeros the core reads e, so one iteration is the dense model. `input_only` is
    [0 I]: every iteration computes the dense core again from e. `random` is the default of nn.Linear, as published.
    """
    eye, zero = torch.eye(width, device="cpu"), torch.zeros(width, width, device="cpu")
    if init == "identity":
        return torch.cat([eye, eye], dim=1)
    if init == "input_only":
        return torch.cat([zero, eye], dim=1)
    bound = (2 * width) ** -0.5
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(width, 2 * width, device="cpu").uniform_(-bound, bound, generator=generator)


@torch.no_grad()
def difference_from_dense(
    model: RecurrentDepthForCausalLM, dense: Any, layers: list[int], input_ids: Tensor, config: ConvertConfig
) -> float:
    """Return the largest difference of logits from the dense model with only `layers`, relative to the largest logit.

    Compared at one iteration, and for `input_only` also at three. A random adapter is replaced by [0 I] for the
    comparison: with it the model equals the dense one at no number of iterations, but all other weights must.
    The dense model loses its other layers.
    """
    dense.model.layers = nn.ModuleList(dense.model.layers[layer] for layer in layers)
    dense.config.num_hidden_layers = len(layers)
    expected = dense(input_ids=input_ids, use_cache=False).logits
    adapter = model.transformer.adapter.weight
    initial = adapter.clone()
    if config.init == "random":
        adapter.copy_(initial_adapter("input_only", adapter.shape[0], 0))
    depths = (1, 3) if config.init == "input_only" else (1,)
    found = torch.stack([model(input_ids, num_steps=depth).logits for depth in depths])
    adapter.copy_(initial)
    return ((found - expected).abs().max() / expected.abs().max()).item()  # host: decides whether to write


def _similarities(config: ConvertConfig, dense: Any, tokenizer: Any) -> Similarities | None:
    """Return the similarities of hidden states on the text of the options, if they are needed."""
    if config.core_layers is not None or config.layers not in ("influence", "angular"):
        return None
    assert config.text is not None
    text = Path(config.text).read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    rows = min(len(ids) // _TEXT_TOKENS, _TEXT_ROWS)
    if not rows:
        raise ValueError(f"text: {config.text} has {len(ids)} tokens; give at least {_TEXT_TOKENS}")
    return measured_similarities(dense, ids[: rows * _TEXT_TOKENS].view(rows, _TEXT_TOKENS))


def _checked_ids(tokenizer: Any, vocab_size: int) -> Tensor:
    """Return the rows [2, T] on which logits are compared: a text, and random ids."""
    text = "A transformer that reasons in latent space iterates a core block as often as a problem needs. " * 8
    words = tokenizer(text, return_tensors="pt")["input_ids"][0, :_CHECKED_TOKENS]
    generator = torch.Generator().manual_seed(0)
    return torch.stack([words, torch.randint(vocab_size, words.shape, generator=generator, device="cpu")])


def _write(config: ConvertConfig, model: RecurrentDepthForCausalLM, tokenizer: Any, report: dict[str, Any]) -> None:
    """Write model, tokenizer, card and report, and compare the folder's logits with the model's by loading it."""
    with atomic_folder(config.out) as folder:
        model.save_pretrained(folder, max_shard_size=config.max_shard_size)
        tokenizer.save_pretrained(folder)
        write_json(folder / "conversion.json", report)
        shape = yaml.safe_dump(asdict(model.model_config), sort_keys=False)
        (folder / "model.yaml").write_text(f"# The section `model` of a training run.\n{shape}", encoding="utf-8")
        card = model_card(ExportConfig(config.model, config.out, config.dtype), model, ["Not evaluated."])
        (folder / "README.md").write_text("\n".join([card, *_report_lines(report), ""]), encoding="utf-8")
        check_folder(folder, load_with_own_code(folder, model), model, config.model)


def _report_lines(report: dict[str, Any]) -> list[str]:
    """Return the report for people: what became of every layer."""
    parts: dict[str, list[int]] = {}
    for name, layer in report["layers"].items():
        parts.setdefault(name.split(".")[1], []).append(layer)
    return [
        "## Conversion",
        "",
        f"Converted from {report['source']} ({report['model_type']}), adapter: {report['init']}.",
        "",
        *(f"- {part}: dense layers {_ranges(layers)}" for part, layers in parts.items()),
        f"- dropped: {_ranges(report['dropped_layers']) or 'none'}",
        f"- {report['parameters']:,} parameters, of which {report['new_parameters']:,} are new (the adapter)",
        f"- logits against the dense model with the same layers: {report['difference_from_dense']:.1e} of the largest"
        + (", compared with the adapter [0 I]" if report["init"] == "random" else ""),
    ]


def _ranges(numbers: list[int]) -> str:
    """Return increasing numbers as ranges: 0-3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
