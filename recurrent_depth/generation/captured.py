"""Decoding with CUDA graphs: each iteration of the core is captured once and replayed.

At batch 1 an iteration of the 3.5B model reads weights for 0.7 ms (by arithmetic, on an H200) in some forty launches,
and Python needs nearly as long to launch them. Here all state that changes between iterations is in buffers on the
device: which lanes are still iterating, how many iterations they took, where the cache is written. The host reads
whether any lane is still iterating one iteration late, so that the device always has work.

Shapes: B requests, D width, V vocabulary, M numbers kept by an exit rule.
"""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from recurrent_depth.generation.attention import StaticAttention
from recurrent_depth.generation.batch import Batch, prefill
from recurrent_depth.generation.cache import RecurrentCache
from recurrent_depth.generation.request import DecodableModel, Decoded, Requests, Stopping
from recurrent_depth.model.layers import rotary_at
from recurrent_depth.model.loss import to_float32
from recurrent_depth.model.ops import Ops

ROOM = 256
"""On a GPU the cache length is rounded up to a multiple of this, so that graphs can be used for more calls."""


def decode_captured(model: DecodableModel, requests: Requests, token: "CapturedToken") -> Decoded:
    """Decode with buffers and graphs that fit these requests. The tokens equal those of plain decoding."""
    requests.refuse("captured decoding", "state_seed", "scores")
    result, lanes = requests.result, len(requests.prompts)
    result.cache_bytes = token.cache.num_bytes
    batch = Batch(model, requests, token.reset())
    logits, states = prefill(batch)
    token.place([lane.start for lane in batch.lanes if lane], [requests.longest] * lanes)
    token.state.copy_(states)
    everyone = list(range(lanes))
    while True:
        lengths = [requests.longest - lane.start + len(result.tokens[lane.request]) for lane in batch.lanes if lane]
        for request, drawn in zip(everyone, requests.draw(logits, everyone, lengths), strict=True):
            if requests.running[request]:
                requests.write(request, drawn)
        if not any(requests.running):
            result.computed_iterations += batch.tokens.computed
            return result
        if token.uses_graphs and not token.graphs:
            token.capture()
        result.computed_iterations += lanes * token.run([written[-1] for written in result.tokens], requests.running)
        # host: iterations are counted there, which reads the new tokens next anyway
        for request, core_iterations in enumerate(token.taken[:, 0].tolist()):
            if requests.running[request]:
                requests.count(request, 1, core_iterations, lengths[request] + 1)
        logits = token.logits


