"""The transformers class: the modules of the training model, with masks, caches and generation of transformers.

Shapes: B batch, T tokens, D width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from recurrent_depth.hf.caches import CACHE_NAME, CacheLayers, make_cache
from recurrent_depth.hf.clock import DepthClock
from recurrent_depth.hf.configuration import RecurrentDepthConfig
from recurrent_depth.model.attention import AttentionFunction, on_heads
from recurrent_depth.model.config import Kernels
from recurrent_depth.model.layers import NORMS, rotary_at, rotary_table
from recurrent_depth.model.loss import to_float32
from recurrent_depth.model.ops import choose_ops, use_ops
from recurrent_depth.model.recurrence import NumSteps, random_state, sample_depth, split_steps
from recurrent_depth.model.transformer import Transformer, initial_value


@dataclass
class RecurrentDepthOutput(CausalLMOutputWithPast):
    """The output with `last_state` [B, T, D], and `latent_states`, what the coda reads of it (after ln_f in Huginn).

    There is no field `state`: beam search of transformers would take it for a cache.
    """

    last_state: Tensor | None = None
    latent_states: Tensor | None = None


@dataclass
class BackboneOutput(BaseModelOutputWithPast):
    """Hidden states [B, T, D] for the head, and `last_state` [B, T, D] of the core."""

    last_state: Tensor | None = None


class RecurrentDepthForCausalLM(PreTrainedModel, GenerationMixin):
    """A recurrent-depth transformer for causal language modelling."""

    config_class = RecurrentDepthConfig
    base_model_prefix = "transformer"
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012
    _no_split_modules = ["SandwichBlock", "PreNormBlock", "BranchNormBlock"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    supports_gradient_checkpointing = True
    gradient_checkpointing = False
    freqs_cis: Tensor
    write_code: ClassVar[Callable[[Any, Path], None] | None] = None
    """Function that writes the modelling code into a saved folder; set by `recurrent_depth.hf`. In the copy of this
    code in an exported folder it is not set: there transformers copies the files itself."""

    def __init__(self, config: RecurrentDepthConfig) -> None:
        super().__init__(config)
        self.model_config = config.to_model_config()
        self.num_key_value_groups = self.model_config.n_heads // self.model_config.kv_heads  # read by transformers
        self.transformer = Transformer(self.model_config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.register_buffer("freqs_cis", rotary_table(self.model_config))
        self.is_causal = True
        self.clock = DepthClock()
        self.post_init()

    @property
    def base_model(self) -> Callable[..., "BackboneOutput"]:
        """The model without the head, with the arguments of `forward`, for libraries with their own head (TRL)."""
        return self.backbone

    def set_kernels(self, kernels: Kernels, released_rounding: bool = False) -> None:
        """Choose the implementation of the element-wise operations, for the current device of the model.

        Args:
            kernels: `triton` (fused kernels), `torch` (the default of a new model), `auto` (triton on a GPU).
            released_rounding: in bfloat16, round inside the norms as the released code does.
        """
        use_ops(self, choose_ops(kernels, self.device, released_rounding))

    def save_pretrained(
        self, save_directory: str | Path, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """Write weights, configuration and the modelling code, so that the folder loads without this package."""
        if self.write_code is not None and is_main_process:
            self.write_code(Path(save_directory))
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.transformer.wte = value

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise parameters that a folder does not hold."""
        if module is self:
            init.copy_(self.freqs_cis, rotary_table(self.model_config))
        prefix = next((name for name, m in self.named_modules() if m is module), "")
        for name, p in module.named_parameters(recurse=False):
            if isinstance(module, tuple(NORMS.values())):
                init.ones_(p)
            else:
                init.copy_(p, initial_value(f"{prefix}.{name}", p.shape, self.model_config, seed=0))

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
        state_seed: int | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> RecurrentDepthOutput | tuple[Any, ...]:
        """Run the model.

        Args:
            past_key_values, cache: the cache, by its name before and since transformers 5.24.
            num_steps: core iterations, an int (all carry gradient) or (without, with) gradient. Default:
                config.num_steps, of which the last mean_backprop_depth carry gradient in training. If that is None: a
                sampled depth in training (see `DepthClock`), otherwise mean_recurrence.
            input_states: initial state [B, T, D]; default: config.state_init in training, otherwise zeros. Training
                means training mode with gradients enabled; under no_grad a pass is deterministic.
            state_seed: seed of a random initial state, a function of (seed, position, channel); default:
                config.state_seed.
            output_hidden_states: return the embeddings and the output of every layer in the order of computation,
                1 + unrolled layers tensors [B, T, D]; `core_states` arranges them by (iteration, layer).
        """
        backbone = self.backbone(
            input_ids,
            attention_mask,
            position_ids,
            cache if past_key_values is None else past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            num_steps=num_steps,
            input_states=input_states,
            state_seed=state_seed,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = to_float32(self.lm_head(backbone.last_hidden_state[:, kept]))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        assert backbone.last_state is not None
        output = RecurrentDepthOutput(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: getattr(backbone, CACHE_NAME)},
            hidden_states=backbone.hidden_states,
            last_state=backbone.last_state,
            latent_states=self.transformer.coda_input(backbone.last_state),
        )
        return output.to_tuple() if return_dict is False else output

    def backbone(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        *,
        num_steps: NumSteps | None = None,
        input_states: Tensor | None = None,
        state_seed: int | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> "BackboneOutput":
        """Run everything before the head; arguments as in `forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("both or neither of input_ids and inputs_embeds were given; pass exactly one of them")
        past_key_values = cache if past_key_values is None else past_key_values
        x = inputs_embeds if input_ids is None else self.transformer.embed(input_ids)
        assert x is not None
        if use_cache and past_key_values is None and not self.training:
            past_key_values = make_cache(self.config, 1)
        layers = None if past_key_values is None else CacheLayers(past_key_values, self.config)
        position_ids = self._positions(x, layers, attention_mask, position_ids)
        steps, state = self._depth_and_state(x, position_ids, num_steps, input_states, state_seed)
        mask = self._mask(x, attention_mask, past_key_values, position_ids)
        attention = self._attention(mask, layers, kwargs)
        rotary = rotary_at(self.freqs_cis, position_ids)

        with _recorded(self.transformer, x, bool(output_hidden_states)) as hidden_states:
            e = self.transformer.run_prelude(x, rotary, attention)
            state = self.transformer.iterate(state, e, steps, rotary, attention)
            hidden = self.transformer.run_coda(state, rotary, attention)
        if layers is not None:
            layers.finish(sum(split_steps(steps)))
        recorded = tuple(hidden_states) if output_hidden_states else None
        return BackboneOutput(hidden, past_key_values, recorded, last_state=state)

    def core_states(self, hidden_states: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        """Return the outputs of the core's layers: `result[i][j]` [B, T, D] is layer j of iteration i, from 0.

        The state after iteration i is `result[i][-1]`.
        """
        first = 1 + self.config.n_layers_in_prelude
        core = hidden_states[first : len(hidden_states) - self.config.n_layers_in_coda]
        width = self.config.n_layers_in_recurrent_block
        return [tuple(core[i : i + width]) for i in range(0, len(core), width)]

    def decode_state(
        self, state: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Return the logits [B, T, V] for a state [B, T, D] after any iteration (before ln_f, whole sequences)."""
        position_ids = self._positions(state, None, attention_mask, position_ids)
        mask = self._mask(state, attention_mask, None, position_ids)
        hidden = self.transformer.run_coda(
            state, rotary_at(self.freqs_cis, position_ids), self._attention(mask, None, {})
        )
        return to_float32(self.lm_head(hidden))

    def _mask(self, x: Tensor, attention_mask: Tensor | None, cache: Cache | None, position_ids: Tensor) -> Any:
        return create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: cache},
        )

    def _positions(self, x: Tensor, layers: CacheLayers | None, mask: Tensor | None, given: Tensor | None) -> Tensor:
        """Return position ids [B or 1, T]: as given, else counted over the mask, else continued from the cache."""
        T = x.shape[1]
        past = 0 if layers is None else layers.past
        if given is not None:
            positions = given
        elif mask is not None and mask.ndim == 2:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
        else:
            positions = (torch.arange(T, device=x.device) + past)[None]
        limit = self.config.block_size
        # host: only for rows longer than block_size, which padding may have made so
        if isinstance(past, int) and past + T > limit and (last := int(positions.max())) >= limit:
            raise ValueError(
                f"position {last} is beyond block_size {limit}, which the rotary table covers; "
                "shorten the prompt or max_new_tokens"
            )
        return positions

    def _depth_and_state(
        self, x: Tensor, positions: Tensor, steps: NumSteps | None, state: Tensor | None, state_seed: int | None
    ) -> tuple[NumSteps, Tensor]:
        """Return the number of iterations and the initial state [B, T, D] of this pass.

        A pass without gradient is deterministic in training mode too, because trainers use it to generate and to
        compute reference log-probabilities.
        """
        training = self.training and torch.is_grad_enabled()
        seed, step, micro_step = self.clock.read() if training else (0, 0, 0)
        if steps is None:
            steps = self._training_depth(seed, step, micro_step) if training else self._depth()
        split_steps(steps)
        if state is not None:
            return steps, state.to(x.dtype)
        row, ops = torch.arange(x.shape[0], device=x.device), self.transformer.core_block.ops
        if training and self.config.state_init == "like-init":
            rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
            row = row + (micro_step << 24) + rank * x.shape[0]
            return steps, random_state(self.model_config, row, positions, seed=seed, step=step, ops=ops).to(x.dtype)
        state_seed = self.config.state_seed if state_seed is None else state_seed
        if state_seed is None:
            return steps, torch.zeros_like(x)
        state = random_state(self.model_config, torch.zeros_like(row), positions, seed=state_seed, ops=ops)
        return steps, state.to(x.dtype)

    def _depth(self) -> int:
        return self.config.mean_recurrence if self.config.num_steps is None else self.config.num_steps

    def _training_depth(self, seed: int, step: int, micro_step: int) -> NumSteps:
        """Return config.num_steps or a sampled depth; the last mean_backprop_depth iterations carry gradient."""
        if self.config.num_steps is None:
            return sample_depth(self.model_config, seed=seed, step=step, micro_step=micro_step)
        total, k = self.config.num_steps, self.config.mean_backprop_depth
        with_gradient = total if k is None else min(k, total)
        return total - with_gradient, with_gradient

    def _attention(self, mask: Any, layers: CacheLayers | None, kwargs: dict[str, Any]) -> AttentionFunction:
        """Return the attention function of transformers, with its cache, in the form that blocks call."""
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        scaling = self.model_config.head_dim**-0.5

        def attend(q: Tensor, k: Tensor, v: Tensor, layer_index: int) -> Tensor:
            self.layer_idx = layer_index  # read by paged attention
            if layers is not None:
                k, v = layers.update(k, v, layer_index)
            y, _ = function(self, q, k, v, mask, scaling=scaling, dropout=0.0, **kwargs)
            return y.transpose(1, 2)  # [B, H, T, K]

        return on_heads(attend)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the inputs of transformers, with num_steps and state_seed of the generation config."""
        if kwargs.get("past_key_values") is not None:
            kwargs[CACHE_NAME] = kwargs.pop("past_key_values")
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        for name in ("num_steps", "state_seed"):
            value = kwargs.get(name, getattr(self.generation_config, name, None))
            if value is not None:
                inputs[name] = value
        return inputs

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> Any:
        """Make a cache with the layers of the iterations of this call, which may differ from the configuration."""
        for name in ("num_steps", "state_seed"):
            if model_kwargs.get(name) is None and getattr(generation_config, name, None) is not None:
                model_kwargs[name] = getattr(generation_config, name)
        kind = generation_config.cache_implementation
        wanted = generation_config.use_cache is not False and model_kwargs.get(CACHE_NAME) is None
        if wanted and kind in (None, "dynamic", "static"):
            steps = model_kwargs.get("num_steps") or self._depth()
            max_length = max(args[-1], getattr(generation_config, "max_cache_len", None) or 0)
            static_length = max_length if kind == "static" else None
            model_kwargs[CACHE_NAME] = make_cache(
                self.config, sum(split_steps(steps)), static_length, expected_length=max_length
            )
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        """Recompute the core's blocks in the backward pass. Depth and noise are drawn outside of them."""
        self.gradient_checkpointing = enable
        self.transformer.core_block.activation_checkpointing = "block" if enable else "none"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RecurrentDepthForCausalLM":
        """Move the rotary table with the model, but never change its dtype."""
        table = self.freqs_cis
        super()._apply(fn, recurse)
        if self.freqs_cis.dtype != table.dtype:
            self.freqs_cis = table.to(self.freqs_cis.device)
        return self


@contextmanager
def _recorded(transformer: Transformer, x: Tensor, wanted: bool) -> Iterator[list[Tensor]]:
    """Yield a list that collects x and the output of every block that runs inside the context."""
    outputs = [x]
    blocks = [*transformer.prelude, *transformer.core_block, *transformer.coda] if wanted else []
    hooks = [block.register_forward_hook(lambda module, args, y: outputs.append(y)) for block in blocks]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def eager_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Compute attention for `attn_implementation="eager"`; return [B, T, H, K] and the weights [B, H, T, S]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scaling
    if mask is not None:
        scores = scores + mask
    weights = to_float32(scores).softmax(-1).to(q.dtype)
    return (weights @ v).transpose(1, 2), weights
