"""The EMA's Triton kernels, interpreted on a CPU, against the recurrence in fp64. `test_ema_triton.py` runs this file.

It needs a process of its own: TRITON_INTERPRET has to be set before anything imports triton.
"""

import os

assert os.environ.get("TRITON_INTERPRET") == "1", "run tests/ops/test_ema_triton.py, which sets TRITON_INTERPRET"

# ruff: noqa: E402
import pytest
import torch
from interpreting import round_bf16
from parts import average_in_parts
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction

from mega_scale.ops import opaque
from mega_scale.ops.ema import (
    EmaCoefficients,
    complex_ema_coefficients,
    damped_ema,
    damped_ema_and_residual,
    ema_coefficients,
)
from mega_scale.ops.ema import triton as ema_triton
from mega_scale.ops.ema.triton import Tile, triton_ema, triton_ema_and_residual

PARAMETERS = ("damping", "decay", "expansion", "projection")
COMPLEX = ("alpha", "delta", "theta", "gamma")
# Segments of 8 tokens, tiles of 16, so that short rows have several of all.
SMALL = Tile(segments=2, block=4, steps=2, channels=8)
SPLIT = SMALL._replace(splits=3)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Bf16 rounded to the nearest, as GPUs do, where interpretation cuts off; and functions of kernels called faster:
    each call would prepare triton's language anew, which starting a kernel has done."""
    call = InterpretedFunction.__call__

    def called(self, *arguments, **options):
        ours = self.fn.__module__.startswith(ema_triton.__name__)
        return (self.rewrite() if ours else call.__get__(self))(*arguments, **options)

    round_bf16(monkeypatch)
    monkeypatch.setattr(InterpretedFunction, "__call__", called)


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
    """Documents that begin at random, at every token, around borders of blocks and segments, or only in one row."""
    resets = torch.zeros(batch, length, dtype=torch.bool)
    if place == "random":
        resets = torch.rand(batch, length, generator=torch.Generator().manual_seed(5)) < 0.1
        resets[-1] = False
    elif place == "all":
        resets[:] = True
    elif place == "borders":
        resets[:, [t for t in (0, 3, 4, 5, 15, 16, 17, 19, 48, 64, length - 1) if t < length]] = True
    elif place == "one":
        resets[0, length // 2] = True
    return resets


def make_complex_leaves(batch, length, channels, averages, with_state=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(length + channels)
    shapes = (channels, averages, 1), (channels, averages, 1), (channels, 1, 1), (channels, averages, 2)
    leaves = {"x": torch.randn(batch, length, channels, generator=generator).to(dtype)}
    leaves |= {name: torch.randn(shape, generator=generator) for name, shape in zip(COMPLEX, shapes, strict=True)}
    if with_state:
        leaves["state"] = torch.randn(batch, channels, averages, 2, generator=generator)
    return leaves


def coefficients_of(leaves):
    if "alpha" in leaves:
        return complex_ema_coefficients(*(leaves[name] for name in COMPLEX))
    return ema_coefficients(*(leaves[name] for name in PARAMETERS))


def run(leaves, average, resets, names=None, dtype=torch.float32):
    """y, the end state, and the gradients, by leaves of these names, of a fixed random function of both."""
    leaves = {name: leaf.clone() if name == "x" else leaf.to(dtype) for name, leaf in leaves.items()}
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    coefficients = coefficients_of(leaves)
    y, end = average(leaves["x"], coefficients, leaves.get("state"), resets)
    generator = torch.Generator().manual_seed(7)
    # Exact in bf16, so that every contender gets the same gradient of y.
    dy = torch.randn(y.shape, generator=generator).bfloat16().to(y.dtype)
    loss = (y * dy).sum() + (end * torch.randn(end.shape, generator=generator)).sum()
    names = leaves if names is None else names
    gradients = torch.autograd.grad(loss, [leaves[name] for name in names])
    named = {"y": y.detach(), "end": end.detach()}
    return named | {"d" + name: gradient for name, gradient in zip(names, gradients, strict=True)}


def truth(leaves, resets, names=None, **options):
    """The same by the recurrence in fp64; long rows by blocks."""
    impl = "recurrent" if leaves["x"].shape[1] < 200 else "blocked"

    def average(x, coefficients, state, resets):
        return damped_ema(x, coefficients, state, resets, impl=impl, **options)

    return run({**leaves, "x": leaves["x"].double()}, average, resets, names, torch.float64)


def tiled(tile):
    def average(x, coefficients, state, resets):
        return triton_ema(x, coefficients, state, resets, tile)

    return average


def assert_same(got, want, tolerance=1e-5):
    assert got.keys() == want.keys()
    for name in want:
        difference = (got[name].double() - want[name]).abs()
        allowed = tolerance * want[name].abs().max().clamp(min=1)
        if got[name].dtype == torch.bfloat16:
            allowed = allowed + want[name].abs() * 2**-8  # its own rounding
        # not <=, so that NaN fails
        assert (difference <= allowed).all(), f"{name} differs by {difference.max()}"


FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64
# dtype of tokens, batch, length, channels, averages, sizes, state, where documents begin
CASES = [
    (FP32, 1, 1, 1, 1, SMALL, True, None),
    (FP32, 2, 7, 5, 3, SMALL, True, "borders"),
    (BF16, 2, 8, 3, 16, SMALL, False, None),
    (BF16, 2, 16, 4, 3, SMALL, True, "all"),
    (FP32, 1, 65, 9, 1, SMALL, True, None),
    (FP32, 1, 67, 3, 3, SPLIT, True, "random"),
    (FP32, 1, 67, 3, 20, SPLIT, True, "random"),
    (BF16, 1, 64, 3, 3, SPLIT, False, "borders"),
    (BF16, 1, 63, 2, 3, SPLIT, True, None),
    (BF16, 1, 63, 5, 32, Tile(), True, None),
    (FP32, 2, 64, 3, 3, Tile(), False, "one"),
    (BF16, 1, 65, 17, 16, Tile(), True, "random"),
    (BF16, 1, 97, 2, 3, Tile(segments=4, steps=2), True, "all"),
    (BF16, 1, 500, 3, 16, Tile(), True, "one"),
    (FP32, 1, 1100, 3, 3, Tile(), True, None),
    (BF16, 1, 1100, 2, 1, Tile(splits=2), False, "random"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_match_the_recurrence_in_fp64(case):
    dtype, batch, length, channels, averages, tile, with_state, place = case
    leaves = make_leaves(batch, length, channels, averages, with_state, dtype)
    resets = None if place is None else make_resets(batch, length, place)
    got = run(leaves, tiled(tile), resets)
    assert got["y"].dtype == got["dx"].dtype == dtype and got["end"].dtype == FP32
    assert_same(got, truth(leaves, resets), 1e-5 if dtype == FP32 else 2e-5)


COMPLEX_CASES = [
    (FP32, 1, 1, 2, 1, SMALL, True, None),
    (FP32, 2, 7, 5, 3, SMALL, True, "borders"),
    (BF16, 2, 16, 4, 3, SMALL, True, "all"),
    (FP32, 1, 67, 3, 3, SPLIT, True, "random"),
    (BF16, 1, 63, 2, 3, SPLIT, True, None),
    (BF16, 1, 63, 3, 16, Tile(), True, None),
    (FP32, 2, 64, 3, 3, Tile(), False, "one"),
    (FP32, 1, 65, 3, 16, Tile(), True, "random"),
    (BF16, 1, 500, 3, 8, Tile(), True, "one"),
    (FP32, 1, 1100, 2, 3, Tile(splits=2), True, None),
]


@pytest.mark.parametrize("case", COMPLEX_CASES, ids=str)
def test_complex_averages_match_the_recurrence_in_fp64(case):
    dtype, batch, length, channels, averages, tile, with_state, place = case
    leaves = make_complex_leaves(batch, length, channels, averages, with_state, dtype)
    resets = None if place is None else make_resets(batch, length, place)
    got = run(leaves, tiled(tile), resets)
    assert got["y"].dtype == got["dx"].dtype == dtype and got["end"].dtype == FP32
    assert_same(got, truth(leaves, resets), 1e-5 if dtype == FP32 else 2e-5)


# maker of leaves, dtype of tokens, length, channels, averages, sizes, where documents begin
OMEGA_CASES = [
    (make_leaves, FP32, 1, 1, 1, SMALL, None),
    (make_leaves, FP32, 67, 3, 20, SPLIT, "random"),
    (make_leaves, BF16, 65, 17, 16, Tile(), "one"),
    (make_leaves, BF16, 63, 5, 32, Tile(), None),
    (make_complex_leaves, FP64, 35, 3, 3, SPLIT, "borders"),
    (make_complex_leaves, BF16, 130, 9, 16, Tile(), None),
    (make_complex_leaves, FP32, 65, 3, 16, Tile(), "random"),
]


@pytest.mark.parametrize("beside, others", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("case", OMEGA_CASES, ids=lambda case: f"{case[0].__name__}, {case[1:]}")
def test_omega_and_gradients_of_other_readers_are_part_of_the_kernels(case, beside, others):
    make, dtype, length, channels, averages, tile, place = case
    number = FP64 if dtype == FP64 else FP32
    leaves = {**make(1, length, channels, averages, dtype=dtype), "omega": torch.linspace(-1, 1, channels)}
    resets = None if place is None else make_resets(1, length, place)
    slopes = torch.linspace(-1, 1, length * channels).view(1, length, channels).bfloat16()

    def found(average, dtype, number):
        own = {name: leaf.to(dtype if name == "x" else number).requires_grad_() for name, leaf in leaves.items()}
        omega = own["omega"] if beside else None
        y, residual, end = average(own["x"], coefficients_of(own), own["state"], resets, omega)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).bfloat16().to(y.dtype)
        loss = (y * dy).sum() + end.sum() + ((residual * slopes.to(y.dtype)).sum() if others else 0)
        names = [name for name in own if beside or name != "omega"]
        gradients = torch.autograd.grad(loss, [own[name] for name in names])
        return {"y": y.detach()} | {"d" + name: d for name, d in zip(names, gradients, strict=True)}

    def kernels(x, coefficients, state, resets, omega):
        return triton_ema_and_residual(x, coefficients, state, resets, omega, tile)

    def recurrence(x, coefficients, state, resets, omega):
        return damped_ema_and_residual(x, coefficients, state, resets, omega=omega, impl="recurrent")

    tolerance = {FP64: 1e-10, FP32: 1e-5, BF16: 2e-5}[dtype]
    assert_same(found(kernels, dtype, number), found(recurrence, FP64, FP64), tolerance)


# maker of leaves, dtype of tokens, length, averages, sizes, state, where documents begin
FP64_CASES = [
    (make_leaves, FP64, 35, 3, SPLIT, True, "random"),
    (make_leaves, FP64, 65, 32, Tile(), False, "one"),
    (make_complex_leaves, FP64, 1, 3, SMALL, True, None),
    (make_complex_leaves, FP64, 35, 3, SPLIT, True, "borders"),
    (make_complex_leaves, FP64, 63, 3, Tile(), True, "borders"),
    (make_complex_leaves, FP64, 64, 16, Tile(), True, "random"),
    (make_complex_leaves, FP64, 65, 3, Tile(), False, None),
    (make_complex_leaves, FP64, 500, 2, Tile(), True, "one"),
    (make_complex_leaves, BF16, 16, 3, SMALL, True, "all"),
]


@pytest.mark.parametrize("case", FP64_CASES, ids=lambda case: f"{case[0].__name__}, {case[1:]}")
def test_fp64_coefficients_give_fp64_averages(case):
    make, dtype, length, averages, tile, with_state, place = case
    leaves = {name: leaf.double() for name, leaf in make(1, length, 3, averages, with_state).items()}
    leaves["x"][:, : length // 5] = 0  # as padding is
    leaves["x"] = leaves["x"].to(dtype)
    resets = None if place is None else make_resets(1, length, place)
    got = run(leaves, tiled(tile), resets, dtype=FP64)
    assert got["y"].dtype == got["dx"].dtype == dtype and {got[name].dtype for name in got} <= {dtype, FP64}

    def recurrence(x, coefficients, state, resets):
        return damped_ema(x, coefficients, state, resets, impl="recurrent")

    want = run({**leaves, "x": leaves["x"].double()}, recurrence, resets, dtype=FP64)
    assert_same(got, want, 1e-10)


def test_slow_decays_keep_their_precision():
    leaves = make_leaves(1, 300, 3, 4, dtype=torch.bfloat16)
    leaves["decay"] -= 5
    assert_same(run(leaves, tiled(Tile()), None), truth(leaves, None), 2e-5)


@pytest.mark.parametrize("kept, with_state", [("y", True), ("end", True), ("end", False)])
@pytest.mark.parametrize("make", [make_leaves, make_complex_leaves])
def test_either_result_can_go_without_a_gradient(make, kept, with_state):
    leaves = make(1, 35, 3, 3, with_state)
    resets = make_resets(1, 35, "one")
    # Where nothing but the end has a gradient, projections have none.
    names = [name for name in leaves if kept == "y" or name not in ("projection", "gamma")]

    def part(average):
        def partly(*arguments):
            y, end = average(*arguments)
            return (y, end.detach()) if kept == "y" else (y.detach(), end)

        return partly

    def recurrence(x, coefficients, state, resets):
        return damped_ema(x, coefficients, state, resets, impl="recurrent")

    want = run({**leaves, "x": leaves["x"].double()}, part(recurrence), resets, names, torch.float64)
    assert_same(run(leaves, part(tiled(SMALL)), resets, names), want)


def test_damped_ema_takes_it_in_both_directions():
    leaves, resets = make_leaves(2, 35, 3, 3, rows=2), make_resets(2, 35, "random")

    def average(x, coefficients, state, resets):
        return damped_ema(x, coefficients, state, resets, bidirectional=True, impl="triton")

    assert_same(run(leaves, average, resets), truth(leaves, resets, bidirectional=True))


PARTS = [
    (1, False, "borders", FP32, SMALL),
    (2, False, None, FP32, SPLIT),
    (3, True, "borders", FP32, SPLIT),
    (4, False, "random", BF16, SPLIT),
    (2, True, "one", FP32, SMALL),
    (4, True, None, FP32, SMALL),
]


COMPLEX_PARTS = [
    (2, False, "borders", FP32, SPLIT),
    (3, False, None, BF16, SPLIT),
    (4, False, "random", FP32, SMALL),
    (2, False, "borders", FP64, SMALL),
]


@pytest.mark.parametrize(
    "case, make", [*((case, make_leaves) for case in PARTS), *((case, make_complex_leaves) for case in COMPLEX_PARTS)]
)
def test_parts_of_a_sequence_equal_the_whole(case, make, monkeypatch):
    parts, bidirectional, place, dtype, tile = case
    length = 35 if tile is SPLIT else 18  # three splits, the first with some tokens of no segment; or two tiles
    more = {"rows": 2} if bidirectional else {}
    leaves = make(1, length * parts, 2, 3, with_state=False, dtype=dtype, **more)
    if dtype == FP64:
        leaves = {name: leaf.double() for name, leaf in leaves.items()}
    resets = None if place is None else make_resets(1, length * parts, place)
    if place == "borders" and parts > 1:
        resets[:, [length, 2 * length - 1]] = True  # the first token of a part, and the last of one
    monkeypatch.setattr(ema_triton.triton_ema, "__defaults__", (None, tile))
    monkeypatch.setattr(ema_triton.triton_ema_and_residual, "__defaults__", (None, None, tile))
    passes = []
    for name in ("ends", "outputs", "adjoints", "gradients"):
        monkeypatch.setattr(ema_triton._Rows, name, counted(passes, name, getattr(ema_triton._Rows, name)))

    def average(own, carry, cut):
        coefficients = coefficients_of(own)
        options = {"bidirectional": bidirectional, "carry": carry, "impl": "triton"}
        return damped_ema(own["x"], coefficients, None, None if resets is None else resets[:, cut], **options)

    want = truth(leaves, resets, bidirectional=bidirectional)
    generator = torch.Generator().manual_seed(7)
    probe = {"y": torch.randn(want["y"].shape, generator=generator).bfloat16().to(dtype)}
    probe["end"] = torch.randn(want["end"].shape, generator=generator)
    assert_same(average_in_parts(parts, probe, leaves, average), want, {FP64: 1e-10, FP32: 1e-5, BF16: 2e-5}[dtype])
    # Every pass once, for each part and direction.
    assert sorted(passes) == sorted(["ends", "outputs", "adjoints", "gradients"] * parts * (1 + bidirectional))


def counted(passes, name, method):
    def run(self, *arguments):
        passes.append(name)
        return method(self, *arguments)

    return run


def test_documents_do_not_reach_each_other():
    """Infinities in one document leave the others untouched: states are forgotten, not multiplied by zero."""
    leaves = make_leaves(1, 50, 3, 3, with_state=False)
    coefficients = ema_coefficients(*(leaves[name] for name in PARAMETERS))
    resets = torch.zeros(1, 50, dtype=torch.bool)
    resets[:, [0, 14, 35, 45]] = True
    poisoned = leaves["x"].clone()
    poisoned[:, 5:14] = torch.inf
    poisoned[:, 35:40] = -torch.inf
    x = poisoned.requires_grad_()
    y, end = triton_ema(x, coefficients, torch.full((1, 3, 3), torch.nan), resets, SPLIT)
    for part in (slice(14, 35), slice(45, 50)):
        clean, last = damped_ema(leaves["x"][:, part], coefficients, impl="recurrent")
        torch.testing.assert_close(y[:, part], clean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(end, last, atol=1e-5, rtol=1e-5)
    d_y = torch.zeros_like(y)
    d_y[:, 40:45] = torch.inf
    dx = torch.autograd.grad(y, x, d_y)[0]
    assert not dx[:, :35].any() and not dx[:, 45:].any()


def test_a_forgotten_state_reaches_no_gradient():
    leaves = make_leaves(2, 20, 3, 2)
    resets = torch.zeros(2, 20, dtype=torch.bool)
    resets[:, [0, 7]] = True
    names = [name for name in leaves if name != "state"]
    want = truth({name: leaves[name] for name in names}, resets)
    nothing = torch.full_like(leaves["state"], torch.nan)
    got = run({**leaves, "state": nothing}, tiled(SMALL), resets, [*names, "state"])
    assert not got.pop("dstate").any()
    assert_same(got, want)


def test_strided_inputs_and_gradients_are_read_right():
    leaves = make_leaves(1, 20, 6, 3, with_state=False)
    coefficients = ema_coefficients(*(leaves[name] for name in PARAMETERS))
    wide = torch.cat([leaves["x"], leaves["x"]], 2)
    for strided in (wide[..., ::2], leaves["x"].mT.contiguous().mT):
        assert not strided.is_contiguous()
        x = strided.detach().requires_grad_()
        found = []
        for impl in ("recurrent", "triton"):
            y, _ = damped_ema(x, coefficients, impl=impl)
            found.append(torch.autograd.grad(y.sum(), x)[0])  # the gradient of a sum has strides of zero
        torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)


class Launches(TorchDispatchMode):
    """Counts what a GPU would be started for: kernels, and PyTorch's operators that are not views or allocations."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        views = "view expand detach alias slice select unsqueeze unbind split new_empty empty_like as_strided"
        ours = function.namespace == "mega_scale"  # whose kernels are counted
        self.count += not ours and name.rstrip("_") not in [*views.split(), "empty"]
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("tile", [SMALL, SPLIT])
@pytest.mark.parametrize("carried", [False, True])
def test_an_average_is_few_launches(monkeypatch, tile, carried):
    leaves, start = make_leaves(1, 35, 3, 3), InterpretedFunction.run
    coefficients = [-torch.rand(3, 3), *(torch.randn(3, 3) for _ in range(2))]
    inputs = [t.requires_grad_() for t in (leaves["x"], leaves["state"], *coefficients)]
    resets = make_resets(1, 35, "one")
    mode = Launches()

    def counted(self, *arguments, **options):
        mode.count += 1
        with _disable_current_modes():
            return start(self, *arguments, **options)

    monkeypatch.setattr(InterpretedFunction, "run", counted)
    with mode:
        state = (lambda end, fade: (end, lambda d_state: (d_state, (fade.log,)))) if carried else inputs[1]
        y, end = triton_ema(inputs[0], EmaCoefficients(*inputs[2:]), state, resets, tile)
    assert 1 < mode.count <= 20
    # Nobody asks for the last state of a part.
    outputs = [y] if carried else [y, end]
    mode.count, ones = 0, [torch.ones_like(t) for t in outputs]
    with mode:
        torch.autograd.grad(outputs, inputs, ones, allow_unused=carried)
    assert 1 < mode.count <= 32


def test_what_has_no_kernel_is_refused():
    def coefficients(averages, dtype):
        return EmaCoefficients(*(-torch.ones(2, averages, dtype=dtype) for _ in range(3)))

    with pytest.raises(ValueError, match=r"not torch\.float64 and torch\.float32: use impl='blocked'"):
        damped_ema(torch.zeros(1, 5, 2).double(), coefficients(3, torch.float32), impl="triton")
    with pytest.raises(ValueError, match="up to 32 moving averages per channel, not 33"):
        damped_ema(torch.zeros(1, 5, 2), coefficients(33, torch.float32), impl="triton")
    leaves = make_complex_leaves(1, 5, 2, 17)
    with pytest.raises(ValueError, match="up to 16 complex moving averages per channel, not 17"):
        damped_ema(leaves["x"], coefficients_of(leaves), impl="triton")


@pytest.mark.parametrize(("tile", "place"), [(SMALL._replace(splits=1), None), (SPLIT, "random")])
def test_operators_are_what_they_tell_compilers(tile, place):
    """Fake results like real ones; the whole average is the same numbers inside of a compiled function."""
    leaves = make_leaves(1, 67, 3, 3, with_state=False)
    inputs = [leaves["x"].requires_grad_(), *(leaves[name].requires_grad_() for name in PARAMETERS)]
    resets = None if place is None else make_resets(1, 67, place)
    seen = []

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            if function.namespace == "mega_scale":
                seen.append((function, arguments))
            return function(*arguments, **(options or {}))

    def average(x, resets, *parameters):
        y, end = opaque_ema(x, resets, tuple(tile), *ema_coefficients(*parameters))
        return y + 1, end

    with Operators():
        want = average(inputs[0], resets, *inputs[1:])
        gradients = torch.autograd.grad((want[0].square().sum(), want[1].sum()), inputs)
    names = {function.name() for function, _ in seen}
    assert names >= {"mega_scale::ema_outputs", "mega_scale::ema_gradients"} and len(names) == 2 + 3 * (tile is SPLIT)
    for function, arguments in seen:
        torch.library.opcheck(function, arguments, test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(average, backend="aot_eager", fullgraph=True)
    found = compiled(inputs[0], resets, *inputs[1:])
    for got, expected in zip(found, want, strict=True):
        assert torch.equal(got, expected)
    again = torch.autograd.grad((found[0].square().sum(), found[1].sum()), inputs)
    assert all(torch.equal(a, b) for a, b in zip(again, gradients, strict=True))


@opaque
def opaque_ema(x, resets, tile, *coefficients):
    return triton_ema(x, EmaCoefficients(*coefficients), None, resets, Tile(*tile))
