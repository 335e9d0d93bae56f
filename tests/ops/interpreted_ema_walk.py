"""The EMA's Triton kernels that walk from token to token, interpreted on a CPU, against the recurrence.

`test_ema_triton.py` runs this file, in a process of its own as `interpreted_ema.py`.
"""

import pytest
import torch
from interpreted_ema import PARAMETERS, assert_same, make_leaves, make_resets, recurrent, run

from mega_scale.ops.ema import EmaCoefficients, damped_ema
from mega_scale.ops.ema.triton_walk import MOST_AVERAGES, Walk, walk_ema

# So small that short sequences have several tiles: 32 tokens forward, 16 backward.
SMALL = (
    Walk(segments=4, tokens=8, unroll=8, channels=4, warps=1),
    Walk(segments=2, tokens=8, unroll=8, channels=8, warps=1),
)

# batch, length, channels, averages, state, where documents begin
CASES = [
    (1, 1, 1, 1, True, None),
    (2, 1, 5, 3, True, "all"),
    (2, 7, 6, 16, False, None),
    (2, 8, 3, 3, True, "one"),
    (1, 9, 9, 1, True, None),
    (2, 32, 8, 3, False, "borders"),
    (2, 33, 5, 3, True, "random"),
    (3, 64, 7, 4, True, "borders"),
    (1, 130, 9, 16, True, None),
    (2, 130, 4, 5, True, "random"),
    (2, 130, 3, 1, False, "one"),
    (1, 40, 4, 3, True, "all"),
]


def small(x, coefficients, state, resets):
    return walk_ema(x, coefficients, state, resets, SMALL)


def whole(x, coefficients, state, resets):
    return damped_ema(x, coefficients, state, resets, impl="triton_walk")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fp32_matches_the_recurrence(case):
    batch, length, channels, averages, with_state, place = case
    leaves = make_leaves(batch, length, channels, averages, with_state)
    resets = None if place is None else make_resets(batch, length, place)
    assert_same(run(leaves, small, resets), run(leaves, recurrent, resets), {"else": 1e-5})


@pytest.mark.parametrize("kept", ["y", "end"])
@pytest.mark.parametrize("place", [None, "random"])
@pytest.mark.parametrize("with_state", [False, True])
def test_either_result_can_go_without_a_gradient(kept, place, with_state):
    leaves = make_leaves(2, 75, 5, 3, with_state)
    resets = None if place is None else make_resets(2, 75, place)

    def part(average):
        def partly(*arguments):
            y, end = average(*arguments)
            return (y, end.detach()) if kept == "y" else (y.detach(), end)

        # Where nothing but the end has a gradient, projections have none.
        names = [name for name in leaves if kept == "y" or name != "projection"]
        return run(leaves, partly, resets, names)

    assert_same(part(small), part(recurrent), {"else": 1e-5})


def test_sizes_for_a_gpu_match_the_recurrence():
    leaves = make_leaves(1, 1100, 33, 2)
    assert_same(run(leaves, whole, None), run(leaves, recurrent, None), {"else": 1e-5})


def test_bf16_keeps_states_in_fp32():
    leaves = make_leaves(2, 70, 5, 3, dtype=torch.bfloat16)
    resets = make_resets(2, 70, "random")
    got, want = run(leaves, small, resets), run({**leaves, "x": leaves["x"].float()}, recurrent, resets)
    # Interpretation cuts off what bf16 does not hold, up to 7.8e-3 (a GPU rounds, by up to 3.9e-3).
    assert_same(got, want, {"y": 8.5e-3, "dx": 8.5e-3, "else": 1e-5})


def test_documents_do_not_reach_each_other():
    """Infinities in one document leave the others untouched: states are forgotten, not multiplied by zero."""
    leaves = make_leaves(1, 100, 3, 3, with_state=False)
    coefficients = EmaCoefficients.from_parameters(*(leaves[name] for name in PARAMETERS))
    resets = torch.zeros(1, 100, dtype=torch.bool)
    resets[:, [0, 30, 70, 90]] = True
    clean = [
        damped_ema(leaves["x"][:, part], coefficients, impl="recurrent") for part in (slice(30, 70), slice(90, 100))
    ]
    poisoned = leaves["x"].clone()
    poisoned[:, 10:30] = torch.inf
    poisoned[:, 70:80] = -torch.inf
    x = poisoned.requires_grad_()
    y, end = small(x, coefficients, torch.full((1, 3, 3), torch.nan), resets)
    torch.testing.assert_close(y[:, 30:70], clean[0][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(y[:, 90:], clean[1][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(end, clean[1][1], atol=1e-5, rtol=1e-5)
    d_y = torch.zeros_like(y)
    d_y[:, 80:90] = torch.inf
    dx = torch.autograd.grad(y, x, d_y)[0]
    assert not dx[:, :70].any() and not dx[:, 90:].any()


def test_a_forgotten_state_reaches_no_gradient():
    leaves = make_leaves(2, 20, 3, 2)
    resets = torch.zeros(2, 20, dtype=torch.bool)
    resets[:, [0, 7]] = True
    names = [name for name in leaves if name != "state"]
    want = run({name: leaves[name] for name in names}, recurrent, resets)
    got = run({**leaves, "state": torch.full_like(leaves["state"], torch.nan)}, small, resets, [*names, "state"])
    assert not got.pop("dstate").any()
    assert_same(got, want, {"else": 1e-5})


def test_what_has_no_kernel_is_refused():
    def coefficients(averages, dtype):
        return EmaCoefficients(*(-torch.ones(2, averages, dtype=dtype) for _ in range(3)))

    with pytest.raises(ValueError, match="float64"):
        damped_ema(torch.zeros(1, 5, 2).double(), coefficients(3, torch.float64), impl="triton_walk")
    with pytest.raises(ValueError, match=f"up to {MOST_AVERAGES} moving averages per channel, not 17"):
        damped_ema(torch.zeros(1, 5, 2), coefficients(17, torch.float32), impl="triton_walk")
