"""The timestep norm: the recurrence against the definition, every other form against the recurrence."""

import itertools

import pytest
import torch
from parts import carry_moments, run_parts

from mega_scale.ops.timestep_norm import Moments, timestep_norm

GROUPS, WIDTH = 3, 4
EPS = 1e-5


def make_case(length, batch=3, offset=0.0, state=True, seed=0):
    """Leaves x (B, L, D), weight, bias, mean, var, and what is not differentiated: counts, resets, valid."""
    generator = torch.Generator().manual_seed(seed + length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(batch, length, GROUPS * WIDTH) + offset + normal(batch, 1, GROUPS).repeat_interleave(WIDTH, 2)
    leaves = {"x": x, "weight": normal(GROUPS * WIDTH), "bias": normal(GROUPS * WIDTH)}
    if state:
        leaves |= {"mean": normal(batch, GROUPS) + offset, "var": normal(batch, GROUPS).square() + 0.1}
    resets = torch.rand(batch, length, generator=generator) < 0.04
    valid = torch.rand(batch, length, generator=generator) < 0.8
    resets[0], valid[-1, : length // 2] = False, False
    return leaves, torch.tensor([5, 0, 1000])[:batch], resets, valid


def run(leaves, count, resets=None, valid=None, **options):
    """y, the end state, and the gradients of a random function of all three."""
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    state = Moments(count, leaves["mean"], leaves["var"]) if "mean" in leaves else None
    x, weight, bias = (leaves[name] for name in ("x", "weight", "bias"))
    y, end = timestep_norm(x, weight, bias, GROUPS, EPS, state, resets, valid, **options)
    generator = torch.Generator().manual_seed(7)
    found = {"y": y, "mean": end.mean, "var": end.var}
    loss = sum((t * torch.randn(t.shape, generator=generator, dtype=torch.float64)).sum() for t in found.values())
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True, allow_unused=True)
    return {**found, "count": end.count, **{"d" + name: g for name, g in zip(leaves, gradients, strict=True)}}


def by_definition(leaves, count, resets=None, valid=None):
    """y and the end state, every token's statistics summed anew over its document."""
    x = leaves["x"].unflatten(2, (GROUPS, WIDTH))
    batch, length = x.shape[:2]
    y, ends = torch.zeros_like(x), []
    for b in range(batch):
        begin, n = 0, int(count[b]) if "mean" in leaves else 0
        known = [leaves["mean"][b], leaves["var"][b]] if n else [torch.zeros(GROUPS).double()] * 2
        end = (n, *known) if n else (0, torch.zeros(GROUPS).double(), torch.ones(GROUPS).double())
        for t in range(length):
            if resets is not None and resets[b, t]:
                begin, n = t, 0
                end = (0, torch.zeros(GROUPS).double(), torch.ones(GROUPS).double())
            if valid is not None and not valid[b, t]:
                continue
            seen = x[b, begin : t + 1] if valid is None else x[b, begin : t + 1][valid[b, begin : t + 1]]
            total = n + len(seen)
            mean = (seen.sum((0, 2)) / WIDTH + n * known[0]) / total
            squares = (seen - mean[:, None]).square().sum((0, 2)) / WIDTH
            var = (squares + n * (known[1] + (known[0] - mean).square())) / total
            y[b, t] = (x[b, t] - mean[:, None]) / (var[:, None] + EPS).sqrt()
            end = (total, mean, var)
        ends.append(end)
    y = y.flatten(2) * (leaves["weight"] + 1) + leaves["bias"]
    count, mean, var = zip(*ends, strict=True)
    return {
        "y": y if valid is None else y * valid[..., None],
        "count": torch.tensor(count), "mean": torch.stack(mean), "var": torch.stack(var),
    }  # fmt: skip


def assert_same(got, want, tolerance=1e-10):
    for name in want:
        difference = (got[name].double() - want[name]).abs().max()
        assert difference <= tolerance * want[name].abs().max().clamp(min=1), f"{name} differs by {difference}"


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("padding", [False, True])
def test_the_recurrence_is_the_definition(state, documents, padding):
    leaves, count, resets, valid = make_case(40, state=state, offset=3.0)
    given = resets if documents else None, valid if padding else None
    found = run(leaves, count, *given, impl="recurrent")
    assert_same(found, by_definition(leaves, count, *given), 1e-12)
    assert found["count"].dtype == torch.int64
    if padding:
        assert not found["y"][~valid].any() and not found["dx"][~valid].any()


@pytest.mark.parametrize("impl", ["blocked", "native"])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 500])
def test_forms_match_the_recurrence(length, impl):
    for state, documents, padding in itertools.product([False, True], repeat=3):
        leaves, count, resets, valid = make_case(length, state=state, offset=3.0)
        given = resets if documents else None, valid if padding else None
        want = run(leaves, count, *given, impl="recurrent")
        assert_same(run(leaves, count, *given, impl=impl), want)


