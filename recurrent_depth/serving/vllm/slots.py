"""The depth of each request in a batch, for vLLM's second model runner (the default on GPUs).

A model state adds the depths to the inputs of the forward pass; a logits processor of this runner's interface, which
leaves the logits as they are, checks the requests when they arrive.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor

from recurrent_depth.serving.vllm.options import DepthOptions
from recurrent_depth.serving.vllm.rows import check_request, requested_steps


class SlotDepths(LogitsProcessor):
    """Refuse requests beyond the limits."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raise a ValueError, over HTTP a 400, if the iterations of a request are not allowed."""
        check_request(sampling_params)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Return False: nothing is to be done for the logits of any request."""
        return False

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """Return the logits unchanged."""
        return logits


class DepthState(DefaultModelState):
    """Pass `num_steps` and `prompt_length`, [T] each, to the model."""

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.options = DepthOptions.of(vllm_config.model_config.hf_config)
        self.depths = torch.tensor([[self.options.default, 0]]).repeat(self.max_num_reqs, 1)  # [slots, 2], on the host

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """Keep the depth of a new request, in its slot."""
        super().add_request(req_index, new_req_data)
        steps = requested_steps(new_req_data.sampling_params, self.options)
        self.depths[req_index] = torch.tensor([steps, len(new_req_data.prompt_token_ids or ())])

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """Return the further inputs of a forward pass; tokens after the last request are padding."""
        rows = torch.from_numpy(input_batch.idx_mapping_np).long()
        lengths = torch.from_numpy(input_batch.num_scheduled_tokens).long()
        by_token = self.depths[rows].repeat_interleave(lengths, dim=0)
        padding = input_batch.num_tokens_after_padding - len(by_token)
        by_token = torch.cat([by_token, torch.tensor([[1, 0]]).repeat(padding, 1)]).to(self.device)
        depths = {"num_steps": by_token[:, 0], "prompt_length": by_token[:, 1]}
        return super().prepare_inputs(input_batch, req_states) | depths

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """Return the further inputs of a pass that only measures memory: full depth."""
        steps = torch.full((num_tokens,), self.options.num_steps, device=self.device)
        depths = {"num_steps": steps, "prompt_length": torch.zeros_like(steps)}
        return super().prepare_dummy_inputs(num_reqs, num_tokens) | depths
