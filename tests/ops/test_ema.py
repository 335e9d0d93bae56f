"""The damped EMA: every implementation against the recurrence, gradients included, at awkward sizes."""

import pytest
import torch
from parts import average_in_parts

from mega_scale.ops.ema import damped_ema, ema_coefficients

LENGTHS = (1, 2, 63, 64, 65, 500)


def make_case(length, bidirectional=False, with_state=True, batch=2, dtype=torch.float32):
    """Leaf tensors of one problem: x, the four HF-shaped parameters and a state."""
    channels, averages = 6, 4
    generator = torch.Generator().manual_seed(length)
    rows = channels * (2 if bidirectional else 1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    leaves = {
        "x": normal(batch, length, channels),
        "damping": normal(rows, averages, 1),
        "decay": normal(rows, averages, 1),
        "expansion": normal(rows, averages, 1),
        "projection": normal(rows, averages),
    }
    if with_state:
        leaves["state"] = normal(batch, rows, averages)
    return leaves


PARAMETERS = ("damping", "decay", "expansion", "projection")


def coefficients_of(leaves):
    return ema_coefficients(*(leaves[name] for name in PARAMETERS))


def run(leaves, impl, resets=None, bidirectional=False, truncation=None):
    """y, the final state, and the gradients of a fixed random function of both."""
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    coefficients = coefficients_of(leaves)
    y, state = damped_ema(
        leaves["x"], coefficients, leaves.get("state"), resets,
        bidirectional=bidirectional, truncation=truncation, impl=impl,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(7)
    loss = (y * torch.randn(y.shape, generator=generator)).sum()
    if state is not None:
        loss = loss + (state * torch.randn(state.shape, generator=generator)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    named = {"y": y, **{"d" + name: g for name, g in zip(leaves, gradients, strict=True)}}
    return {**named, "end": state} if state is not None else named


def assert_same(got, want, tolerance=1e-5):
    assert got.keys() == want.keys()
    for name in want:
        difference = (got[name] - want[name]).abs().max()
        assert difference <= tolerance * want[name].abs().max().clamp(min=1), f"{name} differs by {difference}"


def make_resets(batch, length, seed=3):
    """Borders at, before and after multiples of 64, at random places, and one row with none."""
    resets = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.05
    for place in (0, 63, 64, 65, 66, 128, length - 1):
        if place < length:
            resets[0, place] = True
    resets[-1] = False
    return resets


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("impl", ["blocked", "native", "fft"])
@pytest.mark.parametrize("length", LENGTHS)
def test_matches_the_recurrence(length, impl, bidirectional):
    leaves = make_case(length, bidirectional)
    assert_same(run(leaves, impl, None, bidirectional), run(leaves, "recurrent", None, bidirectional))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("impl", ["blocked", "native"])
@pytest.mark.parametrize("length", LENGTHS)
def test_resets_match_the_recurrence(length, impl, bidirectional):
    leaves = make_case(length, bidirectional, batch=3)
    resets = make_resets(3, length)
    assert_same(run(leaves, impl, resets, bidirectional), run(leaves, "recurrent", resets, bidirectional))


@pytest.mark.slow
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("impl", ["blocked", "native"])
def test_matches_the_recurrence_over_4096_tokens(impl, bidirectional):
    leaves = make_case(4096, bidirectional)
    for resets in (None, make_resets(2, 4096)):
        assert_same(run(leaves, impl, resets, bidirectional), run(leaves, "recurrent", resets, bidirectional))


def test_blocked_is_exact_in_double_precision():
    leaves = make_case(300, dtype=torch.float64)
    resets = make_resets(2, 300)
    assert_same(run(leaves, "blocked", resets), run(leaves, "recurrent", resets), tolerance=1e-12)


def test_blocked_keeps_its_input_and_one_state_a_block():
    leaves, kept = make_case(256 * 32, with_state=False), {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    coefficients = coefficients_of(leaves)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        damped_ema(leaves["x"], coefficients, impl="blocked")
    assert sorted(kept.values())[-2:] == [2 * 256 * 6 * 4, 2 * 256 * 32 * 6]


def test_blocked_can_be_differentiated_again_and_by_its_end_alone():
    """Its steps write into gradients: only into those that nobody else reads."""
    leaves = make_case(100)
    x, given = leaves["x"], torch.randn(2, 100, 6)
    y, end = damped_ema(x, coefficients_of(leaves), leaves["state"], impl="blocked")
    dy = given.clone()
    first = torch.autograd.grad(y, [x, leaves["state"]], dy, retain_graph=True)
    second = torch.autograd.grad(y, [x, leaves["state"]], dy, retain_graph=True)
    assert torch.equal(dy, given) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    _, want = damped_ema(x, coefficients_of(leaves), leaves["state"], impl="recurrent")
    found, wanted = (torch.autograd.grad(t.square().sum(), x)[0] for t in (end, want))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("impl", ["recurrent", "fft", "blocked", "native"])
def test_state_carries_a_sequence_cut_anywhere(impl):
    leaves = {name: leaf.detach() for name, leaf in make_case(150).items()}
    coefficients = coefficients_of(leaves)
    whole, end = damped_ema(leaves["x"], coefficients, leaves["state"], impl=impl)
    pieces, state = [], leaves["state"]
    for piece in leaves["x"].split([1, 63, 64, 2, 20], dim=1):
        y, state = damped_ema(piece, coefficients, state, impl=impl)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state, end, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("impl", ["recurrent", "blocked", "native", "fft"])
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_parts_of_a_row_equal_the_whole(parts, impl, bidirectional):
    """In fp64 where a form has it: y, the end states and all gradients, with and without documents."""
    dtype = torch.float32 if impl == "native" else torch.float64
    leaves = make_case(35 * parts, bidirectional, with_state=False, batch=3, dtype=dtype)
    generator = torch.Generator().manual_seed(7)
    random = torch.rand(3, 35 * parts, generator=generator) < 0.03
    random[0, 35 * (parts - 1)] = random[1, 34] = random[2, 0] = True
    for resets in (None,) if impl == "fft" else (None, random):

        def average(own, carry, cut, resets=resets):
            options = {"bidirectional": bidirectional, "carry": carry, "impl": impl}
            return damped_ema(
                own["x"], coefficients_of(own), None, None if resets is None else resets[:, cut], **options
            )

        want = run({name: leaf.double() for name, leaf in leaves.items()}, "recurrent", resets, bidirectional)
        generator = torch.Generator().manual_seed(7)
        probe = {name: torch.randn(want[name].shape, generator=generator) for name in ("y", "end")}
        got = average_in_parts(parts, probe, leaves, average)
        assert_same(got, want, 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_documents_do_not_reach_each_other(bidirectional):
    """NaN in one document leaves the others untouched: kept apart, not merely subtracted."""
    leaves = {name: leaf.detach() for name, leaf in make_case(200, bidirectional, with_state=False).items()}
    coefficients = coefficients_of(leaves)
    resets = torch.zeros(2, 200, dtype=torch.bool)
    resets[:, [0, 70, 130]] = True
    clean, _ = damped_ema(leaves["x"][:, 70:130], coefficients, bidirectional=bidirectional)
    poisoned = leaves["x"].clone()
    poisoned[:, 70:130] = leaves["x"][:, 70:130]
    poisoned[:, 60:70] = 1e30
    poisoned[:, 130:140] = -1e30
    y, _ = damped_ema(poisoned, coefficients, resets=resets, bidirectional=bidirectional)
    torch.testing.assert_close(y[:, 70:130], clean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("taps", [1, 8, 40, 100])
def test_truncated_kernel_sees_only_its_taps(taps, bidirectional):
    leaves = make_case(40, bidirectional, with_state=False)
    coefficients = coefficients_of(leaves)
    tau = torch.arange(min(taps, 40))
    kernel = torch.einsum(
        "dn,dnt->dt", coefficients.projection * coefficients.gain, (coefficients.log_decay[..., None] * tau).exp()
    )
    want = torch.zeros_like(leaves["x"])
    for t in range(40):
        for lag in range(min(taps, 40)):
            if t - lag >= 0:
                want[:, t] += kernel[:6, lag] * leaves["x"][:, t - lag]
            if bidirectional and t + lag < 40:
                want[:, t] += kernel[6:, lag] * leaves["x"][:, t + lag]
    y, state = damped_ema(leaves["x"], coefficients, truncation=taps, bidirectional=bidirectional)
    torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-5)
    assert state is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_coefficients_are_never_rounded(dtype):
    """A decay of 1 - 3e-4 rounds to 1 in bf16; the average over 2,000 tokens would be 83% off."""
    shape = (3, 2, 1)
    damping = torch.full(shape, -3.5).to(dtype)
    decay = torch.full(shape, -4.6).to(dtype)
    arguments = damping, decay, torch.ones(shape).to(dtype), torch.ones(3, 2).to(dtype)
    x = torch.ones(1, 2000, 3, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coefficients = ema_coefficients(*arguments)
        y, state = damped_ema(x, coefficients)
    exact = ema_coefficients(*(a.double() for a in arguments))
    want, end = damped_ema(x.double(), exact)
    assert y.dtype == dtype and state.dtype == torch.float32
    assert all(c.dtype == torch.float32 for c in coefficients)
    torch.testing.assert_close(y.double(), want, rtol=1e-2, atol=0)
    torch.testing.assert_close(state.double(), end, rtol=1e-5, atol=0)


def test_saturated_parameters_stay_finite():
    parameters = [torch.full((2, 3, 1), 60.0, requires_grad=True) for _ in range(3)]
    projection = torch.ones(2, 3, requires_grad=True)
    y, _ = damped_ema(torch.ones(1, 130, 2), ema_coefficients(*parameters, projection))
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(p.grad).all() for p in [*parameters, projection])


def test_refusals_name_what_is_wrong():
    leaves = {name: leaf.detach() for name, leaf in make_case(5).items()}
    coefficients = coefficients_of(leaves)
    x, resets = leaves["x"], torch.zeros(2, 5, dtype=torch.bool)
    for arguments, words in (
        ({"impl": "magic"}, "magic"),
        ({"bidirectional": True}, "bidirectional"),
        ({"state": torch.zeros(2, 6, 5)}, "state has shape"),
        ({"resets": resets.int()}, "resets are"),
        ({"resets": resets, "impl": "fft"}, "resets"),
        ({"truncation": 3, "impl": "blocked"}, "truncated"),
        ({"truncation": 3, "resets": resets}, "truncation=3"),
    ):
        with pytest.raises(ValueError, match=words):
            damped_ema(x, coefficients, **arguments)
    with pytest.raises(ValueError, match="length of at least 1"):
        damped_ema(x[:, :0], coefficients)
