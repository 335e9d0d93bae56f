"""The timestep norm's Triton kernels, interpreted on a CPU, against the recurrence.

`test_timestep_norm_triton.py` runs this file.

It needs a process of its own: TRITON_INTERPRET has to be set before anything imports triton.
"""

import os

assert os.environ.get("TRITON_INTERPRET") == "1", "run tests/ops/test_timestep_norm_triton.py, which sets it"

# ruff: noqa: E402
import pytest
import torch
from test_timestep_norm import assert_same, make_case, run, run_in_parts
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from mega_scale.ops import timestep_norm_triton
from mega_scale.ops.timestep_norm import Moments, timestep_norm


@pytest.fixture(autouse=True)
def smaller_blocks(monkeypatch):
    """Of 8 tokens, so that short rows have several: interpretation takes its time."""
    monkeypatch.setattr(timestep_norm_triton, "BLOCK", 8)


@pytest.mark.parametrize("length", [1, 9, 20])
def test_kernels_match_the_recurrence_in_fp64(length):
    for state, documents, padding in [(False, False, False), (True, True, True)]:
        leaves, count, resets, valid = make_case(length, batch=2, state=state, offset=3.0)
        resets[:, length // 2] = True
        given = resets if documents else None, valid if padding else None
        for residuals in range(3):
            want = run(leaves, count, *given, residuals=residuals, impl="recurrent")
            assert_same(run(leaves, count, *given, residuals=residuals, impl="triton"), want)


def test_blocks_of_64_match_the_recurrence_in_fp64(monkeypatch):
    monkeypatch.setattr(timestep_norm_triton, "BLOCK", 64)
    leaves, count, resets, valid = make_case(130, batch=2, offset=3.0)
    want = run(leaves, count, resets, valid, impl="recurrent")
    assert_same(run(leaves, count, resets, valid, impl="triton"), want)


@pytest.mark.parametrize("flags", [False, True])
def test_parts_of_a_row_equal_the_whole(flags):
    leaves, count, resets, valid = make_case(27, batch=2, state=False, offset=3.0)
    resets[1, 18] = True
    given = (resets, valid) if flags else (None, None)
    got = run_in_parts(3, leaves, count, *given, residuals=2, impl="triton")
    want = run(leaves, count, *given, residuals=2, impl="recurrent")
    assert_same(got, {name: want[name] for name in got}, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_of_narrow_tokens_are_fp32(dtype):
    leaves, count, resets, valid = make_case(20, batch=2, offset=100.0 if dtype == torch.float32 else 3.0)
    exact = {name: (t.to(dtype) if name == "x" else t.float()).double() for name, t in leaves.items()}
    want = run(exact, count, resets, valid, residuals=2, impl="recurrent")
    narrow = {name: exact[name].to(dtype if name == "x" else torch.float32) for name in leaves}
    got = run(narrow, count, resets, valid, residuals=2, impl="triton")
    assert got["y"].dtype == got["dx"].dtype == dtype and got["mean"].dtype == torch.float32
    rounding = 2**-7 if dtype == torch.bfloat16 else 1e-5  # interpretation cuts off
    assert_same(got, want, rounding)


@pytest.mark.parametrize("residuals", [0, 1, 2])
def test_the_gradient_operator_says_what_it_does(residuals):
    """Its schema, and what fake tensors get."""
    leaves, count, resets, valid = make_case(20, batch=2)
    seen = []

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            if "norm_gradient" in str(function):
                seen.append(tree_map_only(torch.Tensor, torch.Tensor.clone, (function, arguments)))
            return function(*arguments, **(options or {}))

    with Operators():
        run(leaves, count, resets, valid, residuals=residuals, impl="triton")
    ((called, given),) = seen
    assert [len(each) for each in given if isinstance(each, list)] == [residuals]
    torch.library.opcheck(called, given, test_utils=("test_schema", "test_faketensor"))


def test_padding_and_documents_are_not_read():
    leaves, count, resets, valid = make_case(20, batch=2)
    resets[:, [7, 12]] = True
    state = Moments(count, leaves["mean"], leaves["var"])

    def normalise(x):
        return timestep_norm(x, leaves["weight"], leaves["bias"], 3, 1e-5, state, resets, valid, impl="triton")[0]

    clean, dirty = normalise(leaves["x"]), leaves["x"].clone()
    dirty[~valid], dirty[:, 7:12] = float("nan"), 1e30
    y = normalise(dirty)
    assert torch.equal(y[:, :7], clean[:, :7]) and torch.equal(y[:, 12:], clean[:, 12:])
