"""Decoding as a fixed sequence of GPU work: every step of the core is captured once as a CUDA graph and replayed.

At batch 1 a step of the 3.5B model reads weights for 0.7 ms (by arithmetic, on an H200) in some forty launches, and
Python needs nearly as long to launch them. Here all that changes from step to step lies in buffers on the device: which
rows still think, how many steps they took, where the cache is written. The host launches, and reads whether anyone
still thinks one step late, so that the device always has work.

Shapes: B requests, T tokens of the prompts, S columns of the cache, D width, V vocabulary, M kept by an exit rule.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from recurrent_depth.generation.adaptive import adaptive_forward
from recurrent_depth.generation.cache import RecurrentCache
from recurrent_depth.generation.decoding import (
    Decoded,
    Decoding,
    Each,
    OnToken,
    count,
    draw,
    name_tensor,
    padded,
    shared_depth,
    write,
)
from recurrent_depth.generation.exits import ExitRule
from recurrent_depth.model.attention import Projection, Rotary, merge_heads
from recurrent_depth.model.layers import rotary_at
from recurrent_depth.model.loss import to_float32
from recurrent_depth.model.transformer import RecurrentDepthModel

Region = Callable[[], None]
"""Device work without a decision on the host: reads and writes buffers alone."""


@torch.inference_mode()
def decode_captured(
    model: RecurrentDepthModel,
    prompts: Sequence[Sequence[int]],
    options: Decoding,
    *,
    requests: Sequence[int] | None = None,
    on_token: OnToken | None = None,
) -> Decoded:
    """As `decode`, with the same tokens; see there for the arguments."""
    if isinstance(options.exit, Sequence):
        raise ValueError("captured decoding takes one exit rule for all requests; give one, or decode plainly")
    ids, mask = padded(model, prompts, options)
    (B, width), weight = ids.shape, model.lm_head.weight
    steps, least = shared_depth(options, model.config, "captured decoding")
    room = width + options.max_new_tokens
    cache = RecurrentCache(model.config, B, room, steps, options.cache_budget, weight.dtype, weight.device)
    names, each = name_tensor(requests, B, ids.device), Each(options, model.config, prompts)
    result = Decoded([[] for _ in prompts], [[] for _ in prompts], cache_bytes=cache.num_bytes)
    running = [True] * B

    def account(depths: Tensor, contexts: Tensor, new_tokens: list[int]) -> None:
        for row, (core_steps, context) in enumerate(zip(depths.sum(1).tolist(), contexts.tolist(), strict=True)):
            if running[row]:
                count(result, model.config, row, new_tokens[row], core_steps, context)

    output = adaptive_forward(
        model, ids, mask, cache, options.exit, steps, least if options.exit_prompt else steps, options.prefix_monotone,
        last_logits_only=True,
    )  # fmt: skip
    account(output.depths, mask.sum(1), mask.sum(1).tolist())
    token = StaticToken(model, cache, mask, options.exit, steps, least, options.warm_start)
    if ids.is_cuda and options.max_new_tokens > 1:
        token.capture()
    token.state.copy_(output.state[:, -1:])
    token.logits.copy_(output.logits[:, -1])
    result.computed_steps = output.computed
    while True:
        drawn = draw(token.logits, options, names, token.positions + 1)
        for row, chosen in enumerate(drawn.tolist()):
            if running[row]:
                running[row] = write(result, row, chosen, each.forcing[row], options, on_token)
        if not any(running):
            return result
        result.computed_steps += B * token.run([written[-1] for written in result.tokens], running)
        account(token.taken, token.positions + 1, [1] * B)


class StaticToken:
    """One new token a request: buffers that never move, and the regions that work on them.

    Args:
        cache: holds the prompts.
        mask: [B, T], of the prompts.
        rule: when a token has thought enough; None: never.
        num_steps, min_steps: steps of the core at most and at least.
        warm_start: a token's state begins where its predecessor's ended, instead of at zero.
    """

    def __init__(
        self,
        model: RecurrentDepthModel,
        cache: RecurrentCache,
        mask: Tensor,
        rule: ExitRule | None,
        num_steps: int,
        min_steps: int,
        warm_start: bool,
    ) -> None:
        (B, width), device, config = mask.shape, mask.device, model.config
        self.model, self.cache, self.rule, self.warm_start = model, cache, rule, warm_start
        self.num_steps, self.min_steps = num_steps, min_steps
        dtype = model.lm_head.weight.dtype
        self.ids = torch.zeros(B, 1, dtype=torch.long, device=device)
        self.running = torch.zeros(B, 1, dtype=torch.bool, device=device)  # requests that are not done
        self.active = torch.zeros_like(self.running)  # of these, the ones that still think
        self.taken = torch.zeros_like(self.ids)  # steps of the core
        self.mask = torch.zeros(B, cache.max_length, dtype=torch.bool, device=device)
        self.mask[:, :width] = mask.bool()
        self.columns = torch.full((B,), width, device=device)  # where the next token goes
        self.lengths = self.columns + 1
        self.positions = mask.sum(1) - 1  # of the newest token, padding not counted
        self.state = torch.zeros(B, 1, config.n_embd, dtype=dtype, device=device)
        self.injected = torch.zeros_like(self.state)
        _, self.adapt = model.transformer.injection(self.state)
        kept = 0 if rule is None else rule.remembers(config.vocab_size)
        self.memory = torch.zeros(B, 1, kept, dtype=torch.promote_types(dtype, torch.float32), device=device)
        self.logits = torch.zeros(B, config.vocab_size, dtype=self.memory.dtype, device=device)
        self.cos = torch.zeros(B, 1, config.head_dim, dtype=model.freqs_cis.dtype, device=device)
        self.sin = torch.zeros_like(self.cos)
        self.steps = torch.arange(num_steps, device=device)[:, None].expand(-1, B).contiguous()  # a row a step
        self.thinking = torch.zeros(num_steps, dtype=torch.bool, device=device)  # whether anyone is, after each step
        self.regions: list[Region] = [self.begin, *(partial(self.step, i) for i in range(num_steps)), self.finish]

    @property
    def rotary(self) -> Rotary:
        return self.cos, self.sin

    def run(self, tokens: list[int], running: list[bool]) -> int:
        """Feed each request its next token, and think; returns the steps that were run. Results are in the buffers."""
        self.ids.copy_(torch.tensor(tokens)[:, None])
        self.running.copy_(torch.tensor(running)[:, None])
        self.positions += self.running[:, 0]
        self.mask.scatter_(1, self.columns[:, None], self.running)
        begin, *steps, finish = self.regions
        begin()
        done = 0
        late = _Late(self.thinking) if self.rule is not None else None
        for i, step in enumerate(steps):
            step()
            done = i + 1
            if late is not None and late.nobody_thinks(after=i):
                break
        finish()
        self.columns += 1
        self.lengths += 1
        return done

    def begin(self) -> None:
        """Embedding and prelude."""
        part = self.model.transformer
        cos, sin = rotary_at(self.model.freqs_cis, self.positions[:, None])
        self.cos.copy_(cos)
        self.sin.copy_(sin)
        self.active.copy_(self.running)
        self.taken.zero_()
        self.memory.fill_(torch.nan)
        self.cache.depths.scatter_(1, self.columns[:, None], torch.full_like(self.ids, self.num_steps))
        self.injected.copy_(part.injection(part.run_prelude(part.embed(self.ids), self.rotary, self))[0])
        if not self.warm_start:
            self.state.zero_()

    def step(self, i: int) -> None:
        """Step i of the core, from 0: a row that has left keeps its state, and writes nothing."""
        core = self.model.transformer.core_block
        slot = self.model.transformer.first_core_layer + i * len(core)
        after = core.step(self.state, self.injected, self.adapt, self.rotary, self, slot)
        after = torch.where(self.active[..., None], after, self.state)
        self.taken += self.active
        if self.rule is not None:
            done, memory = self.rule.converged(self.state, after, partial(self._read, after), self.memory)
            self.memory.copy_(memory)
            if i + 1 >= self.min_steps:
                self.active &= ~done
            self.thinking[i].copy_(self.active.any())
        self.state.copy_(after)

    def finish(self) -> None:
        """Coda and head; the depths that later tokens read by."""
        self.cache.depths.scatter_(1, self.columns[:, None], self.taken.clamp(min=1))
        self.logits.copy_(self._read(self.state)[:, 0])

    def _read(self, state: Tensor) -> Tensor:
        """[B, 1, D] -> logits [B, 1, V]."""
        return to_float32(self.model.lm_head(self.model.transformer.run_coda(state, self.rotary, self)))

    def __call__(self, projection: Projection, slot: int) -> Tensor:
        """Rotate, write into the cache where a row takes part, attend by depth. -> [B, 1, H K]."""
        cache, qk_bias, ops = self.cache, projection.qk_bias, projection.ops
        in_core, place = slot >= cache.outer, max(slot - cache.outer, 0)
        step, layer = place // cache.core_layers, place % cache.core_layers
        entries = cache.core[:, layer] if in_core else cache.entries[slot, None]  # [budget or 1, 2, B, H, S, K]
        biases = (None, None) if qk_bias is None else (qk_bias[0, 0], qk_bias[1, 0])
        writes = self.active if in_core else self.running
        q = ops.rope_into_cache(
            projection.qkv,
            *biases,
            *projection.rotary,
            entries,
            self.steps[step],
            self.columns,
            writes,
            entries.shape[3],
        )
        return merge_heads(ops.decode_attention(q, entries, cache.depths, self.mask, self.steps[step], self.lengths))

    def capture(self) -> None:
        """Replace each region by the replay of its CUDA graph; from then on they must be called in their order.

        Everything is rehearsed once before: libraries set themselves up and kernels compile outside of the graphs.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        replays: list[Region] = []
        with torch.cuda.stream(side):
            self.rehearse()
            torch.cuda.synchronize()
            pool = torch.cuda.graph_pool_handle()
            for region in self.regions:
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=pool)
                region()
                graph.capture_end()
                replays.append(graph.replay)
        torch.cuda.current_stream().wait_stream(side)
        self.regions = replays

    def rehearse(self) -> None:
        """Run every region with no request running: no key and no value is written, and the depth at the next column
        is set again by its token. State and logits change.
        """
        self.running.zero_()
        for region in self.regions:
            region()


class _Late:
    """Whether anyone still thinks, known one step late: the host waits for a step while the next one runs."""

    def __init__(self, thinking: Tensor) -> None:
        self.thinking = thinking
        self.known = torch.ones(thinking.shape, dtype=torch.bool, pin_memory=thinking.is_cuda)
        self.events: list[torch.cuda.Event] = []

    def nobody_thinks(self, after: int) -> bool:
        """Asked after step `after` was launched; answers for the step before it."""
        self.known[after].copy_(self.thinking[after], non_blocking=True)
        if self.thinking.is_cuda:
            self.events.append(torch.cuda.Event())
            self.events[after].record()
            if after:
                self.events[after - 1].synchronize()
        return after > 0 and not bool(self.known[after - 1])
