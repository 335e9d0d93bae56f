"""The EMA's Triton kernels on a GPU, against the recurrence in fp64."""

import pytest
import torch

from mega_scale.ops.ema import complex_ema_coefficients, damped_ema, ema_coefficients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

PARAMETERS = ("damping", "decay", "expansion", "projection")
COMPLEX = ("alpha", "delta", "theta", "gamma")

# batch, length, channels, averages, bidirectional, share of tokens that begin a document (none: no resets at all)
CASES = [
    (1, 64, 1, 1, False, None),
    (2, 65, 5, 3, False, 1.0),
    (3, 333, 33, 16, False, 0.05),
    (1, 1000, 48, 16, True, 0.01),
    (2, 4096, 256, 16, False, None),
    (1, 5000, 130, 17, False, 0.001),
    (4, 2049, 64, 8, True, None),
    (17, 100, 12, 4, False, 0.1),
]


def make(batch, length, channels, averages, bidirectional):
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    rows = channels * (2 if bidirectional else 1)
    leaves = {"x": normal(batch, length, channels).bfloat16(), "state": normal(batch, rows, averages)}
    leaves |= {name: normal(rows, averages, 1) for name in PARAMETERS[:3]} | {"projection": normal(rows, averages)}
    return leaves, normal(batch, length, channels).bfloat16(), normal(batch, rows, averages)


def make_complex(batch, length, channels, averages):
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    shapes = (channels, averages, 1), (channels, averages, 1), (channels, 1, 1), (channels, averages, 2)
    leaves = {"x": normal(batch, length, channels).bfloat16(), "state": normal(batch, channels, averages, 2)}
    leaves |= {name: normal(*shape) for name, shape in zip(COMPLEX, shapes, strict=True)}
    return leaves, normal(batch, length, channels).bfloat16(), normal(batch, channels, averages, 2)


def coefficients_of(leaves):
    if "alpha" in leaves:
        return complex_ema_coefficients(*(leaves[name] for name in COMPLEX))
    return ema_coefficients(*(leaves[name] for name in PARAMETERS))


def run(leaves, dy, d_end, resets, *, impl, device, x_dtype, dtype, bidirectional):
    leaves = {n: t.to(device, x_dtype if n == "x" else dtype).requires_grad_() for n, t in leaves.items()}
    coefficients = coefficients_of(leaves)
    resets = None if resets is None else resets.to(device)
    y, end = damped_ema(leaves["x"], coefficients, leaves["state"], resets, impl=impl, bidirectional=bidirectional)
    loss = (y.to(dtype) * dy.to(device, dtype)).sum() + (end * d_end.to(device, dtype)).sum()
    found = {"y": y.detach(), "end": end.detach()}
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return found | {"d" + name: gradient for name, gradient in zip(leaves, gradients, strict=True)}


COMPLEX_CASES = [(2, 65, 5, 3, 1.0), (1, 1000, 48, 16, 0.01), (2, 4096, 256, 16, None), (4, 2049, 64, 8, None)]


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", COMPLEX_CASES, ids=str)
def test_complex_averages_match_the_recurrence_in_fp64(case, x_dtype):
    *sizes, share = case
    check(make_complex(*sizes), share, x_dtype, bidirectional=False)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_match_the_recurrence_in_fp64(case, x_dtype):
    batch, length, channels, averages, bidirectional, share = case
    check(make(batch, length, channels, averages, bidirectional), share, x_dtype, bidirectional)


def check(tensors, share, x_dtype, bidirectional):
    (batch, length, _), resets = tensors[0]["x"].shape, None
    if share is not None:
        resets = torch.rand(batch, length, generator=torch.Generator().manual_seed(5)) < share
    truth = run(*tensors, resets, impl="blocked", device="cpu", x_dtype=torch.float64, dtype=torch.float64,
                bidirectional=bidirectional)  # fmt: skip
    got = run(*tensors, resets, impl="triton", device="cuda", x_dtype=x_dtype, dtype=torch.float32,
              bidirectional=bidirectional)  # fmt: skip
    rounded = {"y": 1e-2, "dx": 1e-2} if x_dtype == torch.bfloat16 else {}
    for name, want in truth.items():
        error = (got[name].double().cpu() - want).abs().max() / want.abs().max().clamp(min=1)
        limit = rounded.get(name, 2e-5)
        # not <=, so that NaN fails
        assert error <= limit, f"{name} differs by {error:.1e}"


def test_the_same_tensors_give_the_same_bits():
    tensors = make(2, 1000, 64, 16, False)
    runs = [run(*tensors, None, impl="triton", device="cuda", x_dtype=torch.bfloat16, dtype=torch.float32,
                bidirectional=False) for _ in range(2)]  # fmt: skip
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_rows_in_parts_give_the_same():
    from mega_scale.ops.ema.triton import TILE, triton_ema  # noqa: PLC0415

    leaves, dy, _ = make(1, 5000, 64, 16, False)
    inputs, found = [leaves[name].cuda() for name in ("x", "state", *PARAMETERS)], []
    for splits in (1, 3):
        x, state, *parameters = (t.clone().requires_grad_() for t in inputs)
        y, end = triton_ema(x, ema_coefficients(*parameters), state, None, TILE._replace(splits=splits))
        loss = (y.float() * dy.cuda().float()).sum() + end.sum()
        found.append([y, end, *torch.autograd.grad(loss, [x, state, *parameters])])
    for own, other in zip(*found, strict=True):
        assert (own.float() - other.float()).abs().max() <= 1e-2 * other.float().abs().max()
