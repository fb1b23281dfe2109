"""Fine-tune a dense transformers model as a control: same rows, schedule and number of training steps."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from recurrent_depth.data.batch import Batch, Source
from recurrent_depth.data.config import DataConfig
from recurrent_depth.data.loader import open_source
from recurrent_depth.devices import choose_device, choose_dtype
from recurrent_depth.files import LOCK_FILE, output_folder
from recurrent_depth.hub import check_folder_or_hub_name
from recurrent_depth.model.loss import IGNORE_INDEX
from recurrent_depth.training.commands import DenseConfig
from recurrent_depth.training.config import OptimizerConfig, RunConfig
from recurrent_depth.training.optimizer import build_optimizer, learning_rate
from recurrent_depth.training.parallel import Ranks, start_processes


class Rows(Dataset):
    """The rows of a source, in the order in which the trainer of recurrent models reads them.

    accelerate gives batch m * ranks + r to rank r, so a micro-step has the same rows as in the recurrent trainer.
    """

    def __init__(self, source: Source, count: int) -> None:
        self.source, self.count = source, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return as_features(self.source.batch(number, 1, 0))


def as_features(batch: Batch) -> dict[str, Tensor]:
    """Return the features of a batch of one row of T tokens for a transformers model.

    They have T + 1 ids, because the model shifts the labels itself; positions that restart separate the documents.
    """
    ids, targets = batch.input_ids[0], batch.targets[0]
    features = {
        "input_ids": torch.cat([ids, targets[-1:].clamp(min=0)]),
        "labels": torch.cat([targets.new_full((1,), IGNORE_INDEX), targets]),
    }
    if batch.position_ids is not None:
        positions = batch.position_ids[0]
        features["position_ids"] = torch.cat([positions, positions[-1:] + 1])
    return features


class SequentialTrainer(Trainer):
    """A Trainer that reads rows in the order of the data set, which is already shuffled."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def train_dense(config: DenseConfig) -> Path:
    """Fine-tune a dense model and return its folder."""
    check_folder_or_hub_name(config.model)
    rows = config.run.rows_per_rank(int(os.environ.get("WORLD_SIZE", 1)))
    out = Path(config.out)
    ranks = start_processes(config.run.runtime)
    try:
        with ExitStack() as stack:
            ranks.on_main(lambda: _claim(stack.enter_context(output_folder(out)), config.resume))
            _train(config, ranks, rows)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return out / "model"


def _claim(out: Path, resume: bool) -> None:
    if any(path.name != LOCK_FILE for path in out.iterdir()) and not resume:
        raise FileExistsError(f"{out} is not empty; continue with --resume true or choose another out")


def _train(config: DenseConfig, ranks: Ranks, rows: int) -> None:
    run = config.run
    source = open_source(DataConfig(packed=config.rows), "train", run.seed, run.steps)
    model = load_dense(config.model)
    if source.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the rows use {source.vocab_size} token ids, but {config.model} has {model.config.vocab_size}; prepare "
            "the rows with its own tokenizer"
        )
    optimizer, schedule = optimizer_of(model, run.optimizer, run.steps)
    trainer = SequentialTrainer(
        model=model,
        args=arguments(run, rows, config.out),
        train_dataset=Rows(source, run.steps * run.batch_size),
        optimizers=(optimizer, schedule),
    )
    trainer.train(resume_from_checkpoint=config.resume or None)
    folder = Path(config.out) / "model"
    trainer.save_model(str(folder))
    ranks.on_main(lambda: AutoTokenizer.from_pretrained(config.model).save_pretrained(folder))


def load_dense(path: str) -> Any:
    """Return the model for training, without a cache: with one, transformers ignores the positions of packed rows."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.config.use_cache = False
    return model


def arguments(config: RunConfig, rows: int, out: str) -> TrainingArguments:
    """Return the TrainingArguments of the recipe; every rank takes `rows` rows of a micro-step."""
    device = choose_device(config.runtime.device)
    return TrainingArguments(
        output_dir=out,
        max_steps=config.steps,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=config.micro_steps,
        max_grad_norm=config.optimizer.gradient_clip,
        bf16=choose_dtype(config.runtime.dtype, device) == torch.bfloat16,
        use_cpu=device.type == "cpu",
        gradient_checkpointing=config.runtime.activation_checkpointing != "none",
        logging_steps=config.log_every,
        save_steps=config.checkpoint.every,
        seed=config.seed,
        report_to=[],
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
    )


def optimizer_of(model: nn.Module, config: OptimizerConfig, steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """Return the optimizer and the schedule of the recurrent recipe."""
    optimizer = build_optimizer(model, config)
    return optimizer, LambdaLR(optimizer, lambda step: learning_rate(config, step, steps) / config.lr)
