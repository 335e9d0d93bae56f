"""The complex average of Megalodon: every form against the definition in complex numbers, gradients included."""

import math

import pytest
import torch
from parts import average_in_parts

from mega_scale.ops import ema
from mega_scale.ops.ema import EmaCoefficients, Fade, complex_ema_coefficients, damped_ema, native

PARAMETERS = ("alpha", "delta", "theta", "gamma")


def make_case(length, batch=2, channels=5, averages=4, dtype=torch.float64, with_state=True):
    """Leaf tensors of one problem: x, the layer's four parameters and a state."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    leaves = {
        "x": normal(batch, length, channels),
        "alpha": normal(channels, averages, 1),
        "delta": normal(channels, averages, 1),
        "theta": normal(channels, 1, 1),
        "gamma": normal(channels, averages, 2),
    }
    return leaves | ({"state": normal(batch, channels, averages, 2)} if with_state else {})


def coefficients_of(leaves):
    return complex_ema_coefficients(*(leaves[name] for name in PARAMETERS))


def make_resets(batch, length, seed=3):
    """Borders at, before and after multiples of 32 and 64, at random places, and one row with none."""
    resets = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.05
    for place in (0, 31, 32, 33, 63, 64, 65, 66, 128, length - 1):
        if place < length:
            resets[0, place] = True
    resets[-1] = False
    return resets


def definition(leaves, resets=None):
    """y and h (B, D, N, 2) by PyTorch's complex numbers: `h_t = q h_{t-1} + p x_t`, `y_t = Re sum_n c_n h_{t,n}`."""
    x, averages = leaves["x"], leaves["alpha"].shape[1]
    p, s = leaves["alpha"][..., 0].sigmoid(), leaves["delta"][..., 0].sigmoid()
    phi = leaves["theta"][..., 0].sigmoid() * torch.arange(1, averages + 1) * (2 * math.pi / averages)
    q, c = torch.polar(1 - p * s, phi), torch.complex(*leaves["gamma"].unbind(-1)) / averages**0.5
    state = (
        torch.view_as_complex(leaves["state"]) if "state" in leaves else torch.zeros(len(x), *p.shape, dtype=q.dtype)
    )
    outputs = []
    for t in range(x.shape[1]):
        if resets is not None:
            state = torch.where(resets[:, t, None, None], 0, state)
        state = q * state + p * x[:, t, :, None]
        outputs.append((c * state).real.sum(-1))
    return torch.stack(outputs, 1), torch.view_as_real(state)


def run(leaves, average, dtype=None):
    """y, the end state, and the gradients of a fixed random function of both."""
    leaves = {name: leaf.detach().to(dtype or leaf.dtype).clone().requires_grad_() for name, leaf in leaves.items()}
    y, end = average(leaves)
    generator = torch.Generator().manual_seed(7)
    probes = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in (y, end)]
    gradients = torch.autograd.grad((y, end), list(leaves.values()), probes)
    return {"y": y, "end": end} | {"d" + name: g for name, g in zip(leaves, gradients, strict=True)}


def by(impl, resets=None, **options):
    def average(leaves):
        return damped_ema(leaves["x"], coefficients_of(leaves), leaves.get("state"), resets, impl=impl, **options)

    return average


def assert_same(got, want, tolerance):
    assert got.keys() == want.keys()
    for name in want:
        difference = (got[name].double() - want[name]).abs().max()
        # not <=, so that NaN fails
        assert difference <= tolerance * want[name].abs().max().clamp(min=1), f"{name} differs by {difference}"


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("documents", [False, True])
def test_the_recurrence_is_the_definition(documents, with_state):
    leaves, resets = make_case(70, batch=3, with_state=with_state), make_resets(3, 70) if documents else None
    assert_same(run(leaves, by("recurrent", resets)), run(leaves, lambda own: definition(own, resets)), 1e-12)


LENGTHS = (1, 63, 64, 65, 500, pytest.param(4096, marks=pytest.mark.slow))


