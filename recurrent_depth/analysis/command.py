"""`recurrent-depth analyze`: record trajectories, then write figures and the page."""

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from recurrent_depth.analysis import recording as recordings
from recurrent_depth.analysis.classification import RULE
from recurrent_depth.analysis.config import AnalyzeConfig
from recurrent_depth.analysis.convergence import parse_rule
from recurrent_depth.analysis.figures import write_figures
from recurrent_depth.analysis.page import write_page
from recurrent_depth.analysis.texts import Window, cut, encode, read_texts, token_text
from recurrent_depth.analysis.trajectories import (
    converge,
    measure_jacobian,
    record,
    record_paths,
    spread_tokens,
    write_attention,
)
from recurrent_depth.depth_range import warn_beyond
from recurrent_depth.devices import choose_device, choose_dtype
from recurrent_depth.evaluation.table import read_csv
from recurrent_depth.files import atomic_folder, check_new_folder, write_json
from recurrent_depth.hf import RecurrentDepthForCausalLM
from recurrent_depth.hf.loading import load_model
from recurrent_depth.terminal import print_line, progress

ATTENTION_TOKENS = 1024


def analyze(config: AnalyzeConfig) -> Path:
    """Analyse the texts and return the path of the page."""
    out = Path(config.out)
    check_new_folder(out)
    texts = read_texts(config.text, config.text_file)
    results = [result for path in config.results for result in read_csv(Path(path))]
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    model, tokenizer = load_model(config.model, dtype, device, config.kernels)
    if not isinstance(model, RecurrentDepthForCausalLM):
        raise ValueError(f"model: {config.model} is a {type(model).__name__}; give a recurrent-depth model")
    if tokenizer is None:
        raise ValueError(f"model: {config.model} has no tokenizer, which texts need; add a tokenizer.json")
    rules = [parse_rule(rule, model.transformer.gate) for rule in config.exits]
    warn_beyond(config.model, config.num_steps)
    size = min(config.window or model.model_config.block_size, model.model_config.block_size)
    windows = cut(encode(tokenizer, texts), size, config.max_tokens)
    _check_windows(config, windows)
    with atomic_folder(out) as folder:
        recording, details = run(model, windows, config, rules, folder)
        details |= _about(config, windows, tokenizer, recording, rules, device, dtype)
        write_json(folder / recordings.DETAILS, details)
        write_figures(recording, details, results, folder / "figures")
        write_page(recording, details, results, folder / "index.html")
    print(f"page: {(out / 'index.html').resolve()}")
    return out / "index.html"


def _check_windows(config: AnalyzeConfig, windows: list[Window]) -> None:
    total, longest = windows[-1].columns.stop, max(len(window.ids) for window in windows)
    if config.tokens and max(config.tokens) >= total:
        raise ValueError(f"tokens is {config.tokens}, but the texts have {total} tokens, counted from 0")
    if config.attention and longest > ATTENTION_TOKENS:
        raise ValueError(
            f"attention: a window has {longest} tokens, and maps are stored for at most {ATTENTION_TOKENS}; add "
            f"--window {ATTENTION_TOKENS}"
        )


@torch.no_grad()
def run(
    model: Any, windows: list[Window], config: AnalyzeConfig, rules: list[tuple[str, Any]], folder: Path
) -> tuple[recordings.Recording, dict[str, Any]]:
    """Write the arrays of an analysis to `folder`. Return them and what is not an array."""
    shape = model.model_config
    sizes = {
        "steps": config.num_steps, "tokens": windows[-1].columns.stop, "windows": len(windows),
        "candidates": min(config.top, shape.vocab_size), "components": min(config.components, shape.n_embd),
        "rules": len(rules), "seeds": config.state_seeds, "chosen": len(config.tokens), "width": shape.n_embd,
    }  # fmt: skip
    recording = recordings.create(folder, sizes)
    seeds, long = config.state_seeds, config.converged_steps
    details: dict[str, Any] = {}
    name = f"{sizes['tokens']} tokens, iterations"
    with progress(name, len(windows) * (long + config.num_steps + seeds * long)) as advance:
        converged = converge(model, windows, recording, sizes["components"], long, advance)
        record(model, windows, recording, converged, [rule for _, rule in rules], config.tokens, advance)
        ends = record_paths(model, windows, recording, converged, long, advance)
    details["component_shares"] = converged.components.share.tolist()
    details["path_independence"] = [{"seed": seed, "median_distance": _median(end)} for seed, end in enumerate(ends)]
    details["jacobian"] = []
    if config.jacobian:
        tokens = config.tokens or spread_tokens(windows, config.jacobian_tokens)
        model.set_kernels("torch")  # fused kernels have no forward-mode derivatives
        print_line(f"Jacobian of {len(tokens)} tokens at {len(config.jacobian)} iterations")
        details["jacobian"] = measure_jacobian(model, windows, config.jacobian, tokens)
    if config.attention:
        write_attention(model, windows, config.attention, folder / "attention")
    return recording, details


def _median(values: Any) -> float:
    return torch.from_numpy(values).median().item()


def _about(
    config: AnalyzeConfig,
    windows: list[Window],
    tokenizer: Any,
    recording: recordings.Recording,
    rules: list[tuple[str, Any]],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    used = {int(token) for token in _unique(recording.top_ids)} | {token for window in windows for token in window.ids}
    return {
        "title": config.title or Path(config.model).resolve().name,
        "config": asdict(config),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "version": version("recurrent-depth"),
        "torch": torch.__version__,
        "windows": [{"name": window.name, "first": window.first, "ids": window.ids} for window in windows],
        "vocabulary": {str(token): token_text(tokenizer, token) for token in sorted(used)},
        "exits": [name for name, _ in rules],
        "class_rule": RULE,
    }


def _unique(ids: Any) -> set[int]:
    return {token for row in ids for token in set(row.ravel().tolist())}
