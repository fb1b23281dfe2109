"""The training loop: one readable step, the rest around it."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recurrent_depth.data.batch import Batch
from recurrent_depth.data.loader import open_source
from recurrent_depth.model.flops import training_flops
from recurrent_depth.model.loss import valid_targets
from recurrent_depth.model.recurrence import random_state, sample_depth
from recurrent_depth.training.checkpoint import load_checkpoint, training_state
from recurrent_depth.training.config import RunConfig
from recurrent_depth.training.deadline import Deadline
from recurrent_depth.training.health import HealthMonitor
from recurrent_depth.training.logging import RunLog
from recurrent_depth.training.optimizer import build_optimizer, clip_gradients, set_learning_rate
from recurrent_depth.training.parallel import Ranks, build_model, set_last_micro_step
from recurrent_depth.training.rewind import SpikeGuard
from recurrent_depth.training.saving import CheckpointWriter
from recurrent_depth.training.schedule import learning_rate, ramped
from recurrent_depth.training.validation import validate


class Trainer:
    """A run in progress. Everything that a step needs is a function of (configuration, step) and the weights."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.rows = config.rows_per_rank(ranks.world_size)
        self.train_source = open_source(config.data, "train", config.seed, config.steps)
        self.validation_source = open_source(config.data, "validation", config.seed, config.steps)
        self._check_data()
        self.model = build_model(config.model, config.runtime, ranks, config.seed)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.health = HealthMonitor(config.health)
        self.run = Path(config.out)
        self.writer = CheckpointWriter(self.run, config.checkpoint, ranks)
        self.spikes = SpikeGuard(config.spikes, self.run)
        self.deadline = Deadline(config.max_hours, config.slurm_margin_minutes)
        self.step = 0
        self.log: RunLog | None = None
        self.stop_requested = False

    def _check_data(self) -> None:
        model, source = self.config.model, self.train_source
        if source.vocab_size > model.vocab_size:
            raise ValueError(
                f"the data use {source.vocab_size} token ids, model.vocab_size is {model.vocab_size}; "
                "raise model.vocab_size or prepare the data with a smaller tokenizer"
            )
        if source.sequence_length > model.block_size:
            raise ValueError(
                f"rows of {source.sequence_length} tokens exceed model.block_size {model.block_size}; "
                "raise model.block_size or prepare shorter rows"
            )

    # -- one step ---------------------------------------------------------------------------------------------------

    def train_step(self) -> dict[str, float]:
        """Forward, backward and update for step `self.step`; every rank returns the same numbers."""
        config = self.config
        lr = learning_rate(config.optimizer, self.step, config.steps)
        set_learning_rate(self.optimizer, lr)
        model = ramped(config.model, config.depth_ramp, self.step)
        batches = [self._batch(micro) for micro in range(config.micro_steps)]
        count = self.ranks.all_reduce(sum((valid_targets(b.targets) for b in batches), torch.tensor(0)).float())
        loss = torch.zeros((), device=self.ranks.device)
        depths = []
        for micro, batch in enumerate(batches):
            set_last_micro_step(self.model, micro == config.micro_steps - 1)
            depth = sample_depth(model, seed=config.seed, step=self.draw, micro_step=micro)
            # The data-parallel average divides by the number of ranks; the sum over all valid targets must not.
            micro_loss = self._loss(batch, depth, micro) / count.clamp(min=1)
            (micro_loss * self.ranks.world_size).backward()
            loss += micro_loss.detach().float()
            depths.append(depth)
        norm = clip_gradients(self.parameters, config.optimizer.gradient_clip)
        loss_value, norm_value, stop = self._agree(loss, norm)
        finite = math.isfinite(loss_value) and math.isfinite(norm_value)
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.stop_requested |= stop
        self.health.skipped(self.step, not finite)
        return {
            "loss": loss_value,
            "gradient_norm": norm_value,
            "lr": lr,
            "num_steps": sum(n + k for n, k in depths) / len(depths),
            "tokens": float(sum(b.input_ids.numel() for b in batches) * self.ranks.world_size),
            "flops": float(self._executed_flops(batches[0].input_ids.shape[1], depths)),
            "skipped": float(not finite),
        }

    def _executed_flops(self, tokens_in_row: int, depths: list[tuple[int, int]]) -> int:
        """Of one optimizer step over all ranks, recomputation included."""
        recompute = self.config.runtime.activation_checkpointing
        row = sum(training_flops(self.config.model, tokens_in_row, n, k, recompute) for n, k in depths)
        return row * self.config.batch_size // self.config.micro_steps

    def _batch(self, micro: int) -> Batch:
        config, ranks = self.config, self.ranks
        first_row = self.draw * config.batch_size + self._row_in_step(micro)
        batch = self.train_source.batch(first_row, self.rows, self.step)
        if int(batch.input_ids.max()) >= config.model.vocab_size:
            raise ValueError(
                f"row(s) {first_row} to {first_row + self.rows - 1} hold token id {int(batch.input_ids.max())}, "
                f"model.vocab_size is {config.model.vocab_size}; were the data made with another tokenizer?"
            )
        return batch.to(ranks.device)

    @property
    def draw(self) -> int:
        """What names the data, depths and noise of this step: the step, moved on by what rewinds left out."""
        return self.spikes.draw(self.step)

    def _row_in_step(self, micro: int) -> int:
        return (micro * self.ranks.world_size + self.ranks.rank) * self.rows

    def _loss(self, batch: Batch, depth: tuple[int, int], micro: int) -> Tensor:
        """Sum of the loss over this rank's rows of one micro-step."""
        output = self.model(
            batch.input_ids,
            targets=batch.targets,
            num_steps=depth,
            input_states=self._initial_states(batch, micro),
            document_ids=batch.document_ids,
            position_ids=batch.position_ids,
            loss_chunk_size=self.config.runtime.loss_chunk_size,
        )
        return output.loss

    def _initial_states(self, batch: Batch, micro: int) -> Tensor | None:
        """Truncated normal noise named by (seed, step, row in the step, position, channel), whatever the ranks."""
        model = self.config.model
        if model.state_init == "zero":
            return None
        B, T = batch.input_ids.shape
        device = self.ranks.device
        rows = torch.arange(B, device=device) + self._row_in_step(micro)
        positions = torch.arange(T, device=device)[None]
        ops = self.model.transformer.core_block.ops
        return random_state(model, rows, positions, seed=self.config.seed, step=self.draw, ops=ops)

    def _agree(self, loss: Tensor, norm: Tensor) -> tuple[float, float, bool]:
        """Loss over all ranks, gradient norm, and whether any rank was asked to stop: one collective, one sync.

        A background save that failed on any rank ends the run on all of them, here.
        """
        stop = float(self.stop_requested or self.deadline.passed())
        numbers = torch.stack([loss, *torch.tensor([stop, float(self.writer.error is not None)]).to(loss.device)])
        self.ranks.all_reduce(numbers)
        loss_value, stops, failed, norm_value = torch.cat([numbers, norm.float()[None]]).tolist()
        if failed:
            self.writer.wait()
        return loss_value, norm_value, stops > 0

    # -- the run ----------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train to the last step, or until asked to stop; the state is saved in either case."""
        self.log = RunLog(self.run, self.step, self.config.steps) if self.ranks.is_main else None
        try:
            with self._signals():
                self._loop()
        finally:
            self.writer.finish()
            if self.log is not None:
                self.log.close()

    def _loop(self) -> None:
        config = self.config
        saved_step = self.step
        window = Window()
        while self.step < config.steps and not self.stop_requested:
            began = time.perf_counter()
            record = self.train_step()
            window.add(time.perf_counter() - began, record)
            if not record["skipped"] and self.spikes.is_spike(record["loss"]):
                self._rewind(record["loss"])
                saved_step = self.step
                continue
            last = self.step == config.steps
            if self.step % config.log_every == 0 or last or record["skipped"]:
                self._report(record | window.take())
            if self.step % config.validation.every == 0 or last:
                self._validate()
            if self.step % config.checkpoint.every == 0 or last:
                self.save()
                saved_step = self.step
        if saved_step != self.step:
            self.save()
        self.writer.wait()
        if self.stop_requested and self.step < config.steps:
            self._say(f"stopped at step {self.step} of {config.steps}; continue with --resume true")

    def _rewind(self, loss: float) -> None:
        """Go back to a checkpoint from before the spike; the data since then are left out."""
        self.writer.wait()
        spike = self.step - 1
        checkpoint = self.spikes.target(spike)
        rewind = self.spikes.record(spike, loss, checkpoint, write=self.ranks.is_main)
        self.ranks.barrier()
        self.resume(checkpoint)
        if self.log is not None:
            self.log.rewind(self.step, {"type": "rewind", **asdict(rewind)})
        self._say(
            f"[bold yellow]spike[/] at step {spike}: loss {loss:.4f}, median before {rewind.median:.4f}; back to step "
            f"{self.step}, leaving out the data of {rewind.skipped} steps"
        )

    def _report(self, record: dict[str, float]) -> None:
        if self.log is None:
            return
        self.log.write(self.step, {"type": "train", **record})
        text = f"loss {record['loss']:.4f}  depth {record['num_steps']:.0f}  {record['tokens_per_second']:,.0f} tok/s"
        self.log.show(self.step, self.config.steps, text)

    def _validate(self) -> None:
        metrics = validate(self.model, self.validation_source, self.config.validation, self.rows, self.ranks)
        warmed_up = self.step > self.config.optimizer.warmup_steps
        warnings = self.health.check(self.step, metrics, warmed_up=warmed_up)
        if self.log is not None:
            self.log.write(self.step, {"type": "validation", **metrics, "warnings": warnings})
            depths = "  ".join(f"r={key[5:]} {metrics[key]:.4f}" for key in metrics if key[5:].isdigit())
            self._say(f"step {self.step} validation loss  {depths}")
            for warning in warnings:
                self._say(f"[bold yellow]warning[/] {warning}")

    def _say(self, text: str) -> None:
        if self.log is not None:
            self.log.say(text)

    def save(self) -> None:
        """Begin to write a checkpoint of the current step; `writer.wait()` until it is on disk."""
        details = {
            "model": asdict(self.config.model),
            "trajectory": self.config.trajectory(),
            "data": self.train_source.fingerprint(),
            "last_losses": list(self.spikes.losses),
            "world_size": self.ranks.world_size,
            "torch": torch.__version__,
        }
        self.writer.save(self.step, training_state(self.model, self.optimizer), details)

    def resume(self, checkpoint: Path) -> None:
        """Continue from a checkpoint."""
        details = load_checkpoint(checkpoint, self.model, self.optimizer, self.ranks)
        self.step = details["step"]
        self.spikes.restore(details["last_losses"])

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM, SIGUSR1 and Ctrl-C end the run after the current step and save; a second Ctrl-C ends it at once."""

        def request_stop(number: int, frame: Any) -> None:
            if self.stop_requested and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stop_requested = True

        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        previous = {number: signal.signal(number, request_stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class Window:
    """Time, tokens and FLOPs of the training steps since the last report; validation and saving do not count."""

    def __init__(self) -> None:
        self.sums = {"seconds": 0.0, "tokens": 0.0, "flops": 0.0}

    def add(self, seconds: float, record: dict[str, float]) -> None:
        """Count one step."""
        self.sums["seconds"] += seconds
        for name in ("tokens", "flops"):
            self.sums[name] += record[name]

    def take(self) -> dict[str, float]:
        """The sums and their rates; counting starts anew."""
        sums, self.sums = self.sums, dict.fromkeys(self.sums, 0.0)
        seconds = max(sums["seconds"], 1e-9)
        rates = {"tokens_per_second": sums["tokens"] / seconds, "flops_per_second": sums["flops"] / seconds}
        return sums | rates
