"""Which tokens see which: the attention functions of a forward pass.

A block calls `attention(projection, layer_index)` and knows nothing of masks or caches. The layer index names the
layer's place in a cache: [prelude, coda, core iteration 0, core iteration 1, ...], so that the number of iterations may
vary without moving the coda.

Shapes: B batch, T tokens, S tokens with the cached ones, H heads, K head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache as cached
from typing import Protocol

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


class Cache(Protocol):
    """What the model needs of a key-value cache."""

    def length(self) -> int:
        """Return the columns already written, in tokens (padding included)."""

    def update(self, k: Tensor, v: Tensor, layer_index: int) -> tuple[Tensor, Tensor]:
        """Store k, v [B, H, T, K] of this forward pass; return all keys and values [B, H, S, K]."""

    def advance(self, tokens: int) -> None:
        """Called once, when all layers of a forward pass have written `tokens` new columns."""


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
    cache: Cache | None = None,
) -> AttentionFunction:
    """Return the attention function of one forward pass.

    Args:
        attention_mask: [B, S], nonzero where a token is real; S covers the cached columns and the new ones.
        document_ids: [B, T], equal where two tokens share a document; not together with a cache.
        cache: past keys and values.
    """
    if document_ids is not None:
        if cache is not None or attention_mask is not None:
            raise ValueError("document_ids are for training on packed rows: pass no cache and no attention_mask")
        return _documents(document_ids)
    if cache is None and attention_mask is None:
        return causal
    past = cache.length() if cache is not None else 0
    mask = _mask(query_length, past, attention_mask)

    def attention(projection: Projection, layer_index: int) -> Tensor:
        q, k, v = projection.heads()
        if cache is not None:
            k, v = cache.update(k, v, layer_index)
        if mask is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] == k.shape[2] > 1)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return merge_heads(y)

    return attention


def _mask(query_length: int, past: int, attention_mask: Tensor | None) -> Tensor | None:
    """Boolean [B or 1, 1, T, S], or None where causal attention or a single query needs no mask."""
    if attention_mask is None and (past == 0 or query_length == 1):
        return None
    total = past + query_length
    device = attention_mask.device if attention_mask is not None else None
    queries = torch.arange(past, total, device=device)[:, None]
    visible = (torch.arange(total, device=device)[None, :] <= queries)[None]  # [1, T, S]
    if attention_mask is None:
        return visible[:, None]
    if attention_mask.shape[-1] != total:
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[-1]} columns, but cache and input have {total}; "
            "it must span the cached tokens as well as the new ones"
        )
    if bool(attention_mask.all()):
        return _mask(query_length, past, None)
    # A padded query would see nothing and turn to NaN: it may see itself.
    itself = torch.arange(total, device=device)[None, :] == queries
    return (visible & attention_mask[:, None, :].bool() | itself)[:, None]


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


@cached
def _compiled_flex() -> Callable[..., Tensor]:
    """flex_attention, compiled once: eagerly it would materialise the scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
