"""Kill a rank in a given phase of training."""

import os
import signal
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from recurrent_depth.data.tasks.source import TaskSource


def write_half_a_file(*args, **kwargs):
    """Write what a process leaves behind that dies while writing shards."""
    (Path(kwargs["storage_writer"].path) / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")


def publishes_a_checkpoint(source, target):
    return Path(target).name == "checkpoint.json" or Path(target).parent.name == "checkpoints"


PHASES = {
    "data": (TaskSource, "batch"),
    "backward": (torch.Tensor, "backward"),
    "optimizer": (torch, "atan2"),
    "save": (dcp, "save"),
    "finish": (os, "replace"),
}


def plant_kill(phase: str, call: int, victim: int) -> None:
    """Make rank `victim` of this process group kill itself at the `call`-th call of the phase."""
    owner, name = PHASES[phase]
    original, calls = getattr(owner, name), [0]

    def deadly(*args, **kwargs):
        if phase != "finish" or publishes_a_checkpoint(*args):
            calls[0] += 1
            if calls[0] == call and int(os.environ["RANK"]) == victim:
                if phase == "save":
                    write_half_a_file(*args, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, deadly)
