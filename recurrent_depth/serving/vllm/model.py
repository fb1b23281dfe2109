"""The model class for vLLM: the modules of this package with vLLM's parallel layers and paged attention.

There is one attention layer of vLLM per layer index whose entries are kept: prelude, coda, and the core's layers for
each kept iteration.

Shapes: T tokens of all requests of the batch, D width, H heads of this rank, K head size.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader, sharded_weight_loader

from recurrent_depth.generation.exits import exit_rule
from recurrent_depth.model.attention import on_heads
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.layers import BLOCKS, rotary_at, rotary_table
from recurrent_depth.model.transformer import Transformer
from recurrent_depth.serving.vllm.core import Stopping, iterate
from recurrent_depth.serving.vllm.options import DepthOptions
from recurrent_depth.serving.vllm.rows import RowDepths


class RavenForCausalLM(nn.Module):
    """A recurrent-depth transformer in vLLM. The name is the architecture in config.json."""

    freqs_cis: Tensor

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        hf_config = vllm_config.model_config.hf_config
        self.config, self.options = hf_config.to_model_config(), DepthOptions.of(hf_config)
        self.rule = None if self.options.exit is None else exit_rule(self.options.exit, self.options.exit_threshold)
        c, quantization = self.config, vllm_config.quant_config
        self.transformer = Transformer(c)
        self.transformer.wte = VocabParallelEmbedding(c.vocab_size, c.n_embd)
        for name, block in self.transformer.named_modules():
            if isinstance(block, tuple(BLOCKS.values())):
                _shard(block, c, quantization, f"transformer.{name}")
        self.lm_head = ParallelLMHead(c.vocab_size, c.n_embd, quant_config=quantization, prefix="lm_head")
        if c.tie_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.transformer.wte)
        self.logits_processor = LogitsProcessor(c.vocab_size)
        self.register_buffer("freqs_cis", rotary_table(c))
        self.slots = nn.ModuleList(
            Attention(
                _local_heads(c)[0], c.head_dim, c.head_dim**-0.5, num_kv_heads=_local_heads(c)[1],
                cache_config=vllm_config.cache_config, quant_config=quantization, prefix=f"slots.{i}.attn",
            )
            for i in range(c.unrolled_layers(self.options.kept))
        )  # fmt: skip

    @staticmethod
    def get_model_state_cls() -> type:
        """Return the class that gives vLLM's second model runner the depths of the requests."""
        from recurrent_depth.serving.vllm.slots import DepthState

        return DepthState

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Return the scaled embeddings [T, D]."""
        return self.transformer.embed(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        num_steps: Tensor | None = None,
        prompt_length: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden states [T, D] for the head.

        Args:
            positions: [T].
            num_steps, prompt_length: iterations, and prompt's length of the request, of every token [T]; given by
                vLLM's second model runner. With the first one they come from `RowDepths`.
        """
        x = self.transformer.embed(input_ids) if inputs_embeds is None else inputs_embeds
        rotary = rotary_at(self.freqs_cis, positions[None])
        paged = on_heads(self._attend_heads)
        stopping = self._stopping(positions, num_steps, prompt_length)
        fill = None if self.rule is None or self.options.shares_entries else self._fill
        e = self.transformer.run_prelude(x[None], rotary, paged)
        state = iterate(self.transformer, e, rotary, self._attend, stopping, self.options.num_steps, fill)
        return self.transformer.run_coda(state, rotary, paged)[0]

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return the logits [T, V]."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the tensors of a folder of this package or of a released model; return the names of those loaded."""
        places = dict(self.named_parameters()) | {"freqs_cis": self.freqs_cis}
        loaded = {name for name in places if name.endswith("qk_bias")}  # zero where a folder lacks it
        for name, value in weights:
            if name == "lm_head.weight" and self.config.tie_embeddings:
                loaded.add(name)
                continue
            if name not in places:
                raise ValueError(f"the weights hold {name}, which this model does not have; check config.json")
            getattr(places[name], "weight_loader", default_weight_loader)(places[name], value)
            loaded.add(name)
        return loaded

    def _stopping(self, positions: Tensor, num_steps: Tensor | None, prompt_length: Tensor | None) -> Stopping:
        """Return when every token stops."""
        starts = _starts()
        if num_steps is None and starts is not None and RowDepths.current is not None:
            num_steps, prompt_length = RowDepths.current.of_tokens(starts, len(positions))
        if num_steps is None or prompt_length is None:  # a pass that only measures memory
            num_steps, prompt_length = torch.full_like(positions, self.options.num_steps), torch.zeros_like(positions)
        if self.rule is None:
            return Stopping(num_steps, torch.zeros_like(positions, dtype=torch.bool))
        if self.options.exit_prompt:
            return Stopping(num_steps, torch.ones_like(positions, dtype=torch.bool), self.rule, starts)
        return Stopping(num_steps, positions >= prompt_length, self.rule)

    def _attend_heads(self, q: Tensor, k: Tensor, v: Tensor, layer_index: int) -> Tensor:
        """Attend with heads [1, H, T, K], in prelude and coda."""
        y = self._attend(_flat(q), _flat(k), _flat(v), layer_index)
        return y.view(1, len(y), q.shape[1], q.shape[3]).transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, layer_index: int) -> Tensor:
        return self.slots[self._slot(layer_index)](q, k, v)

    def _fill(self, k: Tensor, v: Tensor, layer_index: int) -> None:
        slot: Any = self.slots[self._slot(layer_index)]
        k, v = (x.view(len(x), slot.num_kv_heads, -1) for x in (k, v))
        torch.ops.vllm.unified_kv_cache_update(k, v, slot.layer_name)

    def _slot(self, layer_index: int) -> int:
        """Return the attention layer of a layer index; iteration i uses those of iteration i mod budget."""
        core = self.transformer.core_block
        inner = layer_index - core.first_layer
        return layer_index if inner < 0 else core.first_layer + inner % (self.options.kept * len(core))


