"""Self-speculation: draft tokens with few steps of the core, then take the remaining steps for all of them at once.

The draft's states and entries are reused, so a drafted token costs no step twice. Drafted and verified tokens are
drawn with the same noise (a function of seed, request and position), so that what is written equals plain decoding
with all steps token for token, sampling included; a draft that agrees is accepted.

Shapes: B requests, G drafted tokens, D width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from recurrent_depth.generation.adaptive import visible
from recurrent_depth.generation.cache import RecurrentCache
from recurrent_depth.generation.config import Speculation
from recurrent_depth.generation.decoding import (
    Decoded,
    Decoding,
    OnToken,
    count,
    draw,
    name_tensor,
    one_depth,
    padded,
    write,
)
from recurrent_depth.model.attention import AttentionFunction, Rotary, on_heads
from recurrent_depth.model.layers import rotary_at
from recurrent_depth.model.loss import to_float32
from recurrent_depth.model.transformer import RecurrentDepthModel


@dataclass
class Speculated(Decoded):
    """With the drafted tokens that were asked about and those that were accepted, over all requests."""

    drafted: int = 0
    accepted: int = 0


@torch.inference_mode()
def decode_speculatively(
    model: RecurrentDepthModel,
    prompts: Sequence[Sequence[int]],
    options: Decoding,
    speculation: Speculation,
    *,
    requests: Sequence[int] | None = None,
    on_token: OnToken | None = None,
) -> Speculated:
    """As `decode`, with the same tokens; see there for the arguments."""
    steps, _ = one_depth(options, model.config, "self-speculation", full_cache=True)
    if speculation.steps >= steps:
        raise ValueError(f"draft steps {speculation.steps} must be fewer than num_steps {steps}; lower them")
    return _Run(model, prompts, options, speculation, steps, requests, on_token).result()


class _Run:
    """The state of one batch: cache, mask, the last token of each request, and what is written so far."""

    def __init__(
        self,
        model: RecurrentDepthModel,
        prompts: Sequence[Sequence[int]],
        options: Decoding,
        speculation: Speculation,
        steps: int,
        requests: Sequence[int] | None,
        on_token: OnToken | None,
    ) -> None:
        self.model, self.options, self.speculation, self.steps = model, options, speculation, steps
        self.on_token = on_token
        ids, self.mask = padded(model, prompts, options)
        B, width = ids.shape
        weight = model.lm_head.weight
        self.names = name_tensor(requests, B, ids.device)
        # Rejected columns stay as holes that the mask hides, until `_compact` closes them.
        room = width + options.max_new_tokens + 4 * speculation.tokens
        self.cache = RecurrentCache(model.config, B, room, steps, None, weight.dtype, weight.device)
        self.running = [True] * B
        self.written = Speculated([[] for _ in prompts], [[] for _ in prompts], cache_bytes=self.cache.num_bytes)
        logits = self._prefill(ids)
        for row, token in enumerate(draw(logits, options, self.names, self.mask.sum(1)).tolist()):
            self._write(row, token)

    def result(self) -> Speculated:
        while any(self.running):
            self._round()
        return self.written

    def _prefill(self, ids: Tensor) -> Tensor:
        """All steps for the prompts; logits [B, V] of their last tokens."""
        _, state, rotary = self._begin(ids, self.steps)
        logits = self._finish(state, rotary, ids.shape[1])[:, -1]
        self.cache.advance(ids.shape[1])
        self._account(ids.shape[1], self.steps, [int(n) for n in self.mask.sum(1)])
        return logits

    def _round(self) -> None:
        """Draft, verify, write what holds."""
        still_missing = (
            self.options.max_new_tokens - len(written)
            for written, goes_on in zip(self.written.tokens, self.running, strict=True)
            if goes_on
        )
        G = min(self.speculation.tokens, max(still_missing))
        if self.cache.length() + G > self.cache.max_length:
            self._compact()
        start = self.cache.length()
        tokens = [torch.tensor([w[-1] for w in self.written.tokens], device=self.mask.device)]
        new = torch.tensor(self.running, device=self.mask.device).long()[:, None]
        drafts = []
        for _ in range(G):
            self.mask = torch.cat([self.mask, new], dim=1)
            drafts.append(self._begin(tokens[-1][:, None], self.speculation.steps))
            logits = self._finish(drafts[-1][1], drafts[-1][2], 1)[:, -1]
            self.cache.advance(1)
            tokens.append(draw(logits, self.options, self.names, self.mask.sum(1)))
        self._account(G, self.speculation.steps, [G] * len(self.running))

        self.cache.crop(start)
        verified = self._verify(drafts)  # [B, G, V]
        self.cache.advance(G)
        self._account(G, self.steps - self.speculation.steps, [G] * len(self.running))
        positions = self.mask.sum(1)[:, None] - torch.arange(G - 1, -1, -1, device=self.mask.device)
        chosen = torch.stack(
            [draw(verified[:, g], self.options, self.names, positions[:, g]) for g in range(G)], dim=1
        )  # [B, G]
        drafted = torch.stack(tokens[1:], dim=1)
        agree = (drafted[:, : G - 1] == chosen[:, : G - 1]).long().cumprod(1).sum(1)  # drafts that were fed on
        for row, agreed in enumerate(agree.tolist()):
            if not self.running[row]:
                continue
            self.written.drafted += G - 1
            self.written.accepted += agreed
            for g in range(agreed + 1):
                if self.running[row]:
                    self._write(row, int(chosen[row, g]))
            self.mask[row, start + agreed + 1 :] = 0
        longest = int(agree.max()) + 1
        self.mask = self.mask[:, : start + longest]
        self.cache.crop(start + longest)

    def _begin(self, ids: Tensor, steps: int) -> tuple[Tensor, Tensor, Rotary]:
        """Prelude and the first steps of new tokens [B, T]: (e, state [B, T, D], rotary)."""
        part, T = self.model.transformer, ids.shape[1]
        # Drafts beyond a row's last token are never written; they must only not leave the rotary table.
        positions = (self.mask.cumsum(-1) - 1).clamp(0, self.model.config.block_size - 1)[:, -T:]
        rotary = rotary_at(self.model.freqs_cis, positions)
        e = part.run_prelude(part.embed(ids), rotary, self._attend(T))
        return e, part.iterate(torch.zeros_like(e), e, steps, rotary, self._attend(T)), rotary

    def _verify(self, drafts: list[tuple[Tensor, Tensor, Rotary]]) -> Tensor:
        """The remaining steps of all drafted tokens in parallel: logits [B, G, V]."""
        e = torch.cat([e for e, _, _ in drafts], dim=1)
        state = torch.cat([state for _, state, _ in drafts], dim=1)
        cos = torch.cat([cos for _, _, (cos, _) in drafts], dim=1)
        sin = torch.cat([sin for _, _, (_, sin) in drafts], dim=1)
        T, first = len(drafts), self.speculation.steps
        part = self.model.transformer
        injected, adapt = part.injection(e)
        layer_index = part.first_core_layer + first * len(part.core_block)
        state = part.core_block(state, injected, adapt, self.steps - first, (cos, sin), self._attend(T), layer_index)
        return self._finish(state, (cos, sin), T)

    def _finish(self, state: Tensor, rotary: Rotary, T: int) -> Tensor:
        return to_float32(self.model.lm_head(self.model.transformer.run_coda(state, rotary, self._attend(T))))

    def _attend(self, T: int) -> AttentionFunction:
        mask = visible(self.mask, T)

        def attend(q: Tensor, k: Tensor, v: Tensor, slot: int) -> Tensor:
            k, v = self.cache.update(k, v, slot)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        return on_heads(attend)

    def _write(self, row: int, token: int) -> None:
        self.running[row] = write(self.written, row, token, None, self.options, self.on_token)

    def _compact(self) -> None:
        """Close the holes: every row's real columns move to the right end of the longest row."""
        longest = int(self.mask.sum(1).max())
        order = self.mask.argsort(dim=1, stable=True)[:, -longest:]  # holes first, then columns in their order
        self.cache.select_columns(order)
        self.mask = self.mask.gather(1, order)

    def _account(self, tokens: int, steps: int, real: list[int]) -> None:
        """Steps and FLOPs of the requests that run: `tokens` new columns, `real` of them not padding."""
        contexts = self.mask.sum(1).tolist()
        self.written.computed_steps += len(self.running) * tokens * steps
        for row, goes_on in enumerate(self.running):
            if goes_on:
                count(self.written, self.model.config, row, real[row], steps * real[row], contexts[row])
