"""One entry for all ways to decode."""

from collections.abc import Sequence

from recurrent_depth.generation.config import Captured, Mode, Refill, Speculation, Wavefront
from recurrent_depth.generation.decoding import Decoded, Decoding, OnToken, decode
from recurrent_depth.generation.graph import decode_captured
from recurrent_depth.generation.scheduler import decode_refilled
from recurrent_depth.generation.speculative import decode_speculatively
from recurrent_depth.generation.wavefront import decode_wavefront
from recurrent_depth.model.transformer import RecurrentDepthModel


def decode_in_mode(
    model: RecurrentDepthModel,
    prompts: Sequence[Sequence[int]],
    options: Decoding,
    mode: Mode | None = None,
    *,
    requests: Sequence[int] | None = None,
    on_token: OnToken | None = None,
) -> Decoded:
    """`decode`, or what `mode` names, with its settings."""
    if isinstance(mode, Speculation):
        return decode_speculatively(model, prompts, options, mode, requests=requests, on_token=on_token)
    if isinstance(mode, Wavefront):
        return decode_wavefront(model, prompts, options, mode, requests=requests, on_token=on_token)
    if isinstance(mode, Refill):
        return decode_refilled(model, prompts, options, mode, requests=requests, on_token=on_token)
    if isinstance(mode, Captured):
        return decode_captured(model, prompts, options, requests=requests, on_token=on_token)
    return decode(model, prompts, options, requests=requests, on_token=on_token)