def _heads(config: ModelConfig) -> tuple[int, int]:
    """Return the query heads and the key-value heads of the whole model."""
    return config.n_heads, config.kv_heads


def _local_heads(config: ModelConfig) -> tuple[int, int]:
    """Return the query heads and the key-value heads of this rank."""
    (queries, keys), ranks = _heads(config), get_tensor_model_parallel_world_size()
    return queries // ranks, max(1, keys // ranks)


def _shard(block: Any, config: ModelConfig, quantization: Any, prefix: str) -> None:
    """Replace the projections of a block by vLLM's, each with the part of this rank."""
    c, attn, mlp = config, block.attn, block.mlp
    given = {"bias": False, "return_bias": False, "quant_config": quantization}
    attn.n_heads, groups = _local_heads(c)
    attn.sizes = (attn.n_heads * c.head_dim, groups * c.head_dim, groups * c.head_dim)
    attn.Wqkv = QKVParallelLinear(
        c.n_embd, c.head_dim, *_heads(c), prefix=f"{prefix}.attn.Wqkv", **given | {"bias": c.qkv_bias}
    )
    attn.proj = RowParallelLinear(_heads(c)[0] * c.head_dim, c.n_embd, prefix=f"{prefix}.attn.proj", **given)
    if attn.qk_bias is not None:
        attn.qk_bias = nn.Parameter(torch.zeros(2, 1, attn.n_heads, c.head_dim), requires_grad=False)
        attn.qk_bias.weight_loader = sharded_weight_loader(2)
    inner = [c.intermediate_size] * 2
    mlp.fc = MergedColumnParallelLinear(c.n_embd, inner, prefix=f"{prefix}.mlp.fc", **given)
    mlp.proj = RowParallelLinear(c.intermediate_size, c.n_embd, prefix=f"{prefix}.mlp.proj", **given)


def _starts() -> Tensor | None:
    """Return the first token of every request of this pass, [requests + 1]; None in a pass that measures memory."""
    metadata = get_forward_context().attn_metadata
    return next(iter(metadata.values())).query_start_loc.long() if metadata else None


def _flat(x: Tensor) -> Tensor:
    """Return heads [1, H, T, K] as [T, H K]."""
    return x.transpose(1, 2).reshape(x.shape[2], -1)
