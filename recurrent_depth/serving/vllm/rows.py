"""The depth of each request in a batch, for vLLM's first model runner.

vLLM tells a logits processor which request is in which row of the batch before every forward pass. This one leaves the
logits as they are.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, process_dict_updates

from recurrent_depth.serving.vllm.options import REQUEST_FIELD, DepthOptions


class Limits:
    """The options of the model that this process serves, for the checks of requests. One model per process."""

    options: DepthOptions | None = None


class Depth(NamedTuple):
    """Iterations of the tokens of a request, and the length of its prompt."""

    num_steps: int
    prompt: int


def requested_steps(sampling_params: Any, options: DepthOptions) -> int:
    """Return the iterations of a request."""
    return (sampling_params.extra_args or {}).get(REQUEST_FIELD) or options.default


def check_request(sampling_params: Any) -> None:
    """Raise a ValueError, over HTTP a 400, if a request asks for iterations that the server does not allow."""
    assert Limits.options is not None
    Limits.options.check_request((sampling_params.extra_args or {}).get(REQUEST_FIELD))


class RowDepths(LogitsProcessor):
    """Keep the depth of the request in every row. `current` is the object of the runner in this process."""

    current: "RowDepths | None" = None

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.options = DepthOptions.of(vllm_config.model_config.hf_config)
        self.rows: dict[int, Depth] = {}
        RowDepths.current = self

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse requests beyond the limits."""
        check_request(sampling_params)

    def is_argmax_invariant(self) -> bool:
        """Return True: the logits are not changed."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests that join, leave or move; called before every forward pass."""

        def depth(params: Any, prompt: list[int] | None, output: list[int]) -> Depth:
            return Depth(requested_steps(params, self.options), len(prompt or ()))

        process_dict_updates(self.rows, batch_update, depth)

    def apply(self, logits: Tensor) -> Tensor:
        """Return the logits unchanged."""
        return logits

    def of_tokens(self, starts: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Return the iterations and the prompt's length of the request of each token, [T] each.

        Args:
            starts: [rows + 1], the first token of each row in the pass.
            tokens: T; tokens after the last row are padding.
        """
        rows = len(starts) - 1
        depths = [self.rows.get(row, Depth(self.options.default, 0)) for row in range(rows)]
        table = torch.tensor([*depths, Depth(1, 0)], device=starts.device)
        row = torch.searchsorted(starts[1:].contiguous(), torch.arange(tokens, device=starts.device), right=True)
        return table[row].unbind(-1)  # type: ignore[return-value]
