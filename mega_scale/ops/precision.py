"""What autocast makes of matrix products, on any device; some, such as meta, have none."""

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype in which autocast has matrix products computed now; none where it is off."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """In this context autocast is off."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)
