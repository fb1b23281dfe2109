"""The training loop: training steps, validation, logging, checkpoints, rewinds and signals."""

import dataclasses
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recurrent_depth.data.batch import Batch
from recurrent_depth.data.loader import open_source
from recurrent_depth.devices import choose_dtype
from recurrent_depth.model.loss import valid_targets
from recurrent_depth.model.recurrence import random_state, sample_depth
from recurrent_depth.training.checkpoint import (
    CheckpointWriter,
    extension_refusal,
    load_state,
    read_resume_details,
    training_state,
    trajectory,
    verify_all,
)
from recurrent_depth.training.config import RunConfig
from recurrent_depth.training.distillation import Teacher
from recurrent_depth.training.exporting import Exporter
from recurrent_depth.training.faults import flattened
from recurrent_depth.training.health import HealthMonitor, validate
from recurrent_depth.training.logging import Deadline, RunLog
from recurrent_depth.training.objective import gradient_steps, micro_step_flops, objective_of
from recurrent_depth.training.optimizer import build_optimizer, clip_gradients, learning_rate, ramped, set_learning_rate
from recurrent_depth.training.parallel import Ranks, build_model, set_last_micro_step
from recurrent_depth.training.profiling import profiled
from recurrent_depth.training.progress import Speed, peak_of_ranks, status_line
from recurrent_depth.training.rewind import Rewind, SpikeGuard
from recurrent_depth.training.trackers import choose_trackers, open_tracker


