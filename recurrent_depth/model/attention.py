"""Which tokens see which: the attention functions of a forward pass.

A block calls `attention(projection, layer_index)` and knows nothing of masks or caches. The layer index names the
layer's place in a cache: [prelude, coda, core iteration 0, core iteration 1, ...], so that the number of iterations may
vary without moving the coda.

Shapes: B batch, T tokens, H heads, K head size.
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
    """Queries, keys and values of a block as its projection leaves them: not split, without bias, not rotated.

    Attributes:
        qkv: [B, T, 3 H K].
        qk_bias: [2, 1, H, K], or None.
        rotary: of the T tokens.
    """

    qkv: Tensor
    qk_bias: Tensor | None
    rotary: Rotary
    n_heads: int
    ops: Ops

    def heads(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries and keys, and values, each [B, H, T, K]."""
        return self.ops.bias_rope(self.qkv, self.qk_bias, *self.rotary, self.n_heads)


AttentionFunction = Callable[[Projection, int], Tensor]
"""(projection, layer index) -> [B, T, H K]"""


def merge_heads(y: Tensor) -> Tensor:
    """[B, H, T, K] -> [B, T, H K]"""
    return y.transpose(1, 2).flatten(2)


def on_heads(attend: Callable[[Tensor, Tensor, Tensor, int], Tensor]) -> AttentionFunction:
    """Return the attention function that calls attend(q, k, v, layer_index), all of them [B, H, T, K]."""
    return lambda projection, layer_index: merge_heads(attend(*projection.heads(), layer_index))


def causal(projection: Projection, layer_index: int) -> Tensor:
    """Plain causal attention over one sequence, no padding, no cache."""
    return merge_heads(F.scaled_dot_product_attention(*projection.heads(), is_causal=True))


def attention_for(
    query_length: int,
    *,
    attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> AttentionFunction:
    """Return the attention function of one forward pass.

    Args:
        attention_mask: [B, T], nonzero where a token is real.
        document_ids: [B, T], equal where two tokens share a document; not together with a mask.
    """
    if document_ids is not None:
        if attention_mask is not None:
            raise ValueError("document_ids are for training on packed rows: pass no attention_mask")
        return _documents(document_ids)
    if attention_mask is not None and attention_mask.shape[-1] != query_length:
        raise ValueError(f"attention_mask covers {attention_mask.shape[-1]} tokens, but input_ids have {query_length}")
    if attention_mask is None or bool(attention_mask.all()):
        return causal
    order = torch.arange(query_length, device=attention_mask.device)
    visible, itself = order[None, :] <= order[:, None], order[None, :] == order[:, None]  # [T, T]
    # A padded query would see nothing and turn to NaN: it may see itself.
    mask = (visible & attention_mask[:, None, :].bool() | itself)[:, None]  # [B, 1, T, T]
    return lambda projection, _: merge_heads(F.scaled_dot_product_attention(*projection.heads(), attn_mask=mask))


def _documents(document_ids: Tensor) -> AttentionFunction:
    """Causal attention within documents: flex on a GPU; a dense mask on a CPU, where flex has no backward."""
    if document_ids.is_cuda:
        return _flex_documents(document_ids)
    T = document_ids.shape[1]
    order = torch.arange(T, device=document_ids.device)
    same = document_ids[:, :, None] == document_ids[:, None, :]
    mask = (same & (order[None, :] <= order[:, None]))[:, None]  # [B, 1, T, T]

    def attention(projection: Projection, layer_index: int) -> Tensor:
        return merge_heads(F.scaled_dot_product_attention(*projection.heads(), attn_mask=mask))

    return attention


def _flex_documents(document_ids: Tensor) -> AttentionFunction:
    from torch.nn.attention.flex_attention import create_block_mask

    def same_document(b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        return (q_index >= k_index) & (document_ids[b, q_index] == document_ids[b, k_index])

    B, T = document_ids.shape
    block_mask = create_block_mask(same_document, B, None, T, T, device=str(document_ids.device))

    def attention(projection: Projection, layer_index: int) -> Tensor:
        return merge_heads(_compiled_flex()(*projection.heads(), block_mask=block_mask))

    return attention


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    """flex_attention, compiled once: eagerly it would materialise the scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
