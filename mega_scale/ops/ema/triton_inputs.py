"""What the EMA's Triton kernels can be given."""

import torch
from torch import Tensor

from mega_scale.ops.ema.triton_kernels import interpreted


def check_inputs(impl: str, x: Tensor, log_decay: Tensor) -> None:
    """Refuse what no kernel takes.

    Args:
        impl: name of the implementation, for the message.
        x: tokens.
        log_decay: of the coefficients.

    Raises:
        ValueError: x is not on a GPU and kernels are not interpreted, or a dtype has no kernel.
    """
    if not x.is_cuda and not interpreted():
        raise ValueError(f"impl={impl!r} needs a GPU and x is on {x.device}: use impl='blocked'")
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32) or log_decay.dtype != torch.float32:
        raise ValueError(
            f"impl={impl!r} takes bf16, fp16 or fp32 inputs and fp32 coefficients, not {x.dtype} and "
            f"{log_decay.dtype}: use impl='blocked'"
        )
