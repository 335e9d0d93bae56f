"""Averages and timestep norms in compiled functions: the same numbers, and what their operators tell compilers."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from mega_scale.ops import timestep_norm as norm
from mega_scale.ops.ema import complex_ema_coefficients, damped_ema, ema_coefficients, native
from mega_scale.ops.timestep_norm import Moments, timestep_norm

CHANNELS, AVERAGES = 6, 3


def leaves(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def real(length, dtype, given, impl="native"):
    """A function with its arguments, of which the second is where documents begin."""
    one = (CHANNELS, AVERAGES, 1)
    x, *parameters, state = leaves((2, length, CHANNELS), one, one, one, one[:2], (2, CHANNELS, AVERAGES), dtype=dtype)

    def average(x, resets, state, *parameters):
        return damped_ema(x, ema_coefficients(*parameters), state, resets, impl=impl)

    return average, [x, state if given else None, *parameters]


def complex_(length, dtype, given, impl="native"):
    one, pairs = (CHANNELS, AVERAGES, 1), (CHANNELS, AVERAGES, 2)
    x, *parameters, state = leaves((2, length, CHANNELS), one, one, (CHANNELS, 1, 1), pairs, (2, *pairs), dtype=dtype)

    def average(x, resets, state, *parameters):
        return damped_ema(x, complex_ema_coefficients(*parameters), state, resets, impl=impl)

    return average, [x, state if given else None, *parameters]


def timestep(length, dtype, given, impl="native"):
    x, weight, bias, mean = leaves((2, length, CHANNELS), (CHANNELS,), (CHANNELS,), (2, 2), dtype=dtype)

    def normalise(x, resets, mean, weight, bias):
        state = None if mean is None else Moments(torch.tensor([3, 5]), mean, mean.square() + 1)
        valid = None if resets is None else ~resets.roll(3, 1)
        y, moments = timestep_norm(x, weight, bias, 2, 1e-5, state, resets, valid, impl=impl)
        return y, moments.mean + moments.var

    return normalise, [x, mean if given else None, weight, bias]


def outcome(function, arguments, resets):
    x, *others = arguments
    y, end = function(x, resets, *others)
    wanted = [t for t in arguments if t is not None]
    return [y, end, *torch.autograd.grad((y.sin().sum(), end.cos().sum()), wanted)]


@pytest.mark.slow
@pytest.mark.parametrize(("impl", "dtype"), [("native", torch.float32), ("blocked", torch.float64)])
@pytest.mark.parametrize("make", [real, complex_, timestep])
def test_compiled_ones_are_the_same(make, impl, dtype):
    function, arguments = make(63, dtype, True, impl)
    resets = torch.rand(2, 63, generator=torch.Generator().manual_seed(3)) < 0.1
    compiled = torch.compile(function, backend="aot_eager_default_partitioner", fullgraph=True)
    found = outcome(compiled, arguments, resets)
    for got, want in zip(found, outcome(function, arguments, resets), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("length", [1, 63, 65, 500])
@pytest.mark.parametrize("make", [real, complex_, timestep])
def test_operators_are_what_they_tell_compilers(make, length, monkeypatch):
    """C++ is called by its operators, which make no difference, and whose fake results are like real ones."""
    seen = []

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            if function.namespace == "mega_scale":
                seen.append((function, arguments))
            return function(*arguments, **(options or {}))

    function, arguments = make(length, torch.float32, length != 65)
    resets = torch.rand(2, length, generator=torch.Generator().manual_seed(3)) < 0.1
    want = outcome(function, arguments, resets)
    monkeypatch.setattr(norm if make is timestep else native, "in_memory", lambda *tensors: False)
    with Operators():
        found = outcome(function, arguments, resets)
    assert all(torch.equal(*pair) for pair in zip(found, want, strict=True)) and len(seen) == 2
    for called, given in seen if length == 63 else ():
        torch.library.opcheck(called, tree_map_only(torch.Tensor, torch.Tensor.detach, given))
