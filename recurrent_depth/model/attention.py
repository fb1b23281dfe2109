"""The attention functions of a forward pass: causal, padded, and within packed documents.

A block calls `attention(projection, layer_index)` and knows nothing of masks or caches. The layer index is the place of
the layer in a cache, [prelude, coda, core iteration 0, core iteration 1, ...], so that the coda has the same index at
any number of iterations. Attention over the cache of the decoding engine is in recurrent_depth/generation/attention.py.

Shapes: B batch, T tokens, H query heads, G key heads (H without grouping), K head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from recurrent_depth.model.ops import Ops

Rotary = tuple[Tensor, Tensor]
"""cos and signed sin, each [B or 1, T, K] in fp32."""


@dataclass
class Projection:
    """Queries, keys and values of a block before they are split, biased and rotated.

    Attributes:
        qkv: [B, T, (H + 2 G) K].
        qk_bias: [2, 1, H, K], or None.
        rotary: cos and sin of the T tokens.
    """

    qkv: Tensor
    qk_bias: Tensor | None
    rotary: Rotary
    n_heads: int
    ops: Ops

    def heads(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries [B, H, T, K] and keys, and values, both [B, G, T, K]."""
        return self.ops.bias_rope(self.qkv, self.qk_bias, *self.rotary, self.n_heads)


AttentionFunction = Callable[[Projection, int], Tensor]
"""(projection, layer index) -> [B, T, H K]"""


def merge_heads(y: Tensor) -> Tensor:
    """Return the heads [B, H, T, K] joined: [B, T, H K]."""
    return y.transpose(1, 2).flatten(2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Return softmax(q kᵀ / sqrt(K)) v: [B, H, T, K] for q [B, H, T, K] and k, v [B, G, S, K]; H is a multiple of G."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped)


def on_heads(attend: Callable[[Tensor, Tensor, Tensor, int], Tensor]) -> AttentionFunction:
    """Return the attention function that calls attend(q, k, v, layer_index) on the heads."""
    return lambda projection, layer_index: merge_heads(attend(*projection.heads(), layer_index))


def causal(projection: Projection, layer_index: int) -> Tensor:
    """Compute causal attention over whole sequences, without padding or cache."""
    return merge_heads(sdpa(*projection.heads(), is_causal=True))


def attention_for(
    query_length: int,
    *,
    attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> AttentionFunction:
    """Return the attention function of one forward pass.

    Args:
        attention_mask: [B, T], nonzero where a token is real.
        document_ids: [B, T], equal for tokens of the same document; not together with attention_mask.
    """
    if document_ids is not None:
        if attention_mask is not None:
            raise ValueError("document_ids and attention_mask were both given; packed rows need no attention_mask")
        return _documents(document_ids)
    if attention_mask is not None and attention_mask.shape[-1] != query_length:
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[-1]} tokens, but input_ids have {query_length}; pass a mask "
            "of the same length"
        )
    if attention_mask is None or bool(attention_mask.all()):  # host: without padding the causal kernel is faster
        return causal
    order = torch.arange(query_length, device=attention_mask.device)
    visible, itself = order[None, :] <= order[:, None], order[None, :] == order[:, None]  # [T, T]
    # A padded query sees itself: without any key its softmax would be NaN.
    mask = (visible & attention_mask[:, None, :].bool() | itself)[:, None]  # [B, 1, T, T]
    return lambda projection, _: merge_heads(sdpa(*projection.heads(), mask))


def _documents(document_ids: Tensor) -> AttentionFunction:
    """Return causal attention within documents: flex on a GPU; a dense mask on a CPU, where flex has no backward."""
    if document_ids.is_cuda:
        return _flex_documents(document_ids)
    T = document_ids.shape[1]
    order = torch.arange(T, device=document_ids.device)
    same = document_ids[:, :, None] == document_ids[:, None, :]
    mask = (same & (order[None, :] <= order[:, None]))[:, None]  # [B, 1, T, T]

    def attention(projection: Projection, layer_index: int) -> Tensor:
        return merge_heads(sdpa(*projection.heads(), mask))

    return attention


def _flex_documents(document_ids: Tensor) -> AttentionFunction:
    from torch.nn.attention.flex_attention import create_block_mask

    def same_document(b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        return (q_index >= k_index) & (document_ids[b, q_index] == document_ids[b, k_index])

    B, T = document_ids.shape
    block_mask = create_block_mask(same_document, B, None, T, T, device=str(document_ids.device))

    def attention(projection: Projection, layer_index: int) -> Tensor:
        q, k, v = projection.heads()
        grouped = q.shape[1] != k.shape[1]
        return merge_heads(compiled_flex()(q, k, v, block_mask=block_mask, enable_gqa=grouped))

    return attention


@cache
def compiled_flex() -> Callable[..., Tensor]:
    """Return flex_attention, compiled once: without compilation it would materialise the scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
