"""The EMA's Triton kernels, interpreted on a CPU, against the recurrence. `test_ema_triton.py` runs this file.

It needs a process of its own: TRITON_INTERPRET has to be set before anything imports triton.
"""

import os

assert os.environ.get("TRITON_INTERPRET") == "1", "run tests/ops/test_ema_triton.py, which sets TRITON_INTERPRET"

# ruff: noqa: E402
import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from mega_scale.ops.ema import EmaCoefficients, damped_ema
from mega_scale.ops.ema.triton_blocks import BLOCK, find_lanes, triton_ema

PARAMETERS = ("damping", "decay", "expansion", "projection")


def make_leaves(batch, length, channels, averages, with_state=True, dtype=torch.float32, rows=1):
    generator = torch.Generator().manual_seed(length + channels)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    rows *= channels
    leaves = {"x": normal(batch, length, channels).to(dtype)}
    leaves |= {name: normal(rows, averages, 1) for name in PARAMETERS[:3]} | {"projection": normal(rows, averages)}
    if with_state:
        leaves["state"] = normal(batch, rows, averages)
    return leaves


def make_resets(batch, length, place):
    """Documents that begin at random, at every token, around borders of blocks, or nowhere but in one sequence."""
    resets = torch.zeros(batch, length, dtype=torch.bool)
    if place == "random":
        resets = torch.rand(batch, length, generator=torch.Generator().manual_seed(5)) < 0.1
        resets[-1] = False
    elif place == "all":
        resets[:] = True
    elif place == "borders":
        resets[:, [t for t in (0, 15, 16, 17, 48, 64, 79, length - 1) if t < length]] = True
    else:
        resets[0, length // 2] = True
    return resets


def run(leaves, average, resets, names=None):
    """y, the end state, and the gradients, by leaves of these names, of a fixed random function of both, in fp32."""
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    coefficients = EmaCoefficients.from_parameters(*(leaves[name] for name in PARAMETERS))
    y, end = average(leaves["x"], coefficients, leaves.get("state"), resets)
    generator = torch.Generator().manual_seed(7)
    # Exact in bf16, so that every contender gets the same gradient of y.
    dy = torch.randn(y.shape, generator=generator).bfloat16().float()
    loss = (y * dy).sum() + (end * torch.randn(end.shape, generator=generator)).sum()
    names = leaves if names is None else names
    gradients = torch.autograd.grad(loss, [leaves[name] for name in names])
    named = {"y": y.detach(), "end": end.detach()}
    return named | {"d" + name: gradient for name, gradient in zip(names, gradients, strict=True)}


def recurrent(x, coefficients, state, resets, **options):
    return damped_ema(x, coefficients, state, resets, impl="recurrent", **options)


def assert_same(got, want, tolerances):
    assert got.keys() == want.keys()
    for name in want:
        difference = (got[name].float() - want[name].float()).abs().max()
        tolerance = tolerances.get(name, tolerances["else"])
        # not <=, so that NaN fails
        assert difference <= tolerance * want[name].abs().max().clamp(min=1), f"{name} differs by {difference}"


# batch, length, channels, averages, lanes per sequence (none: as chosen), state, where documents begin
CASES = [
    (1, 1, 1, 1, None, True, None),
    (2, 1, 5, 3, None, True, "all"),
    (2, 2, 6, 16, None, False, None),
    (2, 15, 3, 3, None, True, "one"),
    (2, 16, 8, 3, None, False, "borders"),
    (1, 17, 9, 1, 2, True, None),
    (2, 63, 5, 3, None, True, "random"),
    (3, 64, 7, 4, 3, True, "borders"),
    (1, 130, 9, 16, 4, True, None),
    (2, 130, 5, 16, 3, True, "random"),
    (2, 130, 3, 1, 5, False, "borders"),
    (2, 130, 6, 3, 9, True, "one"),
    (1, 40, 4, 3, 7, True, "all"),
    (17, 33, 3, 3, 2, True, "random"),
    (1, 160, 6, 17, 2, True, "random"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fp32_matches_the_recurrence(case):
    batch, length, channels, averages, splits, with_state, place = case
    leaves = make_leaves(batch, length, channels, averages, with_state)
    resets = None if place is None else make_resets(batch, length, place)

    def kernels(x, coefficients, state, resets):
        return triton_ema(x, coefficients, state, resets, splits)

    assert_same(run(leaves, kernels, resets), run(leaves, recurrent, resets), {"else": 1e-5})


@pytest.fixture
def tf32(monkeypatch):
    """Products marked tf32 lose what matrix units do not read, a number's last 13 bits; interpretation keeps all."""
    exact, marks = InterpreterBuilder.create_dot, []

    def cut(handle):
        bits = np.ascontiguousarray(handle.data).view(np.uint32) & np.uint32(0xFFFFE000)
        return TensorHandle(bits.view(np.float32), handle.dtype)

    def create_dot(self, a, b, d, input_precision, *more):
        marks.append(str(input_precision))
        if marks[-1].upper().endswith("TF32"):
            a, b = cut(a), cut(b)
        return exact(self, a, b, d, input_precision, *more)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    return marks


@pytest.mark.parametrize("case", [CASES[i] for i in (1, 6, 8, 9, 13)], ids=str)
def test_bf16_keeps_states_in_fp32(case, tf32):
    batch, length, channels, averages, splits, with_state, place = case
    leaves = make_leaves(batch, length, channels, averages, with_state, torch.bfloat16)
    resets = None if place is None else make_resets(batch, length, place)

    def kernels(x, coefficients, state, resets):
        y, end = triton_ema(x, coefficients, state, resets, splits)
        assert y.dtype == torch.bfloat16 and end.dtype == torch.float32
        return y, end

    got, want = run(leaves, kernels, resets), run({**leaves, "x": leaves["x"].float()}, recurrent, resets)
    # Interpretation cuts off what bf16 does not hold, up to 7.8e-3 (a GPU rounds, by up to 3.9e-3).
    # The gradient by the state comes over the products of states alone.
    assert_same(got, want, {"y": 8.5e-3, "dx": 8.5e-3, "end": 1e-5, "dstate": 1e-5, "else": 1e-3})
    assert len({mark.upper().rpartition(".")[2] for mark in tf32}) == 2  # tf32 and tf32x3


@pytest.mark.parametrize("impl, bidirectional", [("triton", False), ("triton", True), ("triton_walk", True)])
def test_damped_ema_takes_it_in_both_directions(impl, bidirectional):
    leaves = make_leaves(2, 70, 5, 3, rows=2 if bidirectional else 1)
    resets = make_resets(2, 70, "random")

    def named(x, coefficients, state, resets):
        return damped_ema(x, coefficients, state, resets, bidirectional=bidirectional, impl=impl)

    def truth(x, coefficients, state, resets):
        return recurrent(x, coefficients, state, resets, bidirectional=bidirectional)

    assert_same(run(leaves, named, resets), run(leaves, truth, resets), {"else": 1e-5})


def in_parts(parts, bidirectional):
    """Average parts of a sequence by kernels, with states that travel between them within this process."""

    def average(x, coefficients, state, resets):
        cuts = list(zip(x.chunk(parts, 1), [None] * parts if resets is None else resets.chunk(parts, 1), strict=True))
        sent = []

        def run(carry, part):
            x, resets = part
            options = {"bidirectional": bidirectional, "carry": carry, "impl": "triton"}
            return damped_ema(x, coefficients, None, resets, **options)

        def collect(end, log_fade, passes, both):
            assert both is bidirectional
            sent.append((end, log_fade.exp() * (1 if passes is None else passes[:, None, None])))
            return lambda: torch.zeros_like(end)

        for part in cuts:
            run(collect, part)
        half = x.shape[2]
        before = [torch.zeros_like(sent[0][0]) for _ in cuts]
        for i in range(1, parts):
            ahead, back = i, parts - 1 - i
            for to, start, rows in ((ahead, ahead - 1, slice(half)), (back, back + 1, slice(half, None))):
                end, fade = (t[..., rows, :] for t in sent[start])
                came = end + fade * before[start][:, rows]
                before[to] = torch.cat([came, before[to][:, half:]] if start < to else [before[to][:, :half], came], 1)
        found = [run(lambda *_, state=state: lambda: state, part) for state, part in zip(before, cuts, strict=True)]
        ends = [found[-1][1][:, :half]] + ([found[0][1][:, half:]] if bidirectional else [])
        return torch.cat([y for y, _ in found], 1), torch.cat(ends, 1)

    return average


@pytest.mark.parametrize("place", [None, "random", "borders", "one"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_parts_of_a_sequence_equal_the_whole(bidirectional, place):
    leaves = make_leaves(2, 66, 4, 3, with_state=False, rows=2 if bidirectional else 1)
    resets = None if place is None else make_resets(2, 66, place)
    if place == "borders":
        resets[:, [22, 43]] = True  # the first token of a part, and the last of one

    def truth(x, coefficients, state, resets):
        return recurrent(x, coefficients, state, resets, bidirectional=bidirectional)

    assert_same(run(leaves, in_parts(3, bidirectional), resets), run(leaves, truth, resets), {"else": 1e-5})


def test_documents_do_not_reach_each_other():
    """Infinities in one document leave the others untouched: states are forgotten, not multiplied by zero."""
    leaves = make_leaves(1, 100, 3, 3, with_state=False)
    coefficients = EmaCoefficients.from_parameters(*(leaves[name] for name in PARAMETERS))
    resets = torch.zeros(1, 100, dtype=torch.bool)
    resets[:, [0, 30, 70]] = True
    clean, _ = damped_ema(leaves["x"][:, 30:70], coefficients, impl="recurrent")
    poisoned = leaves["x"].clone()
    poisoned[:, 10:30] = torch.inf
    poisoned[:, 70:80] = -torch.inf
    for splits in (1, 3):
        y, _ = triton_ema(poisoned, coefficients, None, resets, splits)
        torch.testing.assert_close(y[:, 30:70], clean, atol=1e-5, rtol=1e-5)


def test_strided_inputs_and_gradients_are_read_right():
    leaves = make_leaves(2, 50, 6, 3, with_state=False)
    coefficients = EmaCoefficients.from_parameters(*(leaves[name] for name in PARAMETERS))
    wide = torch.cat([leaves["x"], leaves["x"]], 2)
    for strided in (wide[..., ::2], leaves["x"].transpose(0, 1).contiguous().transpose(0, 1)):
        assert not strided.is_contiguous()
        x = strided.detach().requires_grad_()
        found = []
        for impl in ("recurrent", "triton", "triton_walk"):
            y, _ = damped_ema(x, coefficients, impl=impl)
            found.append(torch.autograd.grad(y.sum(), x)[0])  # the gradient of a sum has strides of zero
        for own in found[1:]:
            torch.testing.assert_close(own, found[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("place", [None, "random", "all"])
@pytest.mark.parametrize("length", [1, 100, 5000])
def test_lanes_hold_every_token_once(length, place):
    resets = None if place is None else make_resets(2, length, place)
    lanes = find_lanes(torch.empty(2, length, 64), resets)
    sizes = lanes.starts.diff(dim=1)
    assert lanes.starts[:, 0].eq(0).all() and lanes.starts[:, -1].eq(length).all()
    assert sizes.min() >= 0 and sizes.max() <= BLOCK
    assert lanes.keep.shape == sizes.shape == (2, lanes.splits * lanes.blocks)
    assert (sizes.gather(1, lanes.last[:, None].long())[:, 0] == lanes.last_filled).all()
    if length == 5000:
        assert lanes.splits * 2 >= 16  # rows of products are full
    if resets is not None:
        begins = torch.zeros_like(resets)
        for row in range(2):
            begins[row, lanes.starts[row, :-1][lanes.keep[row] == 0].long()] = True
        assert torch.equal(begins, resets)


def test_dtypes_without_a_kernel_are_refused():
    leaves = {name: leaf.double() for name, leaf in make_leaves(1, 5, 2, 2).items()}
    coefficients = EmaCoefficients.from_parameters(*(leaves[name] for name in PARAMETERS))
    with pytest.raises(ValueError, match="float64"):
        damped_ema(leaves["x"], coefficients, impl="triton")
