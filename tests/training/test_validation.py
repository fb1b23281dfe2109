"""The validation loss covers exactly the configured rows."""

import dataclasses

import pytest
import torch

from recurrent_depth.training.config import ValidationConfig
from recurrent_depth.training.health import validate
from recurrent_depth.training.parallel import build_model
from recurrent_depth.training.trainer import Trainer
from support import ONE_RANK, small_run


@pytest.mark.parametrize("rows_per_batch", [1, 4, 5, 8])
def test_validation_loss_does_not_depend_on_the_batch(tmp_path, rows_per_batch):
    trainer = Trainer(small_run(tmp_path), ONE_RANK)
    config = ValidationConfig(rows=5, num_steps=(1,))
    batch = trainer.validation_source.batch(0, 5, 0)
    with torch.no_grad():
        whole = trainer.model(batch.input_ids, targets=batch.targets, num_steps=1).loss / batch.targets.numel()
    metrics = validate(trainer.model, trainer.validation_source, config, rows_per_batch, ONE_RANK)
    assert metrics["loss_1"] == pytest.approx(whole.item(), rel=1e-5)


def test_validation_refuses_rows_without_a_target(tmp_path):
    class NoTargets:
        def batch(self, first_row, count, step):
            batch = source.batch(first_row, count, step)
            return dataclasses.replace(batch, targets=torch.full_like(batch.targets, -100))

    config = small_run(tmp_path)
    source = Trainer(config, ONE_RANK).validation_source
    model = build_model(config.model, config.runtime, ONE_RANK, seed=0)
    with pytest.raises(ValueError, match=r"no position .* raise validation\.rows"):
        validate(model, NoTargets(), config.validation, 4, ONE_RANK)
