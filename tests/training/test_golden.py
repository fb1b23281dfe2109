"""Twenty training steps with known losses, to detect changes of the numerics."""

import dataclasses
import json
from pathlib import Path

import pytest

from recurrent_depth.training.launch import train
from support import losses, small_run

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden_losses.json"


@pytest.mark.parametrize("name", ["huginn", "adamw"])
def test_losses_equal_the_golden_ones(tmp_path, name):
    """After an intended change, write the losses of both optimizers to the fixture and record why in docs."""
    config = small_run(tmp_path / "run", steps=20)
    train(dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, name=name)))
    assert losses(tmp_path / "run") == pytest.approx(json.loads(GOLDEN.read_text())[name], rel=1e-4)
