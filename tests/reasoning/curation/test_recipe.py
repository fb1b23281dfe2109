"""The shipped s1 recipe has the published settings."""

import math
from pathlib import Path

import pytest

from recurrent_depth.hf.dense_control import optimizer_of
from recurrent_depth.model.config import SHAPES
from recurrent_depth.parsing import parse_options
from recurrent_depth.reasoning.config import ReasoningDataConfig
from recurrent_depth.reasoning.format import SPARES
from recurrent_depth.training.commands import DenseConfig
from recurrent_depth.training.config import TrainCommand
from recurrent_depth.training.optimizer import learning_rate

CONFIGS = Path(__file__).parents[3] / "configs"
S1 = ["--config", str(CONFIGS / "finetune" / "s1.yaml")]


def test_s1_schedule_is_five_epochs_with_cosine_decay_to_zero():
    config = parse_options(TrainCommand, S1).run_config()
    assert config.steps == 5 * math.ceil(1000 / config.batch_size) == 315
    assert config.model == SHAPES["huginn-3.5b"]
    rates = [learning_rate(config.optimizer, step, config.steps) for step in range(config.steps)]
    assert max(rates) == pytest.approx(1e-5)
    assert rates.index(max(rates)) == 15  # 5% of 315
    middle = 16 + (315 - 16) // 2
    assert rates[middle] == pytest.approx(0.5e-5, rel=0.02)
    assert rates[-1] < 1e-9
    assert sorted(rates[16:], reverse=True) == rates[16:]


def test_dense_control_uses_s1_optimizer_settings():
    import torch

    run = parse_options(DenseConfig, ["--run", S1[1], "--model", "somewhere", "--out", "dense"]).run
    optimizer, _ = optimizer_of(torch.nn.Linear(2, 2), run.optimizer, run.steps)
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 0.0]


def test_s1_rows_use_spare_tokens_and_model_block_size():
    config = parse_options(ReasoningDataConfig, ["--config", str(CONFIGS / "data" / "s1.yaml")])
    assert config.format.delimiters == SPARES.delimiters
    assert config.block == SHAPES["huginn-3.5b"].block_size
    assert config.when_too_long == "refuse"
