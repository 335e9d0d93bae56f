"""Dropout's Triton kernel, interpreted on a CPU, against the plain form. `test_dropout_triton.py` runs this file.

It needs a process of its own: TRITON_INTERPRET has to be set before anything imports triton.
"""

import os

assert os.environ.get("TRITON_INTERPRET") == "1", "run tests/ops/test_dropout_triton.py, which sets TRITON_INTERPRET"

# ruff: noqa: E402
import pytest
import torch
from interpreting import round_bf16
from triton.runtime.interpreter import InterpretedFunction

from mega_scale.ops import elementwise
from mega_scale.ops.elementwise import PositionalDropout, keep_mask

MASK = 2**32 - 1
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture
def launches(monkeypatch):
    """Kernels started so far; all tensors count as a GPU's."""
    started, run = [], InterpretedFunction.run

    def counted(self, *arguments, **options):
        started.append(self.fn.__name__)
        return run(self, *arguments, **options)

    monkeypatch.setattr(InterpretedFunction, "run", counted)
    round_bf16(monkeypatch)
    monkeypatch.setattr(elementwise, "runs_triton", lambda x: True)
    return started


def plainly(monkeypatch, function, *arguments):
    with monkeypatch.context() as patched:
        patched.setattr(elementwise, "runs_triton", lambda x: False)
        return function(*arguments)


def both_passes(drop, x, residual=None):
    leaves = [t.clone().requires_grad_() for t in (x, residual) if t is not None]
    y = drop(*leaves)
    generator = torch.Generator().manual_seed(3)
    dy = torch.randn(y.shape, generator=generator).to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


# dtype, shape, what drops
CASES = [
    (FP32, (2, 7, 5), PositionalDropout(0.1, 0)),
    (BF16, (3, 33, 130), PositionalDropout(0.3, MASK, 4, 1000, 512)),
    (FP16, (1, 1, 1), PositionalDropout(0.5, 5)),
    (BF16, (1, 2, 4200), PositionalDropout(0.9, 0x9E3779B9, 2**31, 2**32 - 2)),
    (FP32, (2, 9, 40), PositionalDropout(0.25, 7, 1, 30, 3, featurewise=True)),
    (BF16, (2, 3, 16, 16), PositionalDropout(0.1, 2**31, 2, 48)),
    (FP32, (2, 3, 4, 5, 9), PositionalDropout(0.2, 11, 1, 15, 2 * elementwise.MOST_KEYS)),
    (BF16, (1, 2, 2, 40, 40), PositionalDropout(0.5, 12)),
    (FP32, (2, 0, 5), PositionalDropout(0.5, 12)),
]


@pytest.mark.parametrize("dtype, shape, drop", CASES, ids=str)
@pytest.mark.parametrize("added", [False, True])
def test_one_kernel_a_pass_computes_what_the_plain_form_does(monkeypatch, launches, dtype, shape, drop, added):
    generator = torch.Generator().manual_seed(len(shape))
    x, residual = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    given = (x, residual) if added else (x,)
    got = both_passes(drop, *given)
    assert launches == ["dropout_kernel"] * (2 if x.numel() else 0)
    for ours, plain in zip(got, plainly(monkeypatch, both_passes, drop, *given), strict=True):
        assert ours.dtype == dtype and torch.equal(ours, plain)
    if len(shape) == 3 and not drop.featurewise:
        places = (torch.arange(size) + first for size, first in zip(shape, drop[2:5], strict=True))
        y = drop(torch.ones_like(x))
        assert torch.equal(y != 0, keep_mask(drop.p, drop.key, *places))


def test_strided_tensors_infinities_and_a_wider_residual(monkeypatch, launches):
    drop, x = PositionalDropout(0.4, 3), torch.randn(2, 6, 8).mT
    assert torch.equal(drop(x), plainly(monkeypatch, drop, x))
    stays = drop(torch.ones(2, 8, 6)) != 0
    assert torch.equal(drop(torch.full((2, 8, 6), torch.inf)) != 0, stays)
    narrow, wide = x.bfloat16(), torch.randn(2, 8, 6)
    summed = drop(narrow, wide)
    assert summed.dtype == FP32 and torch.equal(summed, plainly(monkeypatch, drop, narrow, wide))
    started = len(launches)
    drop(x.double())
    assert len(launches) == started  # which the plain form takes


def test_fakes_pass_through_and_nothing_but_numbers_is_saved(launches):
    drop = PositionalDropout(0.4, 3)
    meta = torch.empty(2, 8, 6, device="meta", requires_grad=True)
    y = drop(meta, meta)
    assert y.shape == meta.shape and torch.autograd.grad(y.sum(), meta)[0].shape == meta.shape
    assert not launches
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda packed: packed):
        drop(torch.randn(2, 8, 6, requires_grad=True), torch.randn(2, 8, 6, requires_grad=True))
    assert not saved
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    x = torch.randn(2, 8, 6)
    torch.library.opcheck(torch.ops.mega_scale.dropout, (x.requires_grad_(), x.detach(), *drop[:6]), test_utils=checks)
