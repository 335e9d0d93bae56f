"""The damped exponential moving average: one entry, several implementations."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mega_scale.ops import in_memory, tracing, without_autocast
from mega_scale.ops.ema.blocked import BlockedEma
from mega_scale.ops.ema.native import library, native_ema, shipped
from mega_scale.ops.ema.reference import EmaCoefficients, fft_ema, recurrent_ema, scan_ema

IMPLEMENTATIONS = ("auto", "recurrent", "fft", "blocked", "triton", "native")
Carry = Callable[[Tensor, Tensor, Tensor | None, bool], Callable[[], Tensor]]
"""How states travel between the parts of a sequence that is cut along its length: sends this part's end state, and
returns a function that waits for the others' and returns the state before this part, in the shape of the one sent.

The average is linear and its decay does not depend on the input, so every part can start from zero; what the others
send is added afterwards. Arguments:

* h after this part's last token, had it begun at zero, (B, D, N); if bidirectional (B, 2D, N), the second half being h
  before its first token, coming from the right;
* the logarithm of what is left of a state at the other end of this part, (D or 2D, N);
* (B,) bool, false where a document begins in this part, and no state gets through; none: all do;
* whether it is bidirectional: the second half travels from right to left.
"""


def ema_coefficients(damping: Tensor, decay: Tensor, expansion: Tensor, projection: Tensor) -> EmaCoefficients:
    """Coefficients from a layer's parameters (arXiv 2209.10655, equations 5 and 6, in the names of HF 4.37.2).

    `p = sigmoid(damping)`, `q = 1 - p sigmoid(decay)`, `gain = p expansion`, `projection / sqrt(N)`.

    Args:
        damping: (D, N, 1), any floating dtype; so are `decay` and `expansion`.
        projection: (D, N).

    Returns:
        In fp32 (fp64 for fp64 parameters), whatever autocast says.
    """
    dtype = torch.promote_types(damping.dtype, torch.float32)
    with without_autocast(damping.device):
        p = damping.to(dtype).squeeze(-1).sigmoid()
        # Both sigmoids can round to 1; the bound keeps log(0), and its gradient, out.
        forget = (p * decay.to(dtype).squeeze(-1).sigmoid()).clamp_max(1 - torch.finfo(dtype).eps)
        gain = p * expansion.to(dtype).squeeze(-1)
        return EmaCoefficients(torch.log1p(-forget), gain, projection.to(dtype) * projection.shape[-1] ** -0.5)


def damped_ema(
    x: Tensor,
    coefficients: EmaCoefficients,
    state: Tensor | None = None,
    resets: Tensor | None = None,
    *,
    bidirectional: bool = False,
    truncation: int | None = None,
    carry: Carry | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Multi-dimensional damped EMA (arXiv 2209.10655, equations 5 and 6).

    `h_t = q h_{t-1} + gain x_t`, `y_t = sum_n projection_n h_{t,n}`, per channel. With `bidirectional`, the second half
    of the coefficients runs from right to left, and both outputs are added (each counts the token itself).

    Args:
        x: (B, L, D), L at least 1, any floating dtype. Padded positions are to be zero.
        coefficients: (D, N) each; (2D, N) when bidirectional.
        state: h before the first token (second half: after the last), (B, D or 2D, N); none means zero.
        resets: (B, L) bool, true where a document begins: neither side of that border reaches the other.
        truncation: taps of the kernel, tokens; none means unlimited.
        carry: where x is one part of a longer sequence, brings the state before it, in place of `state`; blocked or
            triton, which then reads x twice: for the state that it sends, and with the one that arrives.
        impl: auto, recurrent (the reference), fft, blocked, triton or native. auto is recurrent for one token; fft for
            a truncated kernel; triton on an NVIDIA GPU of compute capability 8 or newer where triton is installed, for
            64 tokens or more and N up to 32, outside torch.compile; native on a CPU in fp32, outside torch.compile and
            without `carry`, where a C++ compiler is found (else it warns); else blocked.

    Returns:
        y (B, L, D) in the dtype of x; and the state after the last token (second half: before the first),
        (B, D or 2D, N) in the dtype of the coefficients, at least fp32; none when the kernel is truncated, which has no
        finite state.

    Raises:
        ValueError: a shape does not fit, or the implementation lacks what is asked for.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is unknown: choose one of {', '.join(IMPLEMENTATIONS)}")
    if x.dim() != 3 or x.shape[1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}: expected (batch, length of at least 1, channels)")
    rows, averages = coefficients.log_decay.shape
    if rows != x.shape[2] * (2 if bidirectional else 1):
        raise ValueError(
            f"coefficients have {rows} rows for {x.shape[2]} channels with bidirectional={bidirectional}: "
            "one row a channel and direction is needed"
        )
    if state is not None and tuple(state.shape) != (x.shape[0], rows, averages):
        raise ValueError(f"state has shape {tuple(state.shape)}: expected {(x.shape[0], rows, averages)}")
    if resets is not None and (resets.shape != x.shape[:2] or resets.dtype != torch.bool):
        raise ValueError(f"resets are {resets.dtype} {tuple(resets.shape)}: expected bool {tuple(x.shape[:2])}")
    if carry is not None and (state is not None or truncation is not None or impl not in ("auto", "blocked", "triton")):
        raise ValueError(
            f"carry brings the state, of the blocked and the Triton form: it excludes state, truncation={truncation} "
            f"and impl={impl!r}"
        )
    dtype = coefficients.log_decay.dtype
    with without_autocast(x.device):
        if impl == "auto" and truncation is None:
            if x.is_cuda and _suits_triton(x, coefficients):
                impl = "triton"
            elif (
                x.device.type == "cpu"
                and x.shape[1] > 1
                and carry is None
                and dtype == torch.float32
                and in_memory(x, coefficients.log_decay)
                and shipped()
                and library() is not None
            ):
                impl = "native"
        # The kernels widen tokens as they read them.
        inputs = x if impl == "triton" else x.to(dtype)
        state = None if state is None else state.to(dtype)
        ways = [(inputs, coefficients, state, resets)]
        if bidirectional:
            ahead, back = (EmaCoefficients(*half) for half in zip(*(c.chunk(2) for c in coefficients), strict=True))
            before, after = (None, None) if state is None else state.chunk(2, dim=1)
            # Read from the right, a border before token t lies before token t - 1; before token 0 is no other side.
            borders = None
            if resets is not None:
                borders = torch.cat([torch.zeros_like(resets[:, :1]), resets[:, 1:].flip(1)], 1)
            ways = [(inputs, ahead, before, resets), (inputs.flip(1), back, after, borders)]
        found: list[tuple[Tensor, Tensor | None]]
        if carry is None:
            found = [_one_way(*way, truncation, impl) for way in ways]
        else:
            found = [*_carried(ways, carry, kernels=impl == "triton")]
        y, end = found[0]
        if bidirectional:
            y = y + found[1][0].flip(1)
            end = None if end is None or found[1][1] is None else torch.cat([end, found[1][1]], 1)
        return y.to(x.dtype), end


_Way = tuple[Tensor, EmaCoefficients, Tensor | None, Tensor | None]
"""What one direction takes: x, coefficients, state, resets."""


def _one_way(
    x: Tensor,
    coefficients: EmaCoefficients,
    state: Tensor | None,
    resets: Tensor | None,
    truncation: int | None,
    impl: str,
) -> tuple[Tensor, Tensor | None]:
    if truncation is not None:
        if impl not in ("auto", "fft"):
            raise ValueError(f"impl={impl!r} has no truncated kernel: use impl='fft', or truncation=None")
        if state is not None or resets is not None:
            raise ValueError(f"truncation={truncation} keeps no state: it takes neither state nor resets")
        return fft_ema(x, coefficients, None, truncation)
    if impl == "native":
        return native_ema(x, coefficients, state, resets)
    if impl == "triton":
        # Not before it is needed: triton may not be installed.
        from mega_scale.ops.ema.triton import triton_ema  # noqa: PLC0415

        return triton_ema(x, coefficients, state, resets)
    if impl == "auto":
        mode = tracing()
        if x.shape[1] == 1 and mode != "trace":
            impl = "recurrent"  # a decoding step, for which blocks would be idle ceremony
        elif mode and resets is None:
            return scan_ema(x, coefficients, state)
        else:
            impl = "recurrent" if mode == "trace" else "blocked"
    if impl == "blocked":
        form = BlockedEma(x, coefficients, state, resets)
        form.inside()
        return form.outputs()
    if state is None:
        state = x.new_zeros(x.shape[0], *coefficients.log_decay.shape)
    if impl == "recurrent":
        return recurrent_ema(x, coefficients, state, resets)
    if resets is not None:
        raise ValueError("impl='fft' has one kernel for the whole sequence and takes no resets: use impl='blocked'")
    return fft_ema(x, coefficients, state)


def _suits_triton(x: Tensor, coefficients: EmaCoefficients) -> bool:
    """Whether `auto` takes the Triton kernels for x on a GPU."""
    return (
        x.shape[1] >= 64
        and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and coefficients.log_decay.dtype == torch.float32
        and coefficients.log_decay.shape[1] <= 32
        and in_memory(x)
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
        and importlib.util.find_spec("triton") is not None
    )


def _carried(ways: list[_Way], carry: Carry, kernels: bool) -> list[tuple[Tensor, Tensor]]:
    """Both directions' states travel at once, in the blocked form while the products inside blocks are computed."""
    form_of: Any = BlockedEma
    if kernels:
        from mega_scale.ops.ema.triton import TritonEma  # noqa: PLC0415

        form_of = TritonEma
    forms = [form_of(*way) for way in ways]
    sent = [form.end for form in forms]
    x, _, _, resets = ways[0]
    passes = None
    if resets is not None:
        passes = ~resets.any(1)
        if len(sent) == 2:
            # A document that begins this part keeps what lies to its right from what lies to its left.
            sent[1] = sent[1] * (~resets[:, 0])[:, None, None]
    log_fade = torch.cat([coefficients.log_decay for _, coefficients, _, _ in ways]) * x.shape[1]
    arrive = carry(torch.cat(sent, 1) if len(sent) == 2 else sent[0], log_fade, passes, len(sent) == 2)
    for form in forms:
        form.inside()
    incoming = arrive().chunk(len(ways), dim=1)
    return [form.outputs(state) for form, state in zip(forms, incoming, strict=True)]


__all__ = ["IMPLEMENTATIONS", "Carry", "EmaCoefficients", "damped_ema", "ema_coefficients", "fft_ema", "recurrent_ema"]
