"""A stage of the GPU suite with planted faults: a tensor on the wrong device, a killed process, no end."""

import os
import signal
import time

import torch


def run(stage):
    stage.measure("sum", lambda: {"value": float(torch.ones(2).sum())})
    stage.measure("wrong device", lambda: torch.ones(2) + torch.ones(2, device="meta"))
    stage.measure("after the failure", lambda: {"value": 1.0})
    if os.environ.get("PLANTED") == "killed":
        stage.measure("killed", lambda: os.kill(os.getpid(), signal.SIGKILL))
    if os.environ.get("PLANTED") == "short":
        return
    stage.measure("no end", lambda: time.sleep(600))
