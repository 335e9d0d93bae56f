"""Host memory that holds a copy of a rank's state while it is written."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mega_scale.parallel import as_bytes

_ALIGNMENT = 64  # bytes; every dtype can begin there


class Staging:
    """One buffer, made at the first copy and used again: new memory costs more than the copy.

    Args:
        pin_memory: lock it, so that a GPU copies into it at full speed.
    """

    def __init__(self, pin_memory: bool) -> None:
        self._pin = pin_memory
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors; the copies are valid until the next call.

        Args:
            tensors: by name, of any device and shape.

        Returns:
            The same on the CPU, by the same names in the same order.
        """
        places, end = {}, 0
        for name, tensor in tensors.items():
            length = tensor.numel() * tensor.element_size()
            places[name] = slice(end, end + length)
            end += -(-length // _ALIGNMENT) * _ALIGNMENT
        if len(self._buffer) < end:
            self._buffer = torch.empty(end, dtype=torch.uint8, pin_memory=self._pin)
        copies = {}
        for name, tensor in tensors.items():
            room = self._buffer[places[name]]
            room.copy_(as_bytes(tensor), non_blocking=True)
            copies[name] = room.view(tensor.dtype).view(tensor.shape)
        if self._pin:
            torch.cuda.synchronize()
        return copies
