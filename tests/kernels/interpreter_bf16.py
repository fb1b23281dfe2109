"""Fix bfloat16 in Triton's interpreter.

numpy has no bfloat16, and the interpreter stores its bits in uint16: arithmetic then treats the bits as integers, and
float32 -> bfloat16 truncates instead of rounding to nearest even. With this patch every arithmetic operation computes
in float32 and rounds, as a GPU does.
"""

import functools

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def is_bf16(handle):
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def widen(handle):
    """Convert uint16 bits to float32; other types are unchanged."""
    if not is_bf16(handle) or handle.data.dtype != np.uint16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def narrow(handle):
    """Convert float32 to uint16 bits, rounded to nearest even; NaN stays NaN."""
    values = np.ascontiguousarray(handle.data, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return TensorHandle(np.where(np.isnan(values), np.uint16(0x7FC0), rounded), tl.bfloat16)


def _arithmetic(original):
    @functools.wraps(original)
    def wrapped(self, *args, **kwargs):
        if not any(is_bf16(arg) for arg in args):
            return original(self, *args, **kwargs)
        result = original(self, *(widen(arg) for arg in args), **kwargs)
        return narrow(result) if result.data.dtype == np.float32 else result  # comparisons give booleans

    return wrapped


def _cast(original):
    @functools.wraps(original)
    def wrapped(self, src, dst_type, *rest):
        source, target = src.dtype.scalar, dst_type.scalar
        if target == tl.bfloat16 and source != tl.bfloat16:
            value = src if source == tl.float32 else original(self, src, tl.float32, *rest)
            return narrow(value)
        if source == tl.bfloat16 and target != tl.bfloat16:
            value = widen(src)
            return value if target == tl.float32 else original(self, value, dst_type, *rest)
        return original(self, src, dst_type, *rest)

    return wrapped


def _dot(original):
    @functools.wraps(original)
    def wrapped(self, a, b, d, *rest):
        return original(self, widen(a), widen(b), d, *rest)

    return wrapped


_ARITHMETIC = ("binary_op", "unary_op", "create_clampf", "create_fma", "create_fabs", "create_rsqrt", "create_erf")


def apply():
    """Patch the interpreter; a second call does nothing."""
    if getattr(InterpreterBuilder, "computes_bf16", False):
        return
    for name in _ARITHMETIC:
        setattr(InterpreterBuilder, name, _arithmetic(getattr(InterpreterBuilder, name)))
    for name in ("cast_impl", "create_fp_to_fp"):
        setattr(InterpreterBuilder, name, _cast(getattr(InterpreterBuilder, name)))
    InterpreterBuilder.create_dot = _dot(InterpreterBuilder.create_dot)
    InterpreterBuilder.computes_bf16 = True
