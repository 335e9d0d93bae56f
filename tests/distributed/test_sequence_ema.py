"""The moving average over parts of a row against one scan of the whole row, in fp64: values, states, all gradients."""

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from mega_scale.ops.ema import complex_ema_coefficients, damped_ema, ema_coefficients
from mega_scale.parallel import ParallelConfig, World
from mega_scale.parallel.sequence_parallel import StateExchange
from mega_scale.parallel.world import Axis

pytestmark = pytest.mark.distributed

BATCH, CHANNELS, AVERAGES = 3, 5, 4
PARTS = (2, 3, 4, 8)
PER_RANK = {2: 67, 3: 32, 4: 33, 8: 1}  # tokens: block borders, one block, one more, a single token
DOCUMENTS = ("none", "borders", "spanning", "random")
KINDS = ("one way", "both ways", "complex")
CASES = list(itertools.product(PARTS, KINDS, DOCUMENTS))


def problem(parts: int, kind: str, documents: str) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(7 * parts + KINDS.index(kind))
    length, rows = parts * PER_RANK[parts], CHANNELS * (2 if kind == "both ways" else 1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    resets = torch.zeros(BATCH, length, dtype=torch.bool)
    if documents == "borders":  # on the first token of a part, one before it, one after it
        for row, shift in enumerate((0, -1, 1)):
            resets[row, (torch.arange(1, parts) * PER_RANK[parts] + shift) % length] = True
    elif documents == "spanning":  # a document begins early in the first part and ends late in the last
        resets[0, 1 % length] = resets[0, length - 1] = resets[1, length // 2] = True
    elif documents == "random":
        resets = torch.rand(BATCH, length, generator=generator) < 0.05
    shapes = {
        "damping": (rows, AVERAGES, 1),
        "decay": (rows, AVERAGES, 1),
        "expansion": (rows, 1, 1) if kind == "complex" else (rows, AVERAGES, 1),  # of a complex one, the angle
        "projection": (rows, AVERAGES, 2) if kind == "complex" else (rows, AVERAGES),
    }
    parameters = {name: draw(*shape) for name, shape in shapes.items()}
    parameters["decay"] -= 3  # so that much is left of a state after a part
    rest = {"x": draw(BATCH, length, CHANNELS), "probe": draw(BATCH, length, CHANNELS)}
    return parameters | rest | {"resets": None if documents == "none" else resets}


PARAMETERS = ("damping", "decay", "expansion", "projection")


def differentiate(given: dict[str, Any], kind: str, **options: Any) -> dict[str, Tensor]:
    leaves = {name: given[name].clone().requires_grad_() for name in ("x", *PARAMETERS)}
    make = complex_ema_coefficients if kind == "complex" else ema_coefficients
    coefficients = make(*(leaves[name] for name in PARAMETERS))
    both = kind == "both ways"
    y, state = damped_ema(leaves["x"], coefficients, resets=given["resets"], bidirectional=both, **options)
    (y * given["probe"]).sum().backward()
    return {"y": y.detach(), "state": state.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}


def all_cases() -> list[dict[str, Tensor] | None]:
    found: list[dict[str, Tensor] | None] = []
    with World.start(ParallelConfig(timeout_s=120)) as world:
        groups = {parts: dist.new_group(list(range(parts))) for parts in PARTS}
        for parts, kind, documents in CASES:
            if world.rank >= parts:
                found.append(None)
                continue
            given = problem(parts, kind, documents)
            cut = slice(world.rank * PER_RANK[parts], (world.rank + 1) * PER_RANK[parts])
            mine = given | {name: given[name][:, cut] for name in ("x", "probe", "resets") if given[name] is not None}
            exchange = StateExchange(Axis(groups[parts], world.rank, parts))
            found.append(differentiate(mine, kind, carry=exchange))
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(all_cases, max(PARTS), tmp_path_factory.mktemp("ema"))


@pytest.mark.parametrize(("parts", "kind", "documents"), CASES)
def test_parts_equal_the_whole(ranks, parts, kind, documents):
    number = CASES.index((parts, kind, documents))
    found = [ranks[rank][number] for rank in range(parts)]
    expected = differentiate(problem(parts, kind, documents), kind, impl="recurrent")
    joined = {name: torch.cat([part[name] for part in found], 1) for name in ("y", "dx")}
    joined |= {f"d{name}": sum(part[f"d{name}"] for part in found) for name in PARAMETERS}
    # The last part knows the state after the row; the first, in its second half, that before it.
    states = [found[-1]["state"][:, :CHANNELS], found[0]["state"][:, CHANNELS:]]
    joined["state"] = torch.cat(states, 1)
    for name, tensor in expected.items():
        torch.testing.assert_close(joined[name], tensor, rtol=1e-12, atol=1e-12, msg=name)


def test_carry_refuses_what_it_cannot_have():
    given = problem(2, "one way", "none")
    coefficients = ema_coefficients(*(given[name] for name in PARAMETERS))
    carry = StateExchange(Axis(None, 0, 1))
    with pytest.raises(ValueError, match="carry"):
        damped_ema(given["x"], coefficients, carry=carry, truncation=4)
    with pytest.raises(ValueError, match="carry"):
        damped_ema(given["x"], coefficients, torch.zeros(BATCH, CHANNELS, AVERAGES).double(), carry=carry)
