"""Every command runs on the accelerator, in bfloat16, where torch sees one, and on the CPU in float32 elsewhere."""

import sys
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch

from recurrent_depth.analysis.command import analyze  # noqa: F401  imported, so that its load_model is replaced
from recurrent_depth.cli import main
from recurrent_depth.devices import choose_device, choose_dtype, device_of_process
from recurrent_depth.hf.dense_control import arguments
from recurrent_depth.reasoning.curation.local import LocalConfig
from recurrent_depth.serving.config import ServeConfig
from recurrent_depth.serving.serve import load
from recurrent_depth.training.config import RuntimeConfig
from recurrent_depth.training.parallel import start_processes
from support import small_run


@pytest.fixture(params=[0, 2], ids=["without a GPU", "with GPUs"])
def gpus(request, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    return request.param


class Loading(ValueError):
    """Raised where a command would load its model."""


@pytest.fixture
def loaded(monkeypatch):
    """Return a list that receives (device, dtype) of the model that a command loads."""
    found = []

    def record(path, dtype=None, device="cpu", kernels="auto", quantize=None):
        found.append((torch.device(device).type, dtype))
        raise Loading

    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("recurrent_depth.") and hasattr(module, "load_model"):
            monkeypatch.setattr(module, "load_model", record)
    return found


COMMANDS = {
    "generate": lambda folder, out: main(["generate", "--model", folder, "--prompt", "a"]),
    "eval": lambda folder, out: main(["eval", "--model", folder, "--out", out, "--generated.tasks", "shell_game"]),
    "analyze": lambda folder, out: main(["analyze", "--model", folder, "--out", out, "--text", "a"]),
    "serve": lambda folder, out: load(ServeConfig(folder)),
    "curate": lambda folder, out: LocalConfig(folder).open(),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_command_loads_its_model_on_the_accelerator(gpus, loaded, chat_folder, tmp_path, name):
    with suppress(Loading):  # the command line reports it
        COMMANDS[name](str(chat_folder), str(tmp_path / "out"))
    assert loaded == [("cuda", torch.bfloat16) if gpus else ("cpu", torch.float32)]


def test_training_runs_on_the_accelerator(gpus, monkeypatch, tmp_path):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    device = start_processes(RuntimeConfig()).device
    assert str(device) == ("cuda:1" if gpus else "cpu")
    assert chosen == ([device] if gpus else [])
    assert choose_dtype(RuntimeConfig().dtype, device) == (torch.bfloat16 if gpus else torch.float32)
    assert start_processes(RuntimeConfig(device="cpu")).device.type == "cpu"


def test_dense_control_runs_on_the_accelerator(gpus, monkeypatch, tmp_path):
    monkeypatch.setattr("recurrent_depth.hf.dense_control.TrainingArguments", SimpleNamespace)  # it would use the GPU
    given = arguments(small_run(tmp_path, runtime=RuntimeConfig()), 1, str(tmp_path))
    assert (given.use_cpu, given.bf16) == ((False, True) if gpus else (True, False))
    given = arguments(small_run(tmp_path, runtime=RuntimeConfig(device="cpu", dtype="bfloat16")), 1, str(tmp_path))
    assert (given.use_cpu, given.bf16) == (True, True)


def test_unknown_device_or_dtype_is_an_error_that_names_the_choices(gpus):
    for name in ("tpu", "meta", "cuda:9", "cuda:x"):
        with pytest.raises(ValueError, match=f"device is '{name}'.*use auto"):
            choose_device(name)
    with pytest.raises(ValueError, match="dtype is 'float16'; use auto, float32 or bfloat16"):
        choose_dtype("float16", torch.device("cpu"))
    assert choose_dtype("float32", torch.device("cuda")) == torch.float32


def test_more_processes_than_gpus_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"process 2 of its node.*sees 2.*--nproc_per_node 2"):
        device_of_process("auto", 2)
    assert device_of_process("cpu", 2) == torch.device("cpu")
