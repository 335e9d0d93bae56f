"""What operators take on a GPU that is not there."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from mega_scale.parallel.devices import Device, peak_products
from mega_scale.parallel.meter import Event, Meter
from mega_scale.parallel.roofline import (
    PARTS,
    Row,
    extrapolated,
    fused,
    in_fp8,
    mfu,
    part,
    seconds,
    table,
    total,
)

H100 = Device.named("h100")


def event(
    name="aten::mul", read=0, written=0, flops=0, dtype="bfloat16", module="m.layers.0.mega", phase="forward", **more
):
    return Event(name, read, written, flops, 1, dtype, module, phase, **more)


def test_a_kernel_takes_as_long_as_what_bounds_it():
    memory, products = H100.memory * H100.memory_share, H100.products * H100.products_share
    assert seconds(event(read=10**9, written=10**9), H100) == pytest.approx(2e9 / memory)
    assert seconds(event("aten::mm", 10**6, 10**6, 10**12), H100) == pytest.approx(1e12 / products)
    assert seconds(event("aten::mm", 10**9, 10**9, 10**9), H100) == pytest.approx(2e9 / memory)
    assert seconds(event("aten::mm", flops=10**12, dtype="float8_e4m3fn"), H100) == pytest.approx(
        1e12 / (H100.products_fp8 * H100.products_fp8_share)
    )
    assert seconds(event("aten::mm", flops=10**12, dtype="float32"), H100) > seconds(
        event("aten::mm", flops=10**12), H100
    )
    assert seconds(event(read=2), H100) == H100.kernel
    # Twice the columns are twice the instructions of the average; few columns leave it to the memory.
    elements = 32768 * 4096
    narrow, wide = (
        seconds(event("mega_scale::ema_outputs", 2 * elements, 2 * elements, elements * n), H100) for n in (1, 64)
    )
    assert narrow == pytest.approx(4 * elements / memory) and wide > 2 * narrow


def test_figures_are_overridden_and_unknown_names_are_refused(tmp_path):
    assert Device.named("H100", {"memory": 1e12}).memory == 1e12
    assert {"h100", "h200", "a100", "b200", "cpu"} <= set(Device.known())
    with pytest.raises(ValueError, match=r"gpu='h1000' is unknown: choose one of h100, h200, a100, b200"):
        Device.named("h1000")
    with pytest.raises(ValueError, match=r"gpu\.memori is unknown: choose one of .*memory"):
        Device.named("h100", {"memori": 1.0})
    with pytest.raises(ValueError, match=r"gpu\.memory=0 is not possible: give a number above 0"):
        Device.named("h100", {"memory": 0})
    own = tmp_path / "own.yaml"
    own.write_text("common: {launch: 1.0e-6}\ndevices: {own: {name: Own, memory: 1e12}}")
    assert Device.named("h100", file=own).launch == 1e-6 and "own" in Device.known(own)
    with pytest.raises(ValueError, match=r"own of .* has no capability, multiprocessors, .*: give them"):
        Device.named("own", file=own)
    own.write_text("gpus: {}")
    with pytest.raises(ValueError, match=r"own\.yaml is not possible: give devices, common, peaks"):
        Device.named("h100", file=own)


def test_peaks_are_found_by_names_of_gpus():
    h100 = Device.named("h100").products
    assert peak_products("NVIDIA H100 80GB HBM3") == h100 > peak_products("NVIDIA H100 PCIe")
    assert peak_products("NVIDIA A100-SXM4-80GB") == Device.named("a100").products
    assert peak_products("AMD Instinct MI300X") == 1307e12 and peak_products("NVIDIA T4") is None


def test_the_step_that_was_measured_is_predicted():
    """966 ms of kernels on an H100 at 1a645b9; its average, since replaced, at the rates that were measured then."""
    then = json.loads(Path(__file__).with_name("step_of_1a645b9.json").read_text())
    predicted = then["average_ms"]
    for own, dtype, size, flops, times in then["rows"]:
        name = "aten::mm" if flops else f"aten::{own}"
        predicted += 1e3 * times * seconds(event(name, size, 0, flops, dtype), H100)
    assert predicted == pytest.approx(then["measured_ms"], rel=0.1)


def test_elementwise_operators_between_products_become_one_kernel():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)

        def forward(self, x):
            y = self.a(x)
            return self.b(nn.functional.silu(y * 2 + 1)) * x

    model = nn.Sequential(nn.Sequential(Block()))
    x = torch.randn(128, 64)
    with torch.no_grad(), Meter(model) as meter:
        model(x)
    assert [e.name for e in meter.events] == [
        "aten::mm",
        "aten::mul",
        "aten::add",
        "aten::silu",
        "aten::mm",
        "aten::mul",
    ]
    found = fused(meter.events)
    size = 4 * 128 * 64
    assert [(e.name, e.kernels) for e in found] == [("aten::mm", 1), ("fused", 1), ("aten::mm", 1), ("fused", 1)]
    assert [(e.read, e.written) for e in found if e.name == "fused"] == [(size, size), (2 * size, size)]
    assert sum(e.flops for e in found) == sum(e.flops for e in meter.events)


def test_fp8_products_cast_what_they_take():
    own = event("aten::mm", 1000, 400, 10**9)._replace(inputs=((1, 600), (2, 400)))
    other = own._replace(inputs=((1, 600), (3, 400)))
    found = list(in_fp8([own, other, event("aten::bmm", 1000, 400, 10**9), event(read=8)]))
    assert [e.name for e in found] == ["cast to fp8", "aten::mm", "cast to fp8", "aten::mm", "aten::bmm", "aten::mul"]
    assert [(e.read, e.written) for e in found[:4]] == [(2000, 500), (500, 400), (800, 200), (500, 400)]


def test_rows_add_up():
    events = [
        event("aten::mm", 10, 10, 100), event("mega_scale::ema_outputs", 8, 8, 64), event("aten::bmm", 4, 4, 50),
        event(module="m.layers.0.norm", read=5), event(read=3), event("aten::mm", 7, 1, 20, module="lm_head"),
        event("aten::_foreach_add_", 9, 9, phase="optimizer"), event("aten::copy_", 2, 2),
    ]  # fmt: skip
    assert [part(e) for e in events] == list(PARTS)
    rows = table(events, H100)
    assert list(rows) == list(PARTS) and total(rows).kernels == len(events)
    assert total(rows).bytes == sum(e.read + e.written for e in events)
    assert total(rows).flops == 170  # the average's are steps, not operations of products
    assert total(rows).seconds == pytest.approx(sum(seconds(e, H100) for e in events))
    more = extrapolated({"a": Row(10, 100, 7, 1.0)}, {"a": Row(16, 130, 9, 1.5)}, (2, 3), 24)
    assert more["a"] == Row(10 + 22 * 6, 100 + 22 * 30, 7 + 22 * 2, 1.0 + 22 * 0.5)
    assert mfu(H100.products, 2.0, H100) == 0.5
