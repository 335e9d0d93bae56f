"""Elementwise functions of gates.cpp for tensors, and their gradients.

Legend: C columns of coefficients, W width.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from mega_scale.ops.native.library import library, shipped
from mega_scale.ops.once import once_differentiable
from mega_scale.ops.tracing import in_memory

# Numbers of a tensor for which the call pays, and that are worth a thread.
_LEAST, _OF_A_THREAD = 2**14, 2**18


def suits_native(rows: tuple[Tensor, ...], columns: tuple[Tensor, ...] = ()) -> bool:
    """Whether `native_map` takes rows (..., W) and columns (..., W), and is worth it; asks for the cheapest first."""
    tensors = rows + columns
    return (
        not torch.compiler.is_compiling()  # which would keep what the size says
        and rows[0].numel() >= _LEAST
        and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
        and all(row.shape == rows[0].shape for row in rows)
        and all(column.shape[-1] == rows[0].shape[-1] for column in columns)
        and in_memory(*tensors)
        and shipped()
        and library() is not None
    )


def native_map(name: str, rows: tuple[Tensor, ...], columns: Tensor | None = None, outputs: int = 1) -> Any:
    """A function of gates.cpp.

    Args:
        name: of the function; its gradient is NAME_backward.
        rows: (..., W) each, of one shape, fp32 on a CPU.
        columns: (C, W) fp32, coefficients of columns; none where the function has none.
        outputs: how many tensors it returns.

    Returns:
        (..., W), or a tuple of several. Differentiable once; keeps its inputs.
    """
    results: tuple[Tensor, ...] = _Map.apply(name, outputs, columns, *rows)
    return results if outputs > 1 else results[0]


class _Map(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, outputs: int, columns: Tensor | None, *rows: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        ctx.save_for_backward(columns, *rows)
        return _call(name, rows, columns, outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        columns, *rows = ctx.saved_tensors
        sums = None if columns is None else torch.zeros_like(columns, memory_format=torch.contiguous_format)
        found = _call(f"{ctx.name}_backward", (*gradients, *rows), columns, len(rows), sums)
        return None, None, sums, *found


class _Arguments(ctypes.Structure):
    """`Call` of gates.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rows", "strides", "outs", "columns", "sums")),
        *((name, ctypes.c_int64) for name in ("count", "width", "threads")),
    )


def _call(
    name: str, rows: tuple[Tensor, ...], columns: Tensor | None, outputs: int, sums: Tensor | None = None
) -> tuple[Tensor, ...]:
    native = library()
    assert native is not None, "suits_native has asked for it"
    flat = [_rows(tensor) for tensor in rows]
    outs = tuple(rows[0].new_empty(rows[0].shape) for _ in range(outputs))
    columns = None if columns is None else columns.contiguous()
    pointers = (ctypes.c_void_p * len(flat))(*(tensor.data_ptr() for tensor in flat))
    strides = (ctypes.c_int64 * len(flat))(*(tensor.stride(0) for tensor in flat))
    written = (ctypes.c_void_p * outputs)(*(tensor.data_ptr() for tensor in outs))
    arguments = _Arguments(
        *(ctypes.addressof(array) for array in (pointers, strides, written)),
        *(None if tensor is None else tensor.data_ptr() for tensor in (columns, sums)),
        *flat[0].shape,
        max(1, min(torch.get_num_threads(), rows[0].numel() // _OF_A_THREAD)),
    )
    native[f"mega_{name}"](ctypes.byref(arguments))
    return outs


def _rows(tensor: Tensor) -> Tensor:
    """(..., W) as (T, W) whose rows are without gaps; a view wherever it can be."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()
