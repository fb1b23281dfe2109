"""Ranks that kill themselves in the middle of a phase of training."""

import os
import signal

import torch

import recurrent_depth.training.saving as saving
from recurrent_depth.training.optimizer import HuginnAdam
from recurrent_depth.training.trainer import Trainer

PHASES = {
    "data": (Trainer, "_batch"),
    "backward": (torch.Tensor, "backward"),
    "optimizer": (HuginnAdam, "_move"),
    "save": (saving, "_write_shards"),
    "finish": (saving, "_finish"),
}


def plant_kill(phase: str, call: int, victim: int) -> None:
    """Rank `victim` of this process group kills itself in the middle of the `call`-th call of the phase."""
    owner, name = PHASES[phase]
    original, calls = getattr(owner, name), [0]

    def deadly(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call and int(os.environ["RANK"]) == victim:
            if phase == "save":  # half a file is on disk
                (args[0] / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, deadly)