class CapturedToken:
    """Decode one new token per request, with buffers at fixed addresses and regions that can be captured.

    The regions are `begin`, one `iterate` per core iteration, and `finish`: device work that only reads and writes
    buffers, without host synchronisation.

    Args:
        stopping: when a token stops iterating.
    """

    def __init__(self, model: DecodableModel, requests: Requests, stopping: Stopping) -> None:
        config, options, weight = model.model_config, requests.options, model.lm_head.weight
        B, device, dtype = len(requests.prompts), weight.device, weight.dtype
        self.uses_graphs = weight.is_cuda
        self.graphs: list[torch.cuda.CUDAGraph] = []  # of each region, after `capture`
        room = -(-requests.room // ROOM) * ROOM if self.uses_graphs else requests.room
        self.model, self.stopping, self.warm_start = model, stopping, options.warm_start
        self.captured_model = _what_graphs_depend_on(model)
        self.cache = RecurrentCache(
            config, B, room, stopping.most, options.cache_budget, dtype, device, options.released_cache
        )
        self.ids = torch.zeros(B, 1, dtype=torch.long, device=device)
        self.running = torch.zeros(B, 1, dtype=torch.bool, device=device)  # requests that are not finished
        self.active = torch.zeros_like(self.running)  # running requests whose token is still iterating
        self.taken = torch.zeros_like(self.ids)  # iterations of the current token
        self.columns, self.starts = (torch.zeros(B, dtype=torch.long, device=device) for _ in range(2))
        self.state = torch.zeros(B, 1, config.n_embd, dtype=dtype, device=device)
        self.injected = torch.zeros_like(self.state)
        _, self.adapt = model.transformer.injection(self.state)
        kept = 0 if stopping.rule is None else stopping.rule.remembers(config.vocab_size)
        self.memory = torch.zeros(B, 1, kept, dtype=torch.promote_types(dtype, torch.float32), device=device)
        self.logits = torch.zeros(B, config.vocab_size, dtype=self.memory.dtype, device=device)
        self.cos = torch.zeros(B, 1, config.head_dim, dtype=model.freqs_cis.dtype, device=device)
        self.sin = torch.zeros_like(self.cos)
        self.iterations = torch.arange(stopping.most, device=device)[:, None].expand(-1, B).contiguous()
        self.going = torch.zeros(stopping.most, dtype=torch.bool, device=device)  # [R]: any lane is active
        self.attention = StaticAttention(
            self.cache, self.iterations, self.columns, self.starts, self.running, self.active
        )

    def fits(self, requests: Requests, stopping: Stopping) -> bool:
        """Return whether the buffers and captured graphs can be used for another call."""
        options, cache = requests.options, self.cache
        budget = stopping.most if options.cache_budget is None else min(options.cache_budget, stopping.most)
        same = (len(self.ids), cache.budget, cache.released, self.warm_start) == (
            len(requests.prompts), budget, options.released_cache, options.warm_start
        )  # fmt: skip
        rule = stopping.rule is self.stopping.rule and stopping[:2] == self.stopping[:2]
        unchanged = self.captured_model == _what_graphs_depend_on(self.model)
        return same and rule and requests.room <= cache.max_length and unchanged

    def reset(self) -> RecurrentCache:
        """Empty the cache, at the same address, and return it."""
        self.cache.entries.zero_()
        self.cache.depths.fill_(self.cache.num_steps)
        self.cache.by_depth = False
        return self.cache

    def place(self, starts: list[int], columns: list[int]) -> None:
        """Set the first column of each lane, and the column of its next token."""
        self.starts.copy_(torch.tensor(starts, device=self.starts.device))
        self.columns.copy_(torch.tensor(columns, device=self.columns.device))

    def run(self, tokens: list[int], running: list[bool]) -> int:
        """Feed each request its next token and return the number of iterations run. Results are in the buffers."""
        self.ids.copy_(torch.tensor(tokens, device=self.ids.device)[:, None])
        self.running.copy_(torch.tensor(running, device=self.running.device)[:, None])
        self.run_region(0)
        done = 0
        late = _DelayedCheck(self.going) if self.stopping.rule is not None else None
        for i in range(self.stopping.most):
            self.run_region(i + 1)
            done = i + 1
            if late is not None and late.all_have_stopped(after=i):
                break
        self.run_region(self.num_regions - 1)
        self.columns += 1
        return done

    @property
    def num_regions(self) -> int:
        return self.stopping.most + 2

    def run_region(self, number: int) -> None:
        """Run a region, or replay its graph: 0 is `begin`, i + 1 is `iterate(i)`, and the last one is `finish`."""
        if self.graphs:
            self.graphs[number].replay()
        elif number == 0:
            self.begin()
        elif number <= self.stopping.most:
            self.iterate(number - 1)
        else:
            self.finish()

    def begin(self) -> None:
        """Run embedding and prelude."""
        part = self.model.transformer
        cos, sin = rotary_at(self.model.freqs_cis, (self.columns - self.starts)[:, None])
        self.cos.copy_(cos)
        self.sin.copy_(sin)
        self.active.copy_(self.running)
        self.taken.zero_()
        self.memory.fill_(torch.nan)
        self.cache.depths.scatter_(1, self.columns[:, None], torch.full_like(self.ids, self.stopping.most))
        e = part.run_prelude(part.embed(self.ids), (self.cos, self.sin), self.attention)
        self.injected.copy_(part.injection(e)[0])
        if not self.warm_start:
            self.state.zero_()

    def iterate(self, i: int) -> None:
        """Run core iteration i, from 0. A lane that has stopped keeps its state and writes nothing."""
        core, rotary = self.model.transformer.core_block, (self.cos, self.sin)
        after = core.step(self.state, self.injected, self.adapt, rotary, self.attention, i)
        after = torch.where(self.active[..., None], after, self.state)
        self.taken += self.active
        rule = self.stopping.rule
        if rule is not None:
            done, memory = rule.converged(self.state, after, partial(self._read, after), self.memory)
            self.memory.copy_(memory)
            if i + 1 >= self.stopping.least:
                self.active &= ~done
            self.going[i].copy_(self.active.any())
        self.state.copy_(after)

    def finish(self) -> None:
        """Run coda and head, and record the depths, which later tokens need for reading."""
        self.cache.depths.scatter_(1, self.columns[:, None], self.taken.clamp(min=1))
        self.logits.copy_(self._read(self.state)[:, 0])

    def _read(self, state: Tensor) -> Tensor:
        """Return the logits [B, 1, V] of a state [B, 1, D]."""
        hidden = self.model.transformer.run_coda(state, (self.cos, self.sin), self.attention)
        return to_float32(self.model.lm_head(hidden))

    def capture(self) -> None:
        """Capture each region in a CUDA graph, which is replayed from then on. Regions must then be called in order.

        All regions are run once before, so that libraries initialise and kernels compile outside of the graphs.
        """
        state = self.state.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        graphs: list[torch.cuda.CUDAGraph] = []
        with torch.cuda.stream(side):
            self.rehearse()
            torch.cuda.synchronize()
            pool = torch.cuda.graph_pool_handle()
            for number in range(self.num_regions):
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=pool)
                try:
                    self.run_region(number)
                finally:  # otherwise every later CUDA call of the process fails
                    graph.capture_end()
                graphs.append(graph)
        torch.cuda.current_stream().wait_stream(side)
        self.state.copy_(state)
        self.graphs = graphs

    def rehearse(self) -> None:
        """Run every region with no request running.

        No keys and values are written; the depth at the next column is set again by its token. State and logits change.
        """
        self.running.zero_()
        for number in range(self.num_regions):
            self.run_region(number)


