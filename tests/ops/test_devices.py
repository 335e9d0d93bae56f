"""Which device's forms are chosen: that of a tensor, or the one that fake tensors are taken to lie on."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mega_scale.ops import as_if, device_kind, multiprocessors, runs_triton
from mega_scale.ops.attention import chunk_attention
from mega_scale.ops.ema import damped_ema, ema_coefficients
from mega_scale.ops.linear import linear_cross_entropy
from mega_scale.ops.timestep_norm import timestep_norm

pytest.importorskip("triton")


def coefficients(channels=8, averages=4):
    return ema_coefficients(*[torch.randn(channels, averages, 1) for _ in range(3)], torch.randn(channels, averages))


def test_fake_tensors_are_taken_to_lie_where_it_is_said_and_real_ones_stay():
    real = torch.zeros(2)
    with FakeTensorMode():
        fake = torch.zeros(2)
    meta = torch.zeros(2, device="meta")
    assert (device_kind(real), device_kind(fake), device_kind(meta)) == ("cpu", "cpu", "meta")
    with as_if("cuda", (9, 0)):
        assert [device_kind(x) for x in (real, fake, meta, torch.device("cpu"))] == ["cpu", "cuda", "cuda", "cuda"]
        assert runs_triton(fake) and runs_triton(meta) and not runs_triton(real)
        assert multiprocessors(fake) == 132
        with as_if("cuda", (7, 5)):
            assert not runs_triton(fake)
        with as_if("cpu"):
            assert device_kind(fake) == "cpu"
    assert device_kind(fake) == "cpu" and not runs_triton(fake)


def test_forms_of_a_gpu_are_followed_on_fake_tensors(monkeypatch):
    taken = []

    def follow():
        x = torch.randn(2, 128, 8, dtype=torch.bfloat16, requires_grad=True)
        y, _ = damped_ema(x, coefficients())
        y.sum().backward()
        taken.append(y.shape)
        q, v = (torch.randn(2, 1, 64, width, dtype=torch.bfloat16, requires_grad=True) for width in (16, 8))
        out, _ = chunk_attention(q, q, v, torch.randn(127), causal=True)
        out.sum().backward()
        taken.append(out.shape)
        y, state = timestep_norm(x.float(), torch.randn(8), torch.randn(8), 2)
        y.sum().backward()
        taken.append(state.mean.shape)

    # The forms of other devices are not to be entered.
    monkeypatch.setattr("mega_scale.ops.ema._FORMS", {})
    monkeypatch.setattr("mega_scale.ops.timestep_norm._FORMS", {})
    monkeypatch.setattr("mega_scale.ops.attention.causal_attention", None)
    with FakeTensorMode(), as_if("cuda", (9, 0)):
        follow()
    assert taken == [(2, 128, 8), (2, 1, 64, 8), (2, 2)]


def test_slices_of_the_loss_are_those_of_the_device():
    found = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found.extend([func] if func is torch.ops.aten.mm.default else [])
            return func(*args, **(kwargs or {}))

    def products():
        found.clear()
        with FakeTensorMode():
            hidden, weight = torch.randn(512, 8), torch.randn(32768, 8)
            with Products():
                linear_cross_entropy(hidden, weight, None, torch.zeros(512, dtype=torch.int64))
        return len(found)

    assert products() == 8
    with as_if("cuda", (9, 0)):
        assert products() == 1
