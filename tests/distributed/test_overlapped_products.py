"""Products with what travels beside them against products of the whole, at awkward sizes, gradients included."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_ranks
from symmetric_memory import DIVIDED, REFERENCE, on_cpus
from torch import Tensor

from mega_scale.parallel import ParallelConfig, World
from mega_scale.parallel.overlap import gathered_products, scattered_product
from mega_scale.parallel.world import Axis

pytestmark = pytest.mark.distributed

RANKS = (2, 4)
FORMS = {"reference": REFERENCE, "divided": DIVIDED}
# Rows, tokens, channels a rank, and outputs of each weight.
SIZES = [(1, 1, 1, (1,)), (2, 7, 3, (5,)), (3, 5, 6, (4, 9)), (1, 13, 16, (1, 2, 3))]
# Whether all channels are read by something else too, and which products are.
READ = {"products": (False, None), "products and channels": (True, None), "the first product": (False, 1)}
DTYPES = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaves(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype).detach().clone().requires_grad_() for name, tensor in tensors.items()}


def outcome(y: list[Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs, and gradients of some sum of them."""
    sum((t.double() * draw(*t.shape, seed=50 + i)).sum() for i, t in enumerate(y)).backward()
    found = {f"y{i}": t.detach() for i, t in enumerate(y)}
    return found | {f"d{name}": t.grad if t.grad is not None else torch.zeros_like(t) for name, t in given.items()}


def gathered(size: Any, read: str, dtype: torch.dtype, axis: Axis, fused: bool) -> dict[str, Tensor]:
    """By the operator, or by a product of the whole on this rank and gradients that are summed."""
    rows, tokens, channels, widths = size
    also, count = READ[read]
    width = channels * axis.size
    own = slice(axis.rank * channels, (axis.rank + 1) * channels)
    whole = draw(rows, tokens, width, seed=1)
    tensors = {f"w{i}": draw(w, width, seed=9 + i + 10 * axis.rank) for i, w in enumerate(widths)}
    given = leaves({"x": whole[..., own] if fused else whole} | tensors, dtype)
    x, *weights = given.values()
    if fused:
        all_, *outs = gathered_products(axis, x, *weights)
    else:
        all_, outs = x * 1, [F.linear(x, weight) for weight in weights]
    found = outcome([*outs[:count], *([all_] if also else [])], given)
    if not fused:
        total = found["dx"].double()
        dist.all_reduce(total, group=axis.group)
        found["dx"] = total[..., own]
    return found


def scattered(size: Any, dtype: torch.dtype, axis: Axis, fused: bool) -> dict[str, Tensor]:
    rows, tokens, channels, (inner, *_) = size
    width = channels * axis.size
    own = slice(axis.rank * channels, (axis.rank + 1) * channels)
    tensors = {
        "x": draw(rows, tokens, inner, seed=3 + 10 * axis.rank),
        "w": draw(width, inner, seed=4 + 10 * axis.rank),
    }
    given = leaves(tensors, dtype)
    if fused:
        return outcome([scattered_product(axis, *given.values())], given)
    y = F.linear(*given.values())
    # What every rank's outputs get of every rank's sum.
    probes = [torch.empty(rows, tokens, channels, dtype=torch.float64) for _ in range(axis.size)]
    dist.all_gather(probes, draw(rows, tokens, channels, seed=50), group=axis.group)
    (y.double() * torch.cat(probes, -1)).sum().backward()
    total = y.detach().double()
    dist.all_reduce(total, group=axis.group)
    return {"y0": total[..., own], **{f"d{name}": t.grad for name, t in given.items()}}


def study() -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    with World.start(ParallelConfig(timeout_s=120)) as world:
        for ranks in RANKS:
            group = dist.new_group(list(range(ranks)))
            if world.rank >= ranks:
                continue
            axis = Axis(group, world.rank, ranks, overlaps=True)
            for name, form in FORMS.items():
                with on_cpus(form):
                    for size in SIZES:
                        for dtype in DTYPES:
                            for read in READ:
                                key = "gather", ranks, name, size, dtype, read
                                found[key] = [gathered(size, read, dtype, axis, fused) for fused in (True, False)]
                            key = "scatter", ranks, name, size, dtype, ""
                            found[key] = [scattered(size, dtype, axis, fused) for fused in (True, False)]
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[Any, Any]]:
    return run_ranks(study, max(RANKS), tmp_path_factory.mktemp("products"))


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["gather", "scatter"])
def test_products_are_those_of_the_whole(found, kind, form, ranks):
    """PyTorch's reference form, and its division by ranks, whose sums are rounded once a rank."""
    compared = 0
    for rank in found:
        for key, (fused, plain) in rank.items():
            if key[:3] != (kind, ranks, form):
                continue
            within = DTYPES[key[4]]
            for name, expected in plain.items():
                scale = max(float(expected.abs().max()), 1.0) if expected.numel() else 1.0
                torch.testing.assert_close(
                    fused[name].double() / scale,
                    expected.double() / scale,
                    rtol=within,
                    atol=within,
                    msg=f"{key} {name}",
                )
                compared += 1
    assert compared >= ranks * len(SIZES) * len(DTYPES) * 3
