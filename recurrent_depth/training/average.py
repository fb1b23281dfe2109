"""`recurrent-depth average`: average the weights of several checkpoints of a run (arXiv 2502.05171, section 5)."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from torch import Tensor

from recurrent_depth.files import atomic_folder, check_new_folder, write_text
from recurrent_depth.runs import (
    MODEL,
    CheckpointError,
    checkpoints,
    copy_tokenizer_settings,
    is_run,
    load_run_model,
    read_details,
    run_tokenizer,
)
from recurrent_depth.training.checkpoint import CheckpointWriter
from recurrent_depth.training.commands import AverageConfig, AverageMethod
from recurrent_depth.training.config import CheckpointConfig
from recurrent_depth.training.parallel import Ranks


def average(config: AverageConfig) -> Path:
    """Write a run folder with the averaged weights and return its path."""
    run, out = Path(config.model), Path(config.out)
    if not is_run(run):
        raise CheckpointError(f"model: {str(run)!r} is not a run folder; give the `out` of recurrent-depth train")
    check_new_folder(out)
    chosen = checkpoints(run)[::-1][:: config.every][: config.last][::-1]
    if len(chosen) < 2:
        raise CheckpointError(
            f"{run} has {len(checkpoints(run))} checkpoint(s), of which {len(chosen)} would be merged; keep more of "
            "them with checkpoint.keep_last or checkpoint.keep_every, or lower --every"
        )
    steps = [read_details(path)["step"] for path in chosen]
    details = read_details(chosen[-1]) | {"average": {**asdict(config), "steps": steps}}
    with atomic_folder(out) as folder:
        weights = merged(chosen, config.method, config.decay)
        writer = CheckpointWriter(folder, CheckpointConfig(background=False), Ranks(0, 1, torch.device("cpu")))
        writer.save(details.pop("step"), {MODEL: weights}, details)
        _copy_run_files(run, folder, out)
    print(f"merged {len(chosen)} checkpoints, steps {steps}, into {out}")
    return out


def merged(paths: Sequence[Path], method: AverageMethod, decay: float) -> dict[str, Tensor]:
    """Return the averaged weights of checkpoints, given oldest first, in fp32.

    Memory: the average and one checkpoint.
    """
    result: dict[str, Tensor] = {}
    for number, path in enumerate(paths):
        share = 1 - decay if method == "ema" else 1 / (number + 1)
        with torch.no_grad():
            for name, p in load_run_model(path).named_parameters():
                if number == 0:
                    result[name] = p.detach().clone()
                elif p.shape != result[name].shape:
                    raise CheckpointError(
                        f"{path}: {name} has the shape {tuple(p.shape)}, but {tuple(result[name].shape)} in "
                        f"{paths[0]}; merge checkpoints of one run"
                    )
                else:
                    result[name].lerp_(p, share)
    return result


def _copy_run_files(run: Path, folder: Path, out: Path) -> None:
    try:
        settings = yaml.safe_load((run / "run.yaml").read_text()) | {"out": str(out)}
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{run / 'run.yaml'} cannot be read ({error}); restore it") from error
    write_text(folder / "run.yaml", yaml.safe_dump(settings, sort_keys=False))
    tokenizer = run_tokenizer(run)
    if tokenizer is not None:
        shutil.copy(tokenizer, folder / "tokenizer.json")
        copy_tokenizer_settings(tokenizer.parent, folder)