def _what_graphs_depend_on(model: DecodableModel) -> list[Any]:
    """Return what a captured graph has fixed: modules, their settings and hooks, and the addresses of weights.

    The values of weights may change in place.
    """
    modules = [*model.transformer.modules(), *model.lm_head.modules()]
    # Modules compare by identity. They are kept alive here, so that no other module gets the same identity.
    called = [
        (module, _settings(module), [*module._forward_pre_hooks.values()], [*module._forward_hooks.values()])
        for module in modules
    ]
    tensors = [t for module in modules for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))]
    return [called, [address for tensor in [*tensors, model.freqs_cis] for address in _addresses(tensor)]]


def _settings(module: nn.Module) -> dict[str, Any]:
    """Return operations, an overwritten forward, and plain values, such as the active adapters of a LoRA layer."""
    plain = {name: copy.deepcopy(value) for name, value in vars(module).items() if _is_plain(value)}
    return plain | {name: value for name, value in vars(module).items() if isinstance(value, Ops) or name == "forward"}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(part) for pair in value.items() for part in pair)
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str)


def _addresses(tensor: Tensor) -> list[tuple[int, torch.dtype]]:
    """Return the address of a tensor; for a quantised one, which consists of several tensors, all addresses."""
    if is_traceable_wrapper_subclass(tensor):
        return [part for name in tensor.__tensor_flatten__()[0] for part in _addresses(getattr(tensor, name))]
    return [(tensor.data_ptr(), tensor.dtype)]


class _DelayedCheck:
    """Read whether any lane is still iterating one iteration late: the host waits for it while the next one runs."""

    def __init__(self, going: Tensor) -> None:
        self.going = going
        self.known = torch.ones(going.shape, dtype=torch.bool, device="cpu", pin_memory=going.is_cuda)
        self.events: list[torch.cuda.Event] = []

    def all_have_stopped(self, after: int) -> bool:
        """Return whether all lanes had stopped before iteration `after`, which has already been launched."""
        self.known[after].copy_(self.going[after], non_blocking=True)
        if self.going.is_cuda:
            self.events.append(torch.cuda.Event())
            self.events[after].record()
            if after:
                self.events[after - 1].synchronize()
        return after > 0 and not bool(self.known[after - 1])  # on the host already, and written: see the event
