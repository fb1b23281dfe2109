"""Budget forcing with texts as delimiters, and inside the `generate()` of transformers (s1, arXiv 2501.19393).

Shapes: B requests, L tokens so far, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from recurrent_depth.generation.config import Thinking
from recurrent_depth.generation.forcing import Forcing, ThinkingBudget
from recurrent_depth.generation.request import Decoding, draw, per_request


def thinking_budget(thinking: Thinking, tokenizer: Any) -> ThinkingBudget:
    """Return the budget with its delimiters converted to ids."""
    begin, end = (_delimiter(tokenizer, getattr(thinking, name), name) for name in ("begin", "end"))
    wait = tuple(tokenizer(thinking.wait, add_special_tokens=False)["input_ids"])
    limits = {"at_most": thinking.at_most, "at_least": thinking.at_least, "rounds": thinking.rounds}
    return ThinkingBudget((begin,), (end,), wait, **limits)


def _delimiter(tokenizer: Any, text: str, name: str) -> int:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(
            f"thinking.{name} is {text!r}, {len(ids)} tokens of this tokenizer; a delimiter must be one token, for "
            "example one of the spares <|c_0|>, <|c_1|>, ..."
        )
    return ids[0]


class BudgetForcing(LogitsProcessor):
    """Keep every request of a `generate()` call within its thinking budget.

        model.generate(**inputs, logits_processor=[BudgetForcing(budget)], max_new_tokens=512)

    It draws the tokens itself, because the token to write depends on the token that the model would have written, and
    masks all others. Sampling options are therefore given here and not to `generate`. The draws equal those of the
    decoding engine, a function of (seed, row, position). It supports sampling and greedy search in batches padded on
    the left; beam search and assisted decoding, which reorder rows or try several tokens, are refused. Use a new object
    for every call.

    Args:
        budgets: one for all requests, or one per request (None: no budget for that request).
        temperature, top_k, top_p, seed: of sampling; temperature 0 takes the most probable token.
        stop: ids that end a request; during thinking they count as the end of thinking.
        attention_mask: [B, L] of the prompts, if they are padded; without it, padding counts as positions.
    """

    supports_continuous_batching = False

    def __init__(
        self,
        budgets: ThinkingBudget | Sequence[ThinkingBudget | None],
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[int] = (),
        attention_mask: Tensor | None = None,
    ) -> None:
        self.budgets, self.stop, self.attention_mask = budgets, tuple(stop), attention_mask
        self.sampling = Decoding(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        self.requests: list[Forcing | None] = []
        self.seen: Tensor | None = None  # [B, L], input_ids of the last call
        self.chosen: list[int] = []  # the tokens chosen in the last call
        self.padded: dict[int, int] = {}  # finished row -> the token it is padded with

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores [B, V] that allow exactly one token per row."""
        if self.seen is None:
            self._start(input_ids, scores)
        elif not self._continues(input_ids):
            raise ValueError(_NO_BEAMS)
        names = torch.arange(len(input_ids), device=scores.device)
        tokens = draw(scores, self.sampling, names, (input_ids.shape[1] - self.padding).to(scores.device))
        drawn = tokens.tolist()  # host: forcing is decided there
        self.chosen = [
            token if request is None else request.choose(token)
            for token, request in zip(drawn, self.requests, strict=True)
        ]
        self.seen = input_ids
        chosen = torch.tensor(self.chosen, device=scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)

    def _start(self, input_ids: Tensor, scores: Tensor) -> None:
        # host: once per call of generate; only beam search passes log probabilities
        if bool((scores.logsumexp(-1).abs() < 1e-5).all()):
            raise ValueError(_NO_BEAMS)
        B, width = input_ids.shape
        mask = torch.ones_like(input_ids) if self.attention_mask is None else self.attention_mask
        if len(mask) == 0 or B % len(mask):
            raise ValueError(f"attention_mask has {len(mask)} rows for {B} sequences; pass the mask of the prompts")
        mask = mask.repeat_interleave(B // len(mask), dim=0)  # num_return_sequences
        self.padding = width - mask.sum(1)  # [B]
        budgets = per_request(self.budgets, B, "budgets")
        rows, lengths = input_ids.tolist(), mask.sum(1).tolist()  # host: forcing looks for delimiters in the prompts
        prompts = [ids[-n:] for ids, n in zip(rows, lengths, strict=True)]
        self.requests = [
            None if b is None else Forcing(b, prompt, self.stop) for b, prompt in zip(budgets, prompts, strict=True)
        ]

    def _continues(self, input_ids: Tensor) -> bool:
        """Return whether every row continues with the token chosen in the last call, or with padding if it ended."""
        assert self.seen is not None
        if input_ids.shape[1] != self.seen.shape[1] + 1:
            return False
        if not torch.equal(input_ids[:, :-1], self.seen):  # host: another use of this object must be refused
            return False
        written = input_ids[:, -1].tolist()  # host: compared with the tokens chosen there
        for row, (token, chosen) in enumerate(zip(written, self.chosen, strict=True)):
            if token != chosen and self.padded.setdefault(row, token) != token:
                return False
        return True


_NO_BEAMS = (
    "budget forcing does not support beam search or assisted decoding, and an object serves one call of generate; "
    "use num_beams=1, no assistant, and a new BudgetForcing for every call"
)
