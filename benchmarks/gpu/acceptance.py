"""Stage `acceptance`: what the tests show on a CPU holds on the device. Each check returns its number and its limit."""

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.stage import Stage, synchronize
from recurrent_depth.data.config import DataConfig, TaskDataConfig
from recurrent_depth.generation.config import Captured, Mode, Speculation, Wavefront
from recurrent_depth.generation.engine import Decoder
from recurrent_depth.generation.exits import StateChange
from recurrent_depth.generation.request import Decoding
from recurrent_depth.hf.loading import wrap
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.ops import choose_ops, use_ops
from recurrent_depth.model.random import uniform
from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.planning.pretraining import Job, memory
from recurrent_depth.runs import checkpoints, load_run_model
from recurrent_depth.training.config import (
    CheckpointConfig,
    OptimizerConfig,
    RunConfig,
    RuntimeConfig,
    ValidationConfig,
)
from recurrent_depth.training.launch import train
from recurrent_depth.training.optimizer import build_optimizer
from recurrent_depth.training.parallel import blocks, build_model, start_processes
from recurrent_depth.training.trainer import Trainer

GOLDEN = Path(__file__).parents[2] / "tests" / "fixtures" / "golden_losses.json"
SHAPE = ModelConfig(
    n_embd=192, n_heads=2, intermediate_size=256, n_layers_in_prelude=1, n_layers_in_recurrent_block=2,
    n_layers_in_coda=1, vocab_size=512, block_size=256,
)  # fmt: skip
"""Head size 96, as in the 3.5B model."""
PROMPTS = [[5, 6, 7], [11], [3, 1, 4, 1, 5, 9, 2, 6]]


def run(stage: Stage) -> None:
    for check in CHECKS:
        stage.measure(check.__name__.replace("_", " "), check, stage)


def limited(error: float, limit: float) -> dict[str, float]:
    """Return an error and its limit.

    Raises:
        AssertionError: if the error is above the limit, or not a number.
    """
    assert error <= limit, f"error {error:.3e}, limit {limit:.1e}"
    return {"error": error, "limit": limit}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return ‖actual - expected‖ / ‖expected‖ in fp64."""
    a, e = actual.double().cpu(), expected.double().cpu()
    return ((a - e).norm() / e.norm()).item()


def random_model(stage: Stage, kernels: str | None = None, scale: float = 1.0) -> RecurrentDepthModel:
    """Return a random model in fp32; larger weights make its tokens differ."""
    model = RecurrentDepthModel(SHAPE)
    model.initialise(seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    model = model.to(stage.device).eval()
    use_ops(model, choose_ops(kernels or fused(stage), stage.device))
    return model


def fused(stage: Stage) -> str:
    """Return the kernels under test; a CPU has none but torch's operations."""
    return "torch" if stage.toy else "triton"


def random_ids(stage: Stage, rows: int = 2, tokens: int = 128) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, SHAPE.vocab_size, (rows, tokens), generator=generator).to(stage.device)