class Trainer:
    """A run in progress. A training step is a function of (configuration, step), the weights and the moments.

    Attributes:
        step: training steps done.
        stop_requested: this process was asked to stop. Reduced over the ranks before any of them acts on it.
        stopping: the ranks have agreed to stop after the current training step.
    """

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.rows = config.rows_per_rank(ranks.world_size)
        self.train_source = open_source(config.data, "train", config.seed, config.steps)
        self.validation_source = open_source(config.data, "validation", config.seed, config.steps)
        self._check_data()
        self.fingerprint = self.train_source.fingerprint()
        self.model = build_model(config.model, config.runtime, ranks, config.seed)
        if config.trainable != "all":
            self.model.requires_grad_(False).transformer.get_submodule(config.trainable).requires_grad_(True)
        elif self.model.transformer.gate is not None:  # without a gradient it would have no moments to save
            self.model.transformer.gate.requires_grad_(config.objective.trains_gate)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.teacher = self._teacher()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.health = HealthMonitor(config.health)
        self.run = Path(config.out)
        self.exporter = Exporter(config, self._say)
        self.writer = CheckpointWriter(self.run, config.checkpoint, ranks, self.exporter.export)
        self.spikes = SpikeGuard(config.spikes, self.run)
        self.deadline = Deadline(config.max_hours, config.slurm_margin_minutes)
        self.step = 0
        self.log: RunLog | None = None
        self.stop_requested = False
        self.stopping = False

    def _teacher(self) -> Teacher | None:
        config, device = self.config, self.ranks.device
        if config.distillation is None:
            return None
        return Teacher(config.distillation, config.model.vocab_size, device, choose_dtype(config.runtime.dtype, device))

    def _check_data(self) -> None:
        model = self.config.model
        for source in (self.train_source, self.validation_source):
            if source.vocab_size > model.vocab_size:
                raise ValueError(
                    f"the data use {source.vocab_size} token ids, but model.vocab_size is {model.vocab_size}; "
                    "raise model.vocab_size or prepare the data with a smaller tokenizer"
                )
            if source.sequence_length > model.block_size:
                raise ValueError(
                    f"rows of {source.sequence_length} tokens exceed model.block_size {model.block_size}; "
                    "raise model.block_size or prepare shorter rows"
                )
        rows, held_out = self.config.validation.rows, self.validation_source
        if held_out.rows_per_epoch is not None and rows > held_out.rows_per_epoch:
            raise ValueError(
                f"validation.rows is {rows}, but {held_out.name} holds {held_out.rows_per_epoch} validation rows; "
                "lower validation.rows, or prepare more of them"
            )

    # -- one training step ------------------------------------------------------------------------------------------

    def train_step(self) -> dict[str, float]:
        """Run forward, backward and update of training step `self.step`; return its metrics, equal on every rank."""
        config = self.config
        lr = learning_rate(config.optimizer, self.step, config.steps)
        set_learning_rate(self.optimizer, lr)
        model = ramped(config.model, config.depth_ramp, self.step)
        began = time.perf_counter()
        batches = [self._batch(micro) for micro in range(config.micro_steps)]
        data_seconds = time.perf_counter() - began
        count = self.ranks.all_reduce(torch.stack([valid_targets(b.targets) for b in batches]).sum().float())
        loss = torch.zeros((), device=self.ranks.device)
        depths = []
        for micro, batch in enumerate(batches):
            set_last_micro_step(self.model, micro == config.micro_steps - 1)
            depth = sample_depth(model, seed=config.seed, step=self.data_step, micro_step=micro)
            # Data parallelism averages gradients over ranks, but this loss is already divided by the global count.
            micro_loss = self._loss(batch, micro, depth) / count.clamp(min=1)
            (micro_loss * self.ranks.world_size).backward()
            loss += micro_loss.detach().float()
            depths.append(depth)
        norm = clip_gradients(self.parameters, config.optimizer.gradient_clip)
        loss_value, norm_value, finite = self._agree(loss, norm)
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.health.skipped(self.step, not finite)
        tokens_in_row = batches[0].input_ids.shape[1]
        return {
            "loss": loss_value,
            "gradient_norm": norm_value,
            "lr": lr,
            "num_steps": sum(n + k for n, k in depths) / len(depths),
            "tokens": float(sum(b.input_ids.numel() for b in batches) * self.ranks.world_size),
            "flops": self._flops(tokens_in_row, depths, executed=True),
            "useful_flops": self._flops(tokens_in_row, depths, executed=False),
            "data_seconds": data_seconds,
            "skipped": float(not finite),
        }

    def _loss(self, batch: Batch, micro: int, depth: tuple[int, int]) -> Tensor:
        """Return the loss of a micro-step, summed over its valid targets."""
        output = self.model(
            batch.input_ids,
            targets=batch.targets if self.teacher is None else None,
            num_steps=gradient_steps(self.config, depth),
            input_states=self._initial_states(batch, micro),
            document_ids=batch.document_ids,
            position_ids=batch.position_ids,
            loss_chunk_size=self.config.runtime.loss_chunk_size,
            objective=objective_of(self.config, self.data_step, micro),
        )
        return output.loss if self.teacher is None else self.teacher.loss(output.logits, batch)

    def _flops(self, tokens_in_row: int, depths: list[tuple[int, int]], executed: bool) -> float:
        """Return the FLOPs of one training step over all ranks."""
        row = sum(micro_step_flops(self.config, tokens_in_row, depth, executed=executed) for depth in depths)
        return float(row * self.config.batch_size // self.config.micro_steps)

    def _batch(self, micro: int) -> Batch:
        config, ranks = self.config, self.ranks
        first_row = self.data_step * config.batch_size + self._row_in_step(micro)
        batch = self.train_source.batch(first_row, self.rows, self.step)
        largest = int(batch.input_ids.max())  # host: the batch is still there
        if largest >= config.model.vocab_size:
            raise ValueError(
                f"rows {first_row} to {first_row + self.rows - 1} hold token id {largest}, but "
                f"model.vocab_size is {config.model.vocab_size}; prepare the data with the tokenizer of the model"
            )
        return batch.to(ranks.device)

    @property
    def data_step(self) -> int:
        """The number that data, depths and noise of this step are functions of: the step plus skipped steps."""
        return self.spikes.data_step(self.step)

    def _row_in_step(self, micro: int) -> int:
        return (micro * self.ranks.world_size + self.ranks.rank) * self.rows

    def _initial_states(self, batch: Batch, micro: int) -> Tensor | None:
        """Return truncated normal noise, a function of (seed, data step, row in the step, position, channel)."""
        model = self.config.model
        if model.state_init == "zero":
            return None
        B, T = batch.input_ids.shape
        device = self.ranks.device
        rows = torch.arange(B, device=device) + self._row_in_step(micro)
        positions = torch.arange(T, device=device)[None]
        ops = self.model.transformer.core_block.ops
        return random_state(model, rows, positions, seed=self.config.seed, step=self.data_step, ops=ops)

    def _agree(self, loss: Tensor, norm: Tensor) -> tuple[float, float, bool]:
        """Return the loss over all ranks, the gradient norm, and whether both are finite on every rank.

        All decisions that the ranks must share are made here, from reduced values: to skip the update, to stop after
        this training step, and to end the run because a background save failed on some rank. One collective, one host
        synchronisation.
        """
        requests = (self.stop_requested or self.deadline.passed(), self.writer.error is not None)
        flags = [loss.new_full((), float(request)) for request in requests]
        numbers = torch.stack([loss, *flags, (~torch.isfinite(norm)).to(loss.dtype)])
        self.ranks.all_reduce(numbers)
        # host: it decides about the update; the only read of a training step
        loss_value, stops, failed, bad_norms, norm_value = torch.cat([numbers, norm.float()[None]]).tolist()
        if failed:
            self.writer.wait()
        self.stopping |= stops > 0
        return loss_value, norm_value, math.isfinite(loss_value) and not bad_norms

    # -- the run ----------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train until the last training step or until asked to stop; the state is saved in either case."""
        config = self.config
        with self._signals(), self._logging(), self._profiled() as after_step:
            if self.step >= config.steps:
                self._say(self._finished_line())
                return
            self._say(self._start_line())
            saved_step = self.step
            speed = Speed(self.ranks.device, peak_of_ranks(config.runtime, self.ranks))
            while self.step < config.steps and not self.stopping:
                began = time.perf_counter()
                record = self.train_step()
                speed.add(time.perf_counter() - began, record)
                after_step()
                if not record["skipped"] and self.spikes.is_spike(record["loss"]):
                    self._rewind(record["loss"])
                    saved_step = self.step
                    continue
                last = self.step == config.steps
                if self.step % config.log_every == 0 or last or record["skipped"]:
                    self._report(record | speed.take(config.steps - self.step))
                if self.step % config.validation.every == 0 or last:
                    self._validate()
                if self.step % config.checkpoint.every == 0 or last:
                    self.save()
                    saved_step = self.step
            if self.stopping:
                self.exporter.cancel()
            if saved_step != self.step:
                self.save()
            self.writer.wait()
            if self.stopping and self.step < config.steps:
                self._say(f"saved and stopped at step {self.step} of {config.steps}; continue with --resume true")

    def _finished_line(self) -> str:
        config = self.config
        refusal = extension_refusal(dataclasses.replace(config, steps=config.steps + 1), self.step, config.steps)
        more = (
            "raise --steps to train on"
            if refusal is None
            else (f"it cannot be continued with more steps, since {refusal[0]}; {refusal[1]}")
        )
        return f"{self.run} is finished: step {self.step} of {config.steps}; {more}"

    def _start_line(self) -> str:
        config, ranks, source = self.config, self.ranks, self.train_source
        devices = f"{ranks.world_size} x {ranks.device.type}" if ranks.world_size > 1 else str(ranks.device)
        return (
            f"{'continuing' if self.step else 'training'} {self.model.num_parameters:,} parameters on {source.name}, "
            f"{config.batch_size} rows of up to {source.sequence_length} tokens per step, {devices} "
            f"({str(choose_dtype(config.runtime.dtype, ranks.device)).removeprefix('torch.')}), "
            f"steps {self.step} to {config.steps}, out {self.run}"
        )

    def _rewind(self, loss: float) -> None:
        """Go back to a checkpoint from before the spike and skip the data since then."""
        self.writer.wait()
        spike = self.step - 1
        checkpoint, rewind, details = self.ranks.on_main(lambda: self._prepare_rewind(spike, loss))
        self.spikes.rewinds.append(rewind)
        self.resume(checkpoint, details)
        if self.log is not None:
            self.log.rewind(self.step, {"type": "rewind", **asdict(rewind)})
        self._say(
            f"spike at step {spike}: loss {loss:.4f}, median before {rewind.median:.4f}; back to step {self.step}, "
            f"skipping the data of {rewind.skipped} steps",
            warning=True,
        )

    def _prepare_rewind(self, spike: int, loss: float) -> tuple[Path, Rewind, dict[str, Any]]:
        checkpoint, rewind = self.spikes.prepare_rewind(spike, loss)
        details = read_resume_details(checkpoint)
        verify_all(checkpoint, details)
        return checkpoint, rewind, details

    def _report(self, record: dict[str, float]) -> None:
        if self.log is None:
            return
        self.log.write(self.step, {"type": "train", **record})
        self.log.show(self.step, self.config.steps, status_line(record))

    def _validate(self) -> None:
        metrics = validate(self.model, self.validation_source, self.config.validation, self.rows, self.ranks)
        warmed_up = self.step > self.config.optimizer.warmup_steps
        warnings = self.health.check(self.step, metrics, warmed_up=warmed_up)
        if self.log is not None:
            self.log.write(self.step, {"type": "validation", **metrics, "warnings": warnings})
            depths = "  ".join(f"r={key[5:]} {metrics[key]:.4f}" for key in metrics if key[5:].isdigit())
            self._say(f"step {self.step} validation loss  {depths}")
            for warning in warnings:
                self._say(f"warning: {warning}", warning=True)

    def _say(self, text: str, warning: bool = False) -> None:
        if self.log is not None:
            self.log.say(text, warning)

    def save(self) -> None:
        """Start to write a checkpoint of the current step; `writer.wait()` returns when it is on disk."""
        details = {
            "model": asdict(self.config.model),
            "steps": self.config.steps,
            "trajectory": trajectory(self.config),
            "data": self.fingerprint,
            "last_losses": list(self.spikes.losses),
            "health": dict(self.health.counts),
            "world_size": self.ranks.world_size,
            "torch": torch.__version__,
        }
        self.writer.save(self.step, training_state(self.model, self.optimizer), details)

    def resume(self, checkpoint: Path, details: dict[str, Any]) -> None:
        """Continue from a verified checkpoint and the content of its checkpoint.json."""
        load_state(checkpoint, details, self.model, self.optimizer)
        self.step = details["step"]
        self.spikes.restore(details["last_losses"])
        self.health.counts = dict(details["health"])

    @contextmanager
    def _logging(self) -> Iterator[None]:
        """Open the log on the main rank; at the end wait for the current save and close the log."""
        self.ranks.on_main(self._open_log)
        try:
            yield
        finally:
            self.writer.finish()
            if self.log is not None:
                self.log.close()

    def _open_log(self) -> None:
        config = self.config
        options = flattened(json.loads(json.dumps(asdict(config))))
        trackers = [open_tracker(name, self.run, options) for name in choose_trackers(config.trackers)]
        self.log = RunLog(self.run, self.step, config.steps, trackers)

    def _profiled(self) -> AbstractContextManager[Callable[[], None]]:
        if self.log is None or not self.config.profile:
            return nullcontext(lambda: None)
        return profiled(self.run, self.step, self._say)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Make SIGTERM, SIGUSR1 and Ctrl-C save and end the run after the current training step.

        A second Ctrl-C ends it at once, but not under torchrun, which sends each rank a SIGINT after the terminal's.
        """

        def request_stop(number: int, frame: Any) -> None:
            if self.stop_requested and number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:
                raise KeyboardInterrupt
            self.stop_requested = True
            self.exporter.cancel()  # a save may be waiting for it

        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        previous = {number: signal.signal(number, request_stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
