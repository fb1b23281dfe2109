"""`Decoder`: continues prompts with a model, in any mode.

result = Decoder(model).generate([[5, 6, 7], [8]], Decoding(max_new_tokens=32, num_steps=32))
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from recurrent_depth.generation.batch import Batch
from recurrent_depth.generation.cache import RecurrentCache, cache_shape
from recurrent_depth.generation.captured import CapturedToken, decode_captured
from recurrent_depth.generation.config import Captured, Mode, Refill, Speculation, Wavefront
from recurrent_depth.generation.request import DecodableModel, Decoded, Decoding, OnToken, Requests
from recurrent_depth.generation.speculative import decode_speculatively
from recurrent_depth.generation.wavefront import decode_wavefront


class Decoder:
    """Continues prompts. It keeps the memory of its cache, and captured graphs, from call to call.

    Args:
        model: on its device, in its dtype; not changed.
        mode: how to decode; None: all requests form one batch that decodes token after token.
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
        """Continue every prompt. A request's tokens and depths do not depend on the others.

        Args:
            prompts: ids, of any lengths.
            requests: names of the requests, for sampling; default 0, 1, ...
            on_token: called for every token as it is written; see `OnToken`.
        """
        asked = Requests(self.model, prompts, options or Decoding(), requests, on_token)
        mode = self.mode
        if isinstance(mode, Captured):
            return decode_captured(self, asked)
        if isinstance(mode, Speculation):
            cache = self.cache(asked, len(prompts), asked.room + mode.tokens)
            return decode_speculatively(self.model, asked, cache, mode)
        if isinstance(mode, Wavefront):
            return decode_wavefront(self.model, asked, self.cache(asked, len(prompts), asked.room), mode)
        lanes = min(mode.lanes, len(prompts)) if isinstance(mode, Refill) else len(prompts)
        return Batch(self.model, asked, self.cache(asked, lanes, asked.room), mode).run()

    def cache(self, requests: Requests, lanes: int, length: int) -> RecurrentCache:
        """Return an empty cache for a call, in memory that is used again."""
        weight, options, config = self.model.lm_head.weight, requests.options, self.model.model_config
        shape = (config, lanes, length, requests.most_steps, options.cache_budget)
        size = math.prod(cache_shape(*shape))
        if self.memory is None or self.memory.numel() < size or self.memory.dtype != weight.dtype:
            self.memory = None  # give the old memory back before more is asked for
            self.memory = torch.empty(size, dtype=weight.dtype, device=weight.device)
        cache = RecurrentCache(*shape, released=options.released_cache, memory=self.memory)
        requests.result.cache_bytes = cache.num_bytes
        return cache
