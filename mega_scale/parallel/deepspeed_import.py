"""Importing DeepSpeed: it chooses its device, logs and warns as it is imported, so this has to happen in one place."""

import logging
import os
import warnings
from types import ModuleType


def import_deepspeed(device: str) -> ModuleType:
    """Import DeepSpeed for a kind of device, with warnings and errors only in its log.

    Args:
        device: cpu or cuda.

    Returns:
        The package.

    Raises:
        ValueError: DeepSpeed has already been told, or has already chosen, to compute elsewhere.
    """
    os.environ.setdefault("DS_ACCELERATOR", device)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # It calls collectives by names that PyTorch 2.13 deprecates, and would say so at each of them.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    import deepspeed  # noqa: PLC0415  (reads the variable set above)

    # Its logger is made, and its level set, at import.
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    chosen = deepspeed.accelerator.get_accelerator().device_name()
    if chosen != device:
        raise ValueError(
            f"DeepSpeed computes on {chosen}, parallel.device asks for {device}: "
            "unset the environment variable DS_ACCELERATOR, or change parallel.device"
        )
    return deepspeed