@pytest.mark.parametrize("impl", ["blocked", "fft", "native"])
@pytest.mark.parametrize("length", LENGTHS)
def test_forms_match_the_recurrence(length, impl):
    leaves = make_case(length, batch=3)
    leaves["x"].data[1, : length // 3] = 0  # padding
    for resets in (None,) if impl == "fft" else (None, make_resets(3, length)):
        assert_same(run(leaves, by(impl, resets)), run(leaves, by("recurrent", resets)), 1e-10)


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (3, 31, 15, 7), (2, 32, 16, 8), (2, 33, 17, 9), (1, 97, 37, 16), (2, 64, 129, 33)]
)
@pytest.mark.parametrize("threads", [1, 3])
def test_native_in_fp32_at_awkward_sizes(sizes, threads, monkeypatch):
    monkeypatch.setattr("mega_scale.ops._OF_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    batch, length, channels, averages = sizes
    leaves = make_case(length, batch, channels, averages, dtype=torch.float32)
    for resets in (None, make_resets(batch, length)):
        found, want = run(leaves, by("native", resets)), run(leaves, by("recurrent", resets), torch.float64)
        assert found["y"].dtype == found["end"].dtype == torch.float32
        assert_same(found, want, 1e-5)


def test_auto_takes_native_in_fp32_and_blocks_in_fp64():
    for dtype, impl in ((torch.float32, "native"), (torch.float64, "blocked")):
        leaves = make_case(50, dtype=dtype)
        found = {name: run(leaves, by(name))["y"] for name in ("auto", "native", "blocked")}
        assert torch.equal(found["auto"], found[impl]) and not torch.equal(found["native"], found["blocked"])


def test_native_keeps_its_input_and_a_state_a_block():
    leaves, kept = make_case(32 * 64, 2, 32, 16, torch.float32, with_state=False), {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    coefficients = coefficients_of(leaves)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        damped_ema(leaves["x"], coefficients, impl="native")
    assert sorted(kept.values())[-2:] == [2 * 32 * 64 * 32, 2 * 64 * 32 * 16 * 2]


@pytest.mark.parametrize("slowest", [1e-3, 1e-5, 1e-7])
def test_slow_averages_are_not_rounded(slowest):
    leaves = {name: leaf.detach() for name, leaf in make_case(8192, 1, 16, 8, with_state=False).items()}
    given = coefficients_of(leaves)
    given = given._replace(log_decay=given.log_decay * slowest, angle=given.angle * slowest**0.5)
    want = damped_ema(leaves["x"], given)
    narrow = given._replace(
        **{name: getattr(given, name).float() for name in ("gain", "projection", "projection_imag")}
    )
    for impl in ("native", "blocked"):
        for found, exact in zip(damped_ema(leaves["x"].float(), narrow, impl=impl), want, strict=True):
            assert (found - exact).abs().max() < 1e-5 * exact.abs().max(), impl


@pytest.mark.parametrize("impl", ["native", "fft"])
def test_a_state_over_a_long_row_keeps_its_phase(impl):
    """262,144 tokens in fp32: native keeps states between blocks in fp64."""
    log_decay, angle = torch.tensor([[-1e-5, -1e-6]]).double(), torch.tensor([[2.9, -0.01]]).double()
    one, state = torch.ones(1, 2), torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    given = EmaCoefficients(log_decay, one, one, angle, one)
    with torch.no_grad():
        _, end = damped_ema(torch.zeros(1, 262144, 1), given, state, impl=impl)
    want = torch.view_as_complex(state.double()) * torch.polar((262144 * log_decay).exp(), 262144 * angle)
    torch.testing.assert_close(torch.view_as_complex(end).to(want.dtype), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", ["recurrent", "blocked", "fft", "native"])
@pytest.mark.parametrize("parts", [2, 3, 4, 8])
def test_parts_of_a_row_equal_the_whole(parts, impl):
    """All gradients, with and without documents."""
    leaves = make_case(35 * parts, batch=3, with_state=False)
    random = torch.rand(3, 35 * parts, generator=torch.Generator().manual_seed(7)) < 0.03
    random[0, 35 * (parts - 1)] = random[1, 34] = random[2, 0] = True
    for resets in (None,) if impl == "fft" else (None, random):

        def average(own, carry, cut, resets=resets):
            return by(impl, None if resets is None else resets[:, cut], carry=carry)(own)

        want = run(leaves, by("recurrent", resets))
        generator = torch.Generator().manual_seed(7)
        probe = {name: torch.randn(want[name].shape, generator=generator).double() for name in ("y", "end")}
        assert_same(average_in_parts(parts, probe, leaves, average), want, 1e-12)


def test_transforms_exporters_and_compilers_give_the_same():
    """Over few and over many blocks, by one exported program."""
    leaves = make_case(40)
    state, coefficients = leaves["state"].detach(), [c.detach() for c in coefficients_of(leaves)]

    def average(x, state, *given):
        return damped_ema(x, EmaCoefficients(*given), state)

    def loss(x, *others):
        y, end = average(x, *others)
        return y.square().sum() + end.square().sum()

    compiled = torch.compile(average, backend="eager")
    x, auto = leaves["x"].detach(), torch.export.Dim.AUTO
    shapes = {"x": {1: auto}, "state": None, "given": (None,) * 5}
    exported = torch.export.export(Exported(average), (x, state, *coefficients), dynamic_shapes=shapes).module()
    for tokens in (40, 65, 1100):
        x = make_case(tokens)["x"].detach()
        given = (x, state, *coefficients)
        want = average(*given)
        for found in (compiled(*given), exported(*given)):
            for own, other in zip(found, want, strict=True):
                torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10)
        leaf = x.clone().requires_grad_()
        torch.testing.assert_close(torch.func.grad(loss)(*given), torch.autograd.grad(loss(leaf, *given[1:]), leaf)[0])


class Exported(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, state, *given):
        return self.function(x, state, *given)


def test_powers_over_long_rows_keep_their_phase():
    """In fp32 as well: phases are computed in fp64, and reduced, before they are rounded."""
    log_decay, angle = torch.tensor([[-1e-4, -1e-6]]).double(), torch.tensor([[2.9, -3.1]]).double()
    one = torch.ones(1, 2)
    coefficients = EmaCoefficients(log_decay, one, one, angle, one)
    for tokens in (1, 32, 1024, 16384, 262144):
        fade = coefficients.fade(tokens)
        assert fade.angle.dtype == torch.float64 and (fade.angle.abs() <= math.pi).all()
        exact = torch.polar((log_decay * tokens).exp(), angle * tokens)
        found = torch.view_as_complex(fade.value(torch.float32)).to(exact.dtype)
        assert ((found - exact).abs() / exact.abs()).max() < 1e-6
        again = torch.view_as_complex(Fade(*fade).power(3).value(torch.float64))
        torch.testing.assert_close(again, exact**3, rtol=1e-8, atol=1e-12)


def test_coefficients_are_wrapped_and_never_rounded():
    leaves = make_case(1, averages=16, dtype=torch.bfloat16)
    coefficients = coefficients_of(leaves)
    assert coefficients.log_decay.dtype == coefficients.angle.dtype == torch.float64
    assert (
        coefficients.gain.dtype == coefficients.projection.dtype == coefficients.projection_imag.dtype == torch.float32
    )
    assert (coefficients.angle <= math.pi).all() and (coefficients.angle > -math.pi).all()
    assert coefficients.angle.min() < -2 and coefficients.angle.max() > 2


def test_saturated_parameters_stay_finite():
    shapes = (2, 3, 1), (2, 3, 1), (2, 1, 1), (2, 3, 2)
    for value in (60.0, -60.0):
        parameters = [torch.full(shape, value, requires_grad=True) for shape in shapes]
        y, end = damped_ema(torch.ones(1, 130, 2), complex_ema_coefficients(*parameters))
        (y.sum() + end.sum()).backward()
        assert torch.isfinite(y).all()
        assert all(torch.isfinite(p.grad).all() for p in parameters)


def test_refusals_name_what_is_wrong():
    leaves = {name: leaf.detach() for name, leaf in make_case(5).items()}
    coefficients, x = coefficients_of(leaves), leaves["x"]
    doubled = EmaCoefficients(*(torch.cat([c, c]) for c in coefficients))
    for own, arguments, words in (
        (doubled, {"bidirectional": True}, "bidirectional=True with complex"),
        (coefficients, {"truncation": 3}, "truncation=3 with complex"),
        (coefficients, {"state": torch.zeros(2, 5, 4)}, r"state has shape \(2, 5, 4\): expected \(2, 5, 4, 2\)"),
        (coefficients._replace(angle=None), {}, "no angle"),
        (coefficients._replace(projection_imag=None), {}, "no projection_imag"),
    ):
        with pytest.raises(ValueError, match=words):
            damped_ema(x, own, **arguments)


def test_complex_averages_take_triton_on_gpus(monkeypatch):
    monkeypatch.setattr(ema, "runs_triton", lambda x, compiled: True)
    monkeypatch.setattr(native, "has_library", lambda: False)
    x, real = torch.zeros(1, 64, 2), [-torch.ones(2, 3)] * 3
    assert ema._best(x, EmaCoefficients(*real, torch.ones(2, 3).double(), torch.ones(2, 3)), None) == "triton"
    assert ema._best(x, EmaCoefficients(*real), None) == "triton"
