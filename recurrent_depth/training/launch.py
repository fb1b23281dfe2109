"""`recurrent-depth train` and train.py: check the configuration and start or resume a run."""

import os
import socket
from contextlib import ExitStack
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from recurrent_depth.extras import require
from recurrent_depth.files import output_folder, write_text
from recurrent_depth.hub import check_folder_or_hub_name
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.transformer import RecurrentDepthModel, is_gate
from recurrent_depth.runs import (
    CheckpointError,
    checkpoints,
    copy_tokenizer_settings,
    is_run,
    load_run_model,
    run_tokenizer,
)
from recurrent_depth.training.checkpoint import check_resume, read_resume_details, verify_all
from recurrent_depth.training.config import RunConfig, TrainCommand, as_yaml
from recurrent_depth.training.faults import check_ranks_agree, code_version, explained, flattened, flight_recorder
from recurrent_depth.training.parallel import Ranks, start_processes
from recurrent_depth.training.rewind import REWINDS_FILE, read_rewinds
from recurrent_depth.training.trackers import WANDB_ID_FILE, choose_trackers
from recurrent_depth.training.trainer import Trainer

RECORDER = "flight-recorder"
LAUNCH_FILE = "torchrun.txt"
"""Names the torchrun that began or resumed the run: its restarts resume, others need --resume true."""

SAME_FUNCTION = (
    "n_heads", "n_layers_in_prelude", "n_layers_in_recurrent_block", "n_layers_in_coda", "norm", "core_norm",
    "norm_eps", "rope_base", "qk_bias", "tie_embeddings", "block", "ln_f_before_coda", "n_kv_heads", "head_size",
    "qkv_bias", "qk_norm", "rotary_scaling", "embed_multiplier",
)  # fmt: skip
"""Fields of the model that change what the weights compute, and that the shapes of the weights may not show."""


def run(command: TrainCommand) -> None:
    """Train, or print the configuration (`dry_run`)."""
    config = command.run_config()
    if command.dry_run:
        print(as_yaml(config))
        return
    if config.init_from is not None and not is_run(config.init_from):
        check_folder_or_hub_name(config.init_from, "init_from")
        if find_spec("transformers") is None:  # fail before the model is built
            raise ModuleNotFoundError("init_from reads a Hugging Face folder", name="transformers")
    train(config, resume=command.resume, accept_changed_data=command.accept_changed_data)


def train(config: RunConfig, *, resume: bool = False, accept_changed_data: bool = False) -> Path:
    """Start or resume the run of `config` and return its folder.

    Args:
        resume: continue from the newest checkpoint of config.out, or start if there is none. A restart by
            `torchrun --max-restarts` resumes what the same torchrun began.
        accept_changed_data: resume although the data set has changed since the checkpoint.
    """
    run = Path(config.out)
    _check_packages(config)
    recorder = run / RECORDER
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        flight_recorder(recorder)
    ranks = start_processes(config.runtime)
    try:
        with explained(ranks, config.runtime.timeout_minutes, recorder), ExitStack() as stack:
            check_ranks_agree(ranks, {"code": code_version(), "configuration": flattened(asdict(config))})
            ranks.on_main(lambda: stack.enter_context(output_folder(run)))
            _prepare(config, run, ranks, resume, accept_changed_data).fit()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return run


def _check_packages(config: RunConfig) -> None:
    """Raise if a package is missing that the run will need later."""
    choose_trackers(config.trackers)
    if config.export.every is not None or config.export.at_end:
        require("transformers", "recurrent-depth[hf]", "export")


def _prepare(config: RunConfig, run: Path, ranks: Ranks, resume: bool, accept_changed_data: bool) -> Trainer:
    """Return a trainer, new or resumed from the newest checkpoint, and write the files of the run folder."""
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
        load_weights(trainer.model, config.init_from)
    ranks.on_main(lambda: _write_run_files(run, config, trainer, new=found is None))
    return trainer


def _newest_checkpoint(run: Path, resume: bool) -> Path | None:
    found = checkpoints(run)
    if found and not (resume or _restarted_by_torchrun(run)):
        raise FileExistsError(f"{run} already holds checkpoints; continue with --resume true or choose another --out")
    return found[-1] if found else None


def _restarted_by_torchrun(run: Path) -> bool:
    """Return whether this is a restart, by the torchrun that began or resumed the run."""
    file, restarts = run / LAUNCH_FILE, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    return restarts > 0 and file.is_file() and file.read_text() == _launch_name()


def _launch_name() -> str:
    """Return what tells this torchrun, restarts included, from others: the rendezvous id, or the process."""
    name = os.environ["TORCHELASTIC_RUN_ID"]
    return name if name != "none" else f"process {os.getppid()} of {socket.gethostname()}"


def _write_run_files(run: Path, config: RunConfig, trainer: Trainer, new: bool) -> None:
    if trainer.ranks.world_size > 1:
        (run / RECORDER).mkdir(exist_ok=True)
    if new:  # an earlier run whose checkpoints were deleted may have left these
        (run / REWINDS_FILE).unlink(missing_ok=True)
        (run / WANDB_ID_FILE).unlink(missing_ok=True)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        write_text(run / LAUNCH_FILE, _launch_name())
    write_text(run / "run.yaml", as_yaml(config))
    tokenizer = trainer.train_source.tokenizer_json()
    if tokenizer is not None:
        write_text(run / "tokenizer.json", tokenizer)
        source = None if config.init_from is None else run_tokenizer(config.init_from)
        if source is not None:
            copy_tokenizer_settings(source.parent, run)


@torch.no_grad()
def load_weights(model: RecurrentDepthModel, path: str) -> None:
    """Copy the weights of a run, checkpoint, export, Huginn folder or hub name into `model` (sharded or not).

    A gate that the folder lacks keeps its initial weights.
    """
    weights, config = _weights(path)
    differences = [
        f"{name} is {getattr(config, name)} there and {getattr(model.config, name)} here"
        for name in SAME_FUNCTION
        if getattr(config, name) != getattr(model.config, name)
    ]
    if differences:
        raise CheckpointError(
            f"init_from: {path} is another model: {', '.join(differences)}; use the model configuration of that folder"
        )
    if config.gate is not None and model.config.gate is None:
        raise CheckpointError(
            f"init_from: {path} has an exit gate, which this run would drop; set --model.gate.input {config.gate.input}"
        )
    for name, p in model.named_parameters():
        if is_gate(name) and config.gate is None:
            continue
        if name not in weights or weights[name].shape != p.shape:
            found = tuple(weights[name].shape) if name in weights else "nothing"
            raise CheckpointError(
                f"init_from: {path} has {found} for {name}, but this model needs {tuple(p.shape)}; use the model "
                "configuration of that folder"
            )
        whole = weights[name].to(p.device, torch.float32)
        if isinstance(p, DTensor):
            p.copy_(distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None))
        else:
            p.copy_(whole)


def _weights(path: str) -> tuple[dict[str, torch.Tensor], ModelConfig]:
    """Return the parameters and the configuration of a folder or hub name."""
    if Path(path).exists() and is_run(path):
        trained = load_run_model(path)
        return dict(trained.named_parameters()), trained.config
    try:
        from recurrent_depth.hf.loading import load_model
    except ModuleNotFoundError as error:
        raise ValueError(
            f"init_from: {path} is not a run; a Hugging Face folder or name needs the package {error.name}: "
            "pip install 'recurrent-depth[hf]'"
        ) from error
    model, _ = load_model(path, dtype=torch.float32)
    return dict(model.named_parameters()), model.model_config
