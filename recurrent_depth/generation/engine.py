"""`Decoder`: continue prompts with a model, in any mode.

result = Decoder(model).generate([[5, 6, 7], [8]], Decoding(max_new_tokens=32, num_steps=32))
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from recurrent_depth.devices import current_device
from recurrent_depth.generation.batch import Batch
from recurrent_depth.generation.cache import RecurrentCache, cache_shape
from recurrent_depth.generation.captured import CapturedToken, decode_captured
from recurrent_depth.generation.config import Captured, Mode, Refill, Speculation, Wavefront
from recurrent_depth.generation.request import DecodableModel, Decoded, Decoding, OnToken, Requests
from recurrent_depth.generation.speculative import decode_speculatively
from recurrent_depth.generation.tokens import Tokens
from recurrent_depth.generation.wavefront import decode_wavefront


class Decoder:
    """Continue prompts with a model. Keeps the memory of the cache and captured graphs between calls.

    Args:
        model: the model, on its device and in its dtype; it is not changed.
        mode: how to decode; None: all requests form one batch that is decoded token by token.
    """

    def __init__(self, model: DecodableModel, mode: Mode | None = None) -> None:
        self.model, self.mode = model, mode
        self.memory: Tensor | None = None
        self.captured: CapturedToken | None = None

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        options: Decoding | None = None,
        *,
        requests: Sequence[int] | None = None,
        on_token: OnToken | None = None,
    ) -> Decoded:
        """Continue every prompt. The tokens and depths of a request do not depend on the other requests.

        Args:
            prompts: token ids; lengths may differ.
            options: see `Decoding`.
            requests: numbers of the requests, of which sampling is a function; default 0, 1, ...
            on_token: called for every written token; see `OnToken`.
        """
        self._check_initial_state()
        asked = Requests(self.model, prompts, options or Decoding(), requests, on_token)
        mode, count = self.mode, len(prompts)
        with current_device(self.model.lm_head.weight.device):
            if isinstance(mode, Captured):
                return decode_captured(self.model, asked, self._token_for(asked))
            if isinstance(mode, Speculation):
                cache = self._cache_for(asked, count, asked.room + mode.tokens)
                return decode_speculatively(self.model, asked, cache, mode)
            if isinstance(mode, Wavefront):
                return decode_wavefront(self.model, asked, self._cache_for(asked, count, asked.room), mode)
            lanes = min(mode.lanes, count) if isinstance(mode, Refill) else count
            return Batch(self.model, asked, self._cache_for(asked, lanes, asked.room), mode).run()

    @torch.inference_mode()
    def logits(self, input_ids: Tensor, num_steps: int, cache_budget: int | None = None) -> Tensor:
        """Return the logits [B, T, V] of given tokens [B, T], processed one after another as in decoding."""
        B, T = input_ids.shape
        if self.model.model_config.block_size < T:
            raise ValueError(
                f"a row has {T} tokens and block_size is {self.model.model_config.block_size}; give shorter rows"
            )
        self._check_initial_state()
        with current_device(input_ids.device):
            tokens = Tokens(self.model, self._cache(B, T, num_steps, cache_budget))
            return torch.cat([tokens.feed(input_ids[:, t : t + 1], t, num_steps) for t in range(T)], dim=1)

    def _check_initial_state(self) -> None:
        seed = getattr(getattr(self.model, "config", None), "state_seed", None)
        if seed is not None:
            raise ValueError(
                f"config.state_seed is {seed}, but decoding starts from a zero state; set it to null, or use the "
                "model's own generate() without custom_generate"
            )

    def _token_for(self, requests: Requests) -> CapturedToken:
        """Return the buffers and graphs for a call; those of an earlier call are used again if they fit."""
        stopping = requests.one_depth("captured decoding")
        if self.captured is None or not self.captured.fits(requests, stopping):
            self.captured = None  # free the old buffers before allocating others
            self.captured = CapturedToken(self.model, requests, stopping)
        return self.captured

    def _cache_for(self, requests: Requests, lanes: int, length: int) -> RecurrentCache:
        options = requests.options
        cache = self._cache(lanes, length, requests.most_steps, options.cache_budget, options.released_cache)
        requests.result.cache_bytes = cache.num_bytes
        return cache

    def _cache(
        self, lanes: int, length: int, num_steps: int, budget: int | None, released: bool = False
    ) -> RecurrentCache:
        """Return an empty cache for a call; the memory of an earlier cache is reused if it is large enough."""
        weight = self.model.lm_head.weight
        shape = (self.model.model_config, lanes, length, num_steps, budget)
        size = math.prod(cache_shape(*shape))
        old = self.memory
        if old is None or old.numel() < size or old.dtype != weight.dtype or old.device != weight.device:
            self.memory = old = None  # free the old memory before allocating more
            self.memory = torch.empty(size, dtype=weight.dtype, device=weight.device)
        return RecurrentCache(*shape, released=released, memory=self.memory)