def loss_and_gradients(model: RecurrentDepthModel, ids: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the loss, and all gradients in one vector."""
    model.zero_grad()
    loss = model(ids, labels=ids, **{"num_steps": (2, 3), **options}).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


# Training


def golden_run(name: str, stage: Stage, dtype: str, kernels: str) -> RunConfig:
    """Return the run whose losses on a CPU are in tests/fixtures/golden_losses.json."""
    return RunConfig(
        out="unused",
        data=DataConfig(task=TaskDataConfig(name="shell_game", min_length=2, max_length=8)),
        model=ModelConfig(
            n_embd=32, n_heads=2, intermediate_size=64, vocab_size=64, block_size=32, mean_recurrence=4,
            mean_backprop_depth=2,
        ),
        steps=20, batch_size=8, micro_steps=2, log_every=1,
        optimizer=OptimizerConfig(name=name, lr=2e-3, warmup_steps=3, cooldown_steps=3),
        runtime=RuntimeConfig(device=stage.device.type, dtype=dtype, kernels=kernels, threads=1),
        checkpoint=CheckpointConfig(every=4),
        validation=ValidationConfig(every=6, rows=8, num_steps=(1, 4)),
    )  # fmt: skip


def golden_error(stage: Stage, dtype: str) -> float:
    """Return the largest relative difference of twenty losses to those of the CPU, over optimizers and kernels."""
    golden, worst = json.loads(GOLDEN.read_text()), 0.0
    for kernels in dict.fromkeys(("torch", fused(stage))):
        for name in ("huginn", "adamw"):
            config = golden_run(name, stage, dtype, kernels)
            trainer = Trainer(config, start_processes(config.runtime))
            losses = [trainer.train_step()["loss"] for _ in range(config.steps)]
            worst = max(worst, *(abs(a / b - 1) for a, b in zip(losses, golden[name], strict=True)))
            leave_process_group()
    return worst


def leave_process_group() -> None:
    """End the process group of one rank that training in bfloat16 starts."""
    if dist.is_initialized():
        dist.destroy_process_group()


def golden_losses_in_fp32(stage: Stage) -> dict[str, float]:
    return limited(golden_error(stage, "float32"), 1e-4)


def golden_losses_in_bf16(stage: Stage) -> dict[str, float]:
    return limited(golden_error(stage, "bfloat16"), 0.02)


def kernels_equal_torch(stage: Stage) -> dict[str, float]:
    ids = random_ids(stage)
    plain, kernels = (loss_and_gradients(random_model(stage, name), ids) for name in ("torch", fused(stage)))
    return limited(max(relative_error(*pair) for pair in zip(kernels, plain, strict=True)), 1e-4)


def packed_documents_equal_separate_ones(stage: Stage) -> dict[str, float]:
    """Compare losses and gradients of packed rows (flex attention on a GPU) with a dense mask of the same documents."""
    model, ids = random_model(stage), random_ids(stage)
    documents = (torch.arange(ids.shape[1], device=stage.device) // 37)[None].expand_as(ids).contiguous()
    positions = torch.arange(ids.shape[1], device=stage.device)
    seen = (positions[:, None] >= positions[None, :]) & (documents[0][:, None] == documents[0][None, :])
    packed = loss_and_gradients(model, ids, document_ids=documents)
    dense = _with_mask(model, ids, seen)
    return limited(max(relative_error(*pair) for pair in zip(packed, dense, strict=True)), 1e-4)


def _with_mask(model: RecurrentDepthModel, ids: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Return loss and gradients with a dense mask [T, T] in place of any other attention."""
    original = F.scaled_dot_product_attention

    def masked(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return original(q, k, v, attn_mask=seen)

    F.scaled_dot_product_attention = masked  # type: ignore[assignment]
    try:
        return loss_and_gradients(model, ids)
    finally:
        F.scaled_dot_product_attention = original


def local_part(weight: Tensor) -> Tensor:
    """Return the part of a sharded weight that this rank holds."""
    return weight.detach().to_local()  # type: ignore[attr-defined]


def one_rank_trains_bf16_with_fp32_weights(stage: Stage) -> dict[str, Any]:
    """Check dtypes inside a block and of the weights, and that a training step changes weights in fp32."""
    runtime = RuntimeConfig(device=stage.device.type, dtype="bfloat16", kernels=fused(stage))
    model = build_model(SHAPE, runtime, start_processes(runtime), seed=0)
    seen: list[torch.dtype] = []

    def note(block: nn.Module, arguments: tuple[Any, ...]) -> None:
        x, (cos, _), *_ = arguments
        seen.extend([x.dtype, next(p for p in block.parameters() if p.ndim > 1).dtype, cos.dtype])

    handle = model.transformer.core_block[0].register_forward_pre_hook(note)
    optimizer = build_optimizer(model, OptimizerConfig(name="huginn", lr=1e-3))
    ids = random_ids(stage)
    before = [local_part(p).clone() for p in model.parameters()]
    loss = model(ids, targets=ids, num_steps=(1, 2)).loss
    loss.backward()
    optimizer.step()
    handle.remove()
    assert set(seen[0::3]) == set(seen[1::3]) == {torch.bfloat16}, seen
    assert set(seen[2::3]) == {torch.float32}, seen
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert loss.dtype == torch.float32
    moved = min((local_part(p) - b).abs().max().item() for p, b in zip(model.parameters(), before, strict=True))
    assert moved > 0, "a weight did not change"
    leave_process_group()
    return {"loss": loss.item(), "smallest_change": moved}


def compiled_equals_eager(stage: Stage) -> dict[str, float]:
    """Compare compiled blocks with eager ones at several depths, and count graphs: two per kind of block at most."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    eager, compiled = random_model(stage), random_model(stage)
    for block in blocks(compiled):
        block.compile(backend="aot_eager" if stage.toy else "inductor")
    ids, worst = random_ids(stage), 0.0
    for depth in [(0, 1), (3, 2), (1, 4)]:
        pairs = zip(*(loss_and_gradients(m, ids, num_steps=depth) for m in (compiled, eager)), strict=True)
        worst = max(worst, *(relative_error(*pair) for pair in pairs))
    graphs = counters["stats"]["unique_graphs"]
    assert graphs <= 4, f"{graphs} graphs, at most 4"
    return limited(worst, 1e-4) | {"graphs": graphs}


def recomputed_equals_kept(stage: Stage) -> dict[str, float]:
    model, ids = random_model(stage), random_ids(stage)
    found = []
    for name in ("none", "step", "block"):
        model.transformer.core_block.activation_checkpointing = name
        found.append(loss_and_gradients(model, ids)[1])
    return limited(max(relative_error(other, found[0]) for other in found[1:]), 1e-6)


def random_bits_equal_the_cpu(stage: Stage) -> dict[str, float]:
    rows, positions = torch.tensor([0, 7]), torch.arange(50)[None]
    bits = [uniform(rows.to(d), positions.to(d), 96, seed=5, step=9).cpu() for d in ("cpu", stage.device)]
    return limited(float((bits[0] != bits[1]).sum()), 0)


def resume_is_bitwise(stage: Stage) -> dict[str, Any]:
    """Compare the weights of 8 training steps with those of 4, a new start from the checkpoint, and 4 more."""
    differences = {}
    for dtype in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as folder:
            whole, halves = (_run_of(stage, dtype, f"{folder}/{name}") for name in ("whole", "halves"))
            train(whole)
            _stopped_after(4, lambda halves=halves: train(halves))
            assert len(checkpoints(Path(halves.out))) == 1
            train(halves, resume=True)
            models = [load_run_model(config.out) for config in (whole, halves)]
            pairs = zip(*(m.parameters() for m in models), strict=True)
            differences[dtype] = sum(int((a != b).sum()) for a, b in pairs)
    return limited(sum(differences.values()), 0) | differences


def _run_of(stage: Stage, dtype: str, out: str) -> RunConfig:
    return dataclasses.replace(golden_run("huginn", stage, dtype, fused(stage)), out=out, steps=8)


def _stopped_after(steps: int, action: Callable[[], Any]) -> None:
    """Run a training that is asked to stop after some training steps, as by SIGTERM."""
    original = Trainer.train_step

    def stopping(self: Trainer) -> dict[str, float]:
        self.stop_requested |= self.step + 1 >= steps
        return original(self)

    Trainer.train_step = stopping  # type: ignore[method-assign]
    try:
        action()
    finally:
        Trainer.train_step = original  # type: ignore[method-assign]


def peak_memory_is_as_planned(stage: Stage) -> dict[str, float]:
    """Compare the peak memory of a training step in bfloat16 with that of `recurrent-depth plan`."""
    config = dataclasses.replace(SHAPE, n_embd=1536, n_heads=16, intermediate_size=4096, block_size=1024)
    config = SHAPE if stage.toy else config
    rows, tokens = (2, 64) if stage.toy else (8, 1024)
    runtime = RuntimeConfig(device=stage.device.type, dtype="bfloat16", kernels=fused(stage), loss_chunk_size=2048)
    depth = (4, 4)
    planned = planned_peak(config, runtime, "huginn", rows, tokens, depth)
    if stage.toy:
        return {"planned_bytes": planned}
    model = build_model(config, runtime, start_processes(runtime), seed=0)
    optimizer = build_optimizer(model, OptimizerConfig(name="huginn"))
    ids = torch.randint(0, config.vocab_size, (rows, tokens), device=stage.device)
    for _ in range(2):  # the first step allocates the moments
        torch.cuda.reset_peak_memory_stats()
        model(ids, targets=ids, num_steps=depth, loss_chunk_size=runtime.loss_chunk_size).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    synchronize(stage.device)
    measured = torch.cuda.max_memory_allocated()
    leave_process_group()
    assert 0.8 * planned < measured < 1.05 * planned, f"measured {measured} bytes, planned {planned}"
    return {"planned_bytes": planned, "measured_bytes": measured, "share": measured / planned}


def planned_peak(
    config: ModelConfig, runtime: RuntimeConfig, optimizer: str, rows: int, tokens: int, depth: tuple[int, int]
) -> int:
    """Return the bytes that `recurrent-depth plan` gives for one GPU at a fixed depth."""
    fixed = dataclasses.replace(
        config, sampling_scheme="fixed", mean_recurrence=sum(depth), mean_backprop_depth=depth[1]
    )
    run = RunConfig(
        out="unused", data=DataConfig(task=TaskDataConfig(name="shell_game")), model=fixed, batch_size=rows,
        optimizer=OptimizerConfig(name=optimizer), runtime=runtime,
    )  # fmt: skip
    return sum(memory(Job(run, 1, tokens)).values())


# Decoding


def decode_the_same(
    stage: Stage, options: Decoding, mode: Mode | None, kernels: tuple[str, str] | None = None
) -> dict[str, float]:
    """Count tokens and iterations that differ between plain decoding with torch's operations and another way."""
    plain_kernels, other_kernels = kernels or ("torch", fused(stage))
    plain = Decoder(random_model(stage, plain_kernels, scale=2.5)).generate(PROMPTS, options)
    decoder = Decoder(random_model(stage, other_kernels, scale=2.5), mode)
    others = [decoder.generate(PROMPTS, options) for _ in range(2)]  # the second call uses the first one's graphs
    flat = lambda rows: [value for row in rows for value in row]  # noqa: E731
    values = lambda d: flat(d.tokens) + ([] if isinstance(mode, Speculation) else flat(d.steps))  # noqa: E731
    differing = sum(a != b for other in others for a, b in zip(values(plain), values(other), strict=True))
    if options.exit is not None:
        assert len(set(flat(plain.steps))) > 1, "no exit fired: the comparison shows nothing"
    kinds = len(set(flat(plain.tokens)))
    assert kinds > 3, f"only {kinds} different tokens: the comparison shows nothing"
    return limited(differing, 0) | {"tokens": 2 * len(flat(plain.tokens)), "different_tokens": kinds}


ALL = Decoding(max_new_tokens=24, num_steps=6)
EXITS = dataclasses.replace(ALL, exit=StateChange(0.3))
SHARED = dataclasses.replace(EXITS, cache_budget=2)


def decoding_with_kernels_equals_torch(stage: Stage) -> dict[str, float]:
    return decode_the_same(stage, SHARED, None)


def captured_decoding_equals_plain(stage: Stage) -> dict[str, float]:
    return decode_the_same(stage, ALL, Captured())


def captured_decoding_with_exits_equals_plain(stage: Stage) -> dict[str, float]:
    return decode_the_same(stage, SHARED, Captured())


def captured_decoding_with_torch_operations_equals_plain(stage: Stage) -> dict[str, float]:
    return decode_the_same(stage, EXITS, Captured(), ("torch", "torch"))


def speculation_equals_plain(stage: Stage) -> dict[str, float]:
    return decode_the_same(stage, ALL, Speculation(2, 3))


def wavefront_equals_plain(stage: Stage) -> dict[str, float]:
    return decode_the_same(stage, ALL, Wavefront(2, width=5))


def sampled_tokens_equal_the_cpu(stage: Stage) -> dict[str, float]:
    """Count sampled tokens that differ between the device and the CPU in fp32."""
    options = dataclasses.replace(ALL, temperature=1.0, top_k=40, seed=5)
    model = random_model(stage, "torch", scale=2.5)
    there = Decoder(model).generate(PROMPTS, options).tokens
    here = Decoder(model.cpu()).generate(PROMPTS, options).tokens
    return limited(sum(a != b for x, y in zip(there, here, strict=True) for a, b in zip(x, y, strict=True)), 0)


def static_cache_with_compile_equals_dynamic(stage: Stage) -> dict[str, float]:
    """Compare transformers' generate with a static cache and a compiled forward pass with the dynamic cache."""
    model = wrap(random_model(stage, scale=2.5)).eval()
    ids = random_ids(stage, 2, 7)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "num_steps": 4, "pad_token_id": 0}
    dynamic = model.generate(ids, **options)
    if stage.toy:
        options["disable_compile"] = True  # compiling takes a minute on a CPU
    static = model.generate(ids, cache_implementation="static", **options)
    return limited(float((dynamic != static).sum()), 0)


def left_padded_rows_equal_unpadded(stage: Stage) -> dict[str, float]:
    model = wrap(random_model(stage, scale=2.5)).eval()
    ids = random_ids(stage, 1, 9)
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.long, device=stage.device), ids], dim=1)
    mask = (torch.arange(15, device=stage.device) >= 6).long()[None]
    with torch.no_grad():
        plain = model(ids, num_steps=4).logits
        shifted = model(padded, attention_mask=mask, num_steps=4).logits[:, 6:]
    return limited(relative_error(shifted, plain), 1e-5)


CHECKS = (
    golden_losses_in_fp32,
    kernels_equal_torch,
    captured_decoding_equals_plain,
    captured_decoding_with_exits_equals_plain,
    captured_decoding_with_torch_operations_equals_plain,
    decoding_with_kernels_equals_torch,
    one_rank_trains_bf16_with_fp32_weights,
    golden_losses_in_bf16,
    recomputed_equals_kept,
    random_bits_equal_the_cpu,
    left_padded_rows_equal_unpadded,
    speculation_equals_plain,
    wavefront_equals_plain,
    sampled_tokens_equal_the_cpu,
    resume_is_bitwise,
    peak_memory_is_as_planned,
    packed_documents_equal_separate_ones,
    compiled_equals_eager,
    static_cache_with_compile_equals_dynamic,
)
"""The most important first."""
