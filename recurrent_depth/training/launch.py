"""From a configuration to a finished run: checks first, then training."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from recurrent_depth.runs import CheckpointError, checkpoints, read_details
from recurrent_depth.training.config import RunConfig, as_yaml
from recurrent_depth.training.faults import check_ranks_agree, code_version, explained, flat, flight_recorder
from recurrent_depth.training.parallel import Ranks, start_processes
from recurrent_depth.training.rewind import REWINDS_FILE
from recurrent_depth.training.trainer import Trainer


def train(config: RunConfig, *, resume: bool = False, accept_changed_data: bool = False) -> Path:
    """Train, or continue, the run of `config`; returns its folder.

    Args:
        resume: continue from the newest checkpoint of config.out, or start if there is none. A restart by
            `torchrun --max-restarts` always continues.
        accept_changed_data: resume although the data set is not the one the checkpoint was made with.
    """
    run = Path(config.out)
    resume |= int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    recorder = run / "flight-recorder"
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        flight_recorder(recorder)
    ranks = start_processes(config.runtime)
    try:
        with explained(ranks, config.runtime.timeout_minutes, recorder):
            _train(config, run, ranks, resume, accept_changed_data)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return run


def _train(config: RunConfig, run: Path, ranks: Ranks, resume: bool, accept_changed_data: bool) -> None:
    check_ranks_agree(ranks, {"code": code_version(), "configuration": flat(asdict(config))})
    found = checkpoints(run)
    if found and not resume:
        raise FileExistsError(f"{run} holds checkpoints already; continue with --resume true or choose another out")
    trainer = Trainer(config, ranks)
    check_ranks_agree(ranks, {"data": {"fingerprint": trainer.train_source.fingerprint()}})
    if found:
        _check_resume(trainer, found[-1], accept_changed_data)
        trainer.resume(found[-1])
    elif config.init_from is not None:
        _start_from(trainer, config.init_from)
    if ranks.is_main:
        if not found:  # rewinds of an earlier run whose checkpoints were deleted
            (run / REWINDS_FILE).unlink(missing_ok=True)
        _write_run_files(run, config, trainer)
    ranks.barrier()
    trainer.fit()


def _check_resume(trainer: Trainer, checkpoint: Path, accept_changed_data: bool) -> None:
    details = read_details(checkpoint)
    saved, current = details["trajectory"], json.loads(json.dumps(trainer.config.trajectory()))
    changed = sorted(name for name in {**saved, **current} if saved.get(name) != current.get(name))
    if accept_changed_data:
        changed = [name for name in changed if name != "data"]
    if changed:
        described = "; ".join(f"{name}: was {saved.get(name)}, is {current.get(name)}" for name in changed)
        raise CheckpointError(f"this configuration is not the one of {checkpoint} ({described}); restore it to resume")
    if details["data"] != trainer.train_source.fingerprint() and not accept_changed_data:
        raise CheckpointError(
            f"the data are not those {checkpoint} was trained on (fingerprints differ); restore them, "
            "or pass --accept-changed-data true"
        )


def _start_from(trainer: Trainer, path: str) -> None:
    from recurrent_depth.training.initialise import load_weights

    load_weights(trainer.model, path)


def _write_run_files(run: Path, config: RunConfig, trainer: Trainer) -> None:
    run.mkdir(parents=True, exist_ok=True)
    temporary = run / "run.yaml.tmp"
    temporary.write_text(as_yaml(config))
    temporary.replace(run / "run.yaml")
    tokenizer = trainer.train_source.tokenizer_json()
    if tokenizer is not None:
        (run / "tokenizer.json").write_text(tokenizer)
