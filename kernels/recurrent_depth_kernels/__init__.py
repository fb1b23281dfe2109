"""Fused Triton kernels of the recurrent block, for NVIDIA and AMD GPUs. Imports torch and triton only."""

from recurrent_depth_kernels.decode_attention import decode_attention
from recurrent_depth_kernels.gated_mlp import swiglu
from recurrent_depth_kernels.launch import INTERPRETED
from recurrent_depth_kernels.noise import truncated_normal
from recurrent_depth_kernels.norm import add_norm, rms_norm
from recurrent_depth_kernels.rope import bias_rope
from recurrent_depth_kernels.rope_into_cache import rope_into_cache

__all__ = [
    "INTERPRETED",
    "add_norm",
    "bias_rope",
    "decode_attention",
    "rms_norm",
    "rope_into_cache",
    "swiglu",
    "truncated_normal",
]
