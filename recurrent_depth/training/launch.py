"""From a configuration to a finished run: checks first, then training."""

import json
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from recurrent_depth.runs import CheckpointError, checkpoints, read_details
from recurrent_depth.training.parallel import Ranks, start_processes
from recurrent_depth.training.run import RunConfig, as_yaml, fingerprint
from recurrent_depth.training.trainer import Trainer


def train(config: RunConfig, *, resume: bool = False, accept_changed_data: bool = False) -> Path:
    """Train, or continue, the run of `config`; returns its folder.

    Args:
        resume: continue from the newest checkpoint of config.out, or start if there is none.
        accept_changed_data: resume although the data set is not the one the checkpoint was made with.
    """
    ranks = start_processes(config.runtime)
    try:
        run = Path(config.out)
        found = checkpoints(run)
        if found and not resume:
            raise FileExistsError(f"{run} holds checkpoints already; continue with --resume true or choose another out")
        trainer = Trainer(config, ranks)
        _check_ranks_agree(trainer, ranks)
        if found:
            _check_resume(trainer, found[-1], accept_changed_data)
            trainer.resume(found[-1])
        elif config.init_from is not None:
            _start_from(trainer, config.init_from)
        if ranks.is_main:
            _write_run_files(run, config, trainer)
        ranks.barrier()
        trainer.fit()
        return run
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _check_ranks_agree(trainer: Trainer, ranks: Ranks) -> None:
    """All ranks must see the same configuration and the same data."""
    if ranks.world_size == 1:
        return
    mine = {"configuration": fingerprint(asdict(trainer.config)), "data": trainer.train_source.fingerprint()}
    everyone: list[dict[str, str]] = [{} for _ in range(ranks.world_size)]
    dist.all_gather_object(everyone, mine)
    for what in mine:
        values = [seen[what] for seen in everyone]
        if len(set(values)) > 1:
            odd = [rank for rank, value in enumerate(values) if value != values[0]]
            raise RuntimeError(f"rank(s) {odd} see another {what} than rank 0; start all ranks from the same files")


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
