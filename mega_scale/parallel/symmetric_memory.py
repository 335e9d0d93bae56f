"""Whether ranks of one group can read each other's GPU memory, as PyTorch's symmetric memory has them do."""

import torch
import torch.distributed as dist
from torch import cuda

_TRIED = 2**20  # bytes


def unreachable(group: dist.ProcessGroup, device: torch.device) -> str:
    """Why this rank's group, or that of another rank, cannot use symmetric memory; empty where all can.

    Collective over all ranks of the run. Takes work space of a megabyte, which grows to what products need.
    """
    return _agreed(_peers(group, device), device) or _agreed(_trial(group, device), device)


def _peers(group: dist.ProcessGroup, device: torch.device) -> str:
    own = torch.tensor([device.index], device=device)
    others = torch.empty(group.size(), dtype=own.dtype, device=device)
    dist.all_gather_single(others, own, group=group)
    found = sorted(others.tolist())
    if len(set(found)) < len(found):
        return f"ranks number their GPUs {found}, as each sees its own only, show every rank the GPUs of its host"
    for other in found:
        if other != device.index and not cuda.can_device_access_peer(device, other):
            return f"GPU {device.index} cannot read the memory of GPU {other}, use GPUs that NVLink connects"
    return ""


def _trial(group: dist.ProcessGroup, device: torch.device) -> str:
    # Not before it is needed: runs without tp have no use for it.
    from torch.distributed._symmetric_memory import get_symm_mem_workspace  # noqa: PLC0415

    try:
        get_symm_mem_workspace(group.group_name, _TRIED).barrier()
        cuda.synchronize(device)
    except Exception as error:  # whatever drivers and containers refuse, collectives serve
        return f"PyTorch has no symmetric memory here ({str(error).splitlines()[0]}), use GPUs that NVLink connects"
    return ""


def _agreed(problem: str, device: torch.device) -> str:
    """The problem of this rank, or that another one has one."""
    count = torch.tensor(int(bool(problem)), device=device)
    dist.all_reduce(count)
    return problem or ("the GPUs of another rank cannot, use such as NVLink connects" if int(count) else "")
