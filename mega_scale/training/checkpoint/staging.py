"""Host memory that holds a copy of a rank's state while it is written."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mega_scale.parallel import as_bytes

_ALIGNMENT = 64  # bytes; every dtype can begin there


class Staging:
    """One buffer, made at the first copy and used again: new memory costs more than the copy.

    Args:
        device: of the state. From a GPU, copies go into locked memory, beside what else it computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def mark(self) -> None:
        """Let the next copy be of what the device has been told to compute so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors, in any thread, and wait for it; the copies are valid until the next call.

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
            self._buffer = torch.empty(end, dtype=torch.uint8, pin_memory=self._stream is not None)
        copies = {}
        with torch.cuda.stream(self._stream):
            for name, tensor in tensors.items():
                room = self._buffer[places[name]]
                room.copy_(as_bytes(tensor), non_blocking=True)
                copies[name] = room.view(tensor.dtype).view(tensor.shape)
        if self._stream is not None:
            self._stream.synchronize()
        return copies