def run_in_parts(parts, leaves, count, resets, valid, **options):
    """As `run`, of parts of rows that `part_borders` and `later_gradients` tie together; count is not used."""
    length, generator = leaves["x"].shape[1], torch.Generator().manual_seed(7)
    probes = [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in (leaves["x"].shape, (len(count), GROUPS), (len(count), GROUPS))
    ]

    def act(carry, part):
        cut = slice(part * length // parts, (part + 1) * length // parts)
        own = {name: (t[:, cut] if name == "x" else t).detach().clone().requires_grad_() for name, t in leaves.items()}
        flags = [None if t is None else t[:, cut] for t in (resets, valid)]
        y, end = timestep_norm(*own.values(), GROUPS, EPS, None, *flags, carry=carry, **options)
        loss = (y * probes[0][:, cut]).sum()
        if part == parts - 1:
            loss = loss + (end.mean * probes[1]).sum() + (end.var * probes[2]).sum()
        return y.detach(), end, torch.autograd.grad(loss, list(own.values()))

    found = run_parts(parts, act, carry_moments)
    gradients = list(zip(*(part[2] for part in found), strict=True))
    end = found[-1][1]
    return {
        "y": torch.cat([part[0] for part in found], 1), "mean": end.mean, "var": end.var, "count": end.count,
        "dx": torch.cat(gradients[0], 1), "dweight": sum(gradients[1]), "dbias": sum(gradients[2]),
    }  # fmt: skip


@pytest.mark.parametrize("impl", ["blocked", "native"])
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
def test_parts_of_a_row_equal_the_whole(parts, impl):
    leaves, count, resets, valid = make_case(9 * parts, state=False, offset=3.0)
    resets[1, 9 * (parts - 1)] = resets[1, 8] = resets[2, 0] = True
    valid[0, : 9 * (parts - 1) + 2] = False  # the first parts of a row are padding
    for given in itertools.product([None, resets], [None, valid]):
        got = run_in_parts(parts, leaves, count, *given, impl=impl)
        assert_same(got, run(leaves, count, *given, impl="recurrent"), 1e-12)


def test_refusals_name_what_is_wrong():
    x, weight = torch.zeros(2, 5, 6), torch.zeros(6)
    state = Moments(torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3), torch.ones(2, 3))
    for arguments, words in (
        ({"groups": 6}, "groups=6.*one channel"),
        ({"groups": 4}, "groups=4"),
        ({"groups": 0}, "groups=0"),
        ({"impl": "magic"}, "magic"),
        ({"x": x[:, :0]}, "length of at least 1"),
        ({"x": x.long()}, "floating"),
        ({"bias": torch.zeros(5)}, "bias has shape"),
        ({"resets": torch.zeros(2, 5)}, "resets is torch.float32"),
        ({"valid": torch.zeros(2, 4, dtype=torch.bool)}, "valid is"),
        ({"state": state._replace(count=torch.zeros(2))}, "state.count is torch.float32"),
        ({"state": state._replace(var=torch.ones(2, 2))}, "state.var is"),
        ({"state": state, "carry": lambda *_: None}, "carry brings"),
    ):
        with pytest.raises(ValueError, match=words):
            timestep_norm(**({"x": x, "weight": weight, "bias": weight, "groups": 3} | arguments))
