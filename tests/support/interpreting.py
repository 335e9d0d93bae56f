"""Triton's interpreter, made to compute as a GPU does."""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def round_bf16(monkeypatch):
    """Have bf16 numbers rounded to the nearest, as GPUs do, where interpretation cuts off."""
    cast = InterpreterBuilder.cast_impl

    def rounded(self, source, dtype):
        if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            bits = np.ascontiguousarray(source.data).view(np.uint32)
            nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
            source = TensorHandle(np.where(np.isfinite(source.data), nearest, bits).view(np.float32), source.dtype)
        return cast(self, source, dtype)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounded)
