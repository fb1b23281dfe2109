"""The transformers class: the same modules that training uses, with transformers' masks, caches and generation.

Shapes: B batch, T tokens, D width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from recurrent_depth.hf.configuration import RecurrentDepthConfig
from recurrent_depth.model.attention import Attend
from recurrent_depth.model.layers import RMSNorm, rotary_at, rotary_table
from recurrent_depth.model.loss import wide
from recurrent_depth.model.recurrence import NumSteps, split_steps
from recurrent_depth.model.transformer import Transformer, initial_value


@dataclass
class RecurrentDepthOutput(CausalLMOutputWithPast):
    """With `state` [B, T, D], the last state before ln_f, and `latent_states`, ln_f of it."""

    state: Tensor | None = None
    latent_states: Tensor | None = None


class RecurrentDepthForCausalLM(PreTrainedModel, GenerationMixin):
    """A recurrent-depth transformer for causal language modelling."""

    config_class = RecurrentDepthConfig
    base_model_prefix = "transformer"
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012
    _no_split_modules = ["SandwichBlock"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: RecurrentDepthConfig) -> None:
        super().__init__(config)
        model_config = config.to_model_config()
        self.transformer = Transformer(model_config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.register_buffer("freqs_cis", rotary_table(model_config))
        self.is_causal = True
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.transformer.wte = value

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initial values of parameters that a folder does not hold."""
        if module is self:
            init.copy_(self.freqs_cis, rotary_table(self.config.to_model_config()))
        prefix = next((name for name, m in self.named_modules() if m is module), "")
        for name, p in module.named_parameters(recurse=False):
            if isinstance(module, RMSNorm):
                init.ones_(p)
            else:
                init.copy_(p, initial_value(f"{prefix}.{name}", p.shape, self.config.to_model_config(), seed=0))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_steps: NumSteps | None = None,
        input_states: Tensor | None = None,
        **kwargs: Any,
    ) -> RecurrentDepthOutput | tuple[Any, ...]:
        """Run the model.

        Args:
            num_steps: steps of the core, an int or (without, with) gradient; default: the config's num_steps, or its
                mean_recurrence.
            input_states: initial state [B, T, D]; default zeros.
            output_hidden_states: return the state after every step, R tensors [B, T, D].
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        steps = num_steps or self.config.num_steps or self.config.mean_recurrence
        split_steps(steps)
        x = inputs_embeds if input_ids is None else self.transformer.embed(input_ids)
        assert x is not None
        if use_cache and past_key_values is None and not self.training:
            past_key_values = DynamicCache()
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
        mask = create_causal_mask(self.config, x, attention_mask, past_key_values, position_ids)
        attend = self._attend(mask, past_key_values, kwargs)
        rotary = rotary_at(self.freqs_cis, position_ids)

        e = self.transformer.read(x, rotary, attend)
        state = torch.zeros_like(e) if input_states is None else input_states.to(e.dtype)
        states: list[Tensor] = []
        record = (lambda step, s: states.append(s)) if output_hidden_states else None
        state = self.transformer.think(state, e, steps, rotary, attend, on_step=record)
        hidden = self.transformer.write(state, rotary, attend)

        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = wide(self.lm_head(hidden[:, kept]))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = RecurrentDepthOutput(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            hidden_states=tuple(states) if output_hidden_states else None,
            state=state,
            latent_states=self.transformer.ln_f(state),
        )
        return output.to_tuple() if return_dict is False else output

    def _attend(self, mask: Any, cache: Cache | None, kwargs: dict[str, Any]) -> Attend:
        """transformers' attention function and cache, in the form the blocks call."""
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        scaling = self.config.to_model_config().head_dim ** -0.5

        def attend(q: Tensor, k: Tensor, v: Tensor, slot: int) -> Tensor:
            self.layer_idx = slot  # paged attention reads it
            if cache is not None:
                k, v = cache.update(k, v, slot)
            y, _ = function(self, q, k, v, mask, scaling=scaling, dropout=0.0, **kwargs)
            return y.transpose(1, 2)  # [B, H, T, K]

        return attend

    def prepare_inputs_for_generation(
        self, *args: Any, num_steps: NumSteps | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """transformers' inputs, and the number of steps: of the call, else of the generation config."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        steps = num_steps or getattr(self.generation_config, "num_steps", None)
        return inputs if steps is None else {**inputs, "num_steps": steps}

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> Any:
        """A cache that grows by slot: its depth is the number of steps, whatever the configuration says."""
        steps = model_kwargs.get("num_steps") or getattr(generation_config, "num_steps", None)
        if steps is not None:
            model_kwargs["num_steps"] = steps
        plain = generation_config.cache_implementation in (None, "dynamic")
        if plain and generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = DynamicCache()
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)


def eager_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Attention by hand, for `attn_implementation="eager"`: returns [B, T, H, K] and the weights [B, H, T, S]."""
    scores = q @ k.transpose(-1, -2) * scaling
    if mask is not None:
        scores = scores + mask
    weights = wide(scores).softmax(-1).to(q.dtype)
    return (weights @ v).transpose(1, 2), weights
