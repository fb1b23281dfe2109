"""A fixture with a small trained run of the shell game."""

import pytest

from recurrent_depth.data.config import DataConfig, TaskDataConfig
from recurrent_depth.training.launch import train
from support import small_run


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluated") / "run"
    train(small_run(out, data=DataConfig(task=TaskDataConfig(name="shell_game", min_length=2, max_length=8))))
    return out
