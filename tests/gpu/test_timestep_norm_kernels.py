"""The timestep norm's Triton kernels on a GPU, against the C++ form in fp64."""

import pytest
import torch

from mega_scale.ops.timestep_norm import Moments, timestep_norm, timestep_norm_and_residuals

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def run(leaves, count, flags, groups, dtype, device, impl):
    """y, the end state and the gradients of a fixed function of both and of residuals; x is of its own dtype."""
    leaves = {n: (t if n == "x" else t.to(dtype)).to(device).detach().requires_grad_() for n, t in leaves.items()}
    x, weight, bias, mean, var = leaves.values()
    flags = [None if t is None else t.to(device) for t in flags]
    state = Moments(count.to(device), mean, var)
    y, streams, end = timestep_norm_and_residuals(x, weight, bias, groups, 1e-5, state, *flags, impl=impl)
    generator, found = torch.Generator().manual_seed(7), {"y": y, "mean": end.mean, "var": end.var}
    found |= dict(enumerate(streams))
    probes = [torch.randn(t.shape, generator=generator).bfloat16().to(device, t.dtype) for t in found.values()]
    gradients = torch.autograd.grad(list(found.values()), list(leaves.values()), probes)
    return {**found, **{"d" + name: g for name, g in zip(leaves, gradients, strict=True)}, "count": end.count}


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("flagged", [False, True])
@pytest.mark.parametrize("batch, length, channels, groups", [(1, 1, 8, 2), (3, 65, 60, 3), (2, 4097, 2048, 64)])
def test_kernels_match_the_fp64_form(batch, length, channels, groups, flagged, x_dtype):
    generator = torch.Generator().manual_seed(length)
    leaves = {"x": (torch.randn(batch, length, channels, generator=generator) + 3).to(x_dtype)}
    leaves |= {name: torch.randn(channels, generator=generator) for name in ("weight", "bias")}
    leaves |= {"mean": torch.randn(batch, groups, generator=generator)}
    leaves |= {"var": torch.rand(batch, groups, generator=generator) + 0.1}
    count, flags = torch.arange(batch) * 7, [None, None]
    if flagged:
        flags = [torch.rand(batch, length, generator=generator) < share for share in (0.02, 0.9)]
    want = run(leaves | {"x": leaves["x"].double()}, count, flags, groups, torch.float64, "cpu", "native")
    got = run(leaves, count, flags, groups, torch.float32, "cuda", "triton")
    for name, exact in want.items():
        rounding = 2**-8 if got[name].dtype == torch.bfloat16 else 1e-5
        difference = (got[name].cpu().double() - exact).abs().max()
        assert difference <= rounding * exact.abs().max().clamp(min=1), f"{name} differs by {difference}"


def test_auto_takes_it():
    x, weight = torch.randn(2, 70, 64, device="cuda"), torch.zeros(64, device="cuda")
    y, _ = timestep_norm(x, weight, weight, 4)
    assert torch.equal(y, timestep_norm(x, weight, weight, 4, impl="triton")[0])
