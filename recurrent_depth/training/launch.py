"""From a configuration to a finished run: checks first, then training."""

import os
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from recurrent_depth.files import output_folder, write_text
from recurrent_depth.runs import checkpoints
from recurrent_depth.training.checkpoint import check_resume, read_resume_details, verify_all
from recurrent_depth.training.config import RunConfig, as_yaml
from recurrent_depth.training.faults import check_ranks_agree, code_version, explained, flat, flight_recorder
from recurrent_depth.training.parallel import Ranks, start_processes
from recurrent_depth.training.rewind import REWINDS_FILE, read_rewinds
from recurrent_depth.training.trainer import Trainer

RECORDER = "flight-recorder"


def train(config: RunConfig, *, resume: bool = False, accept_changed_data: bool = False) -> Path:
    """Train, or continue, the run of `config`; return its folder.

    Args:
        resume: continue from the newest checkpoint of config.out, or start if there is none. A restart by
            `torchrun --max-restarts` always continues.
        accept_changed_data: resume although the data set is not the one the checkpoint was made with.
    """
    run = Path(config.out)
    resume |= int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    recorder = run / RECORDER
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        flight_recorder(recorder)
    ranks = start_processes(config.runtime)
    try:
        with explained(ranks, config.runtime.timeout_minutes, recorder), ExitStack() as stack:
            check_ranks_agree(ranks, {"code": code_version(), "configuration": flat(asdict(config))})
            ranks.on_main(lambda: stack.enter_context(output_folder(run)))
            _train(config, run, ranks, resume, accept_changed_data)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return run


def _train(config: RunConfig, run: Path, ranks: Ranks, resume: bool, accept_changed_data: bool) -> None:
    found = ranks.on_main(lambda: _newest_checkpoint(run, resume))
    trainer = Trainer(config, ranks)
    check_ranks_agree(ranks, {"data": {"fingerprint": trainer.fingerprint}})
    if found is not None:
        details = ranks.on_main(lambda: read_resume_details(found))
        check_resume(config, trainer.fingerprint, found, details, accept_changed_data)
        trainer.spikes.rewinds = ranks.on_main(lambda: read_rewinds(run))
        ranks.on_main(lambda: verify_all(found, details))
        trainer.resume(found, details)
    elif config.init_from is not None:
        _start_from(trainer, config.init_from)
    ranks.on_main(lambda: _write_run_files(run, config, trainer, new=found is None))
    trainer.fit()


def _newest_checkpoint(run: Path, resume: bool) -> Path | None:
    found = checkpoints(run)
    if found and not resume:
        raise FileExistsError(f"{run} holds checkpoints already; continue with --resume true or choose another out")
    return found[-1] if found else None


def _start_from(trainer: Trainer, path: str) -> None:
    from recurrent_depth.training.initialise import load_weights

    load_weights(trainer.model, path)


def _write_run_files(run: Path, config: RunConfig, trainer: Trainer, new: bool) -> None:
    if trainer.ranks.world_size > 1:
        (run / RECORDER).mkdir(exist_ok=True)
    if new:  # rewinds of an earlier run whose checkpoints were deleted
        (run / REWINDS_FILE).unlink(missing_ok=True)
    write_text(run / "run.yaml", as_yaml(config))
    tokenizer = trainer.train_source.tokenizer_json()
    if tokenizer is not None:
        write_text(run / "tokenizer.json", tokenizer)
