"""Writing safetensors files piece by piece, so that they can be hashed on the way and need no second copy in memory."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK_BYTES = 16 * 2**20


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    update: Callable[[bytes | memoryview], None],
    read: Callable[[str], Tensor] | None = None,
) -> int:
    """Write tensors as a safetensors file, and have the disk keep them.

    Tensors are copied from their device one at a time. The interpreter's lock is free while the system writes.

    Args:
        path: file to create.
        tensors: by name, of any device and shape, contiguous.
        update: is given every byte of the file, in order.
        read: gives each tensor when it is its turn, where `tensors` has only their shapes, on the meta device.

    Returns:
        Size of the file, bytes.

    Raises:
        OSError: the file cannot be written.
    """
    header = _header(tensors)
    with open(path, "wb", buffering=0) as file:
        total = _write(file.fileno(), memoryview(header), update)
        for name, like in tensors.items():
            if like.numel():
                tensor = like if read is None else read(name)
                total += _write(file.fileno(), as_bytes(tensor.cpu()).numpy().data, update)
        os.fsync(file.fileno())
    return total


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, uint8 (bytes,), a view."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def _write(file: int, content: memoryview, update: Callable[[bytes | memoryview], None]) -> int:
    # In chunks, which are still in the processor's cache when they are hashed.
    for start in range(0, len(content), _CHUNK_BYTES):
        chunk = content[start : start + _CHUNK_BYTES]
        update(chunk)
        while chunk:
            chunk = chunk[os.write(file, chunk) :]
    return len(content)


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    """Length and JSON that stand before the numbers: https://github.com/huggingface/safetensors#format."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + math.prod(tensor.shape) * tensor.element_size()
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
