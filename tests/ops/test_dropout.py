"""Dropout by place: the right share, the same fate however the batch is cut, the hash that its numbers come from."""

import pytest
import torch

from mega_scale.ops.elementwise import keep_mask, positional_dropout

ROWS, POSITIONS, COLUMNS = torch.arange(3, 9), torch.arange(100, 1100), torch.arange(40)
MASK = 2**32 - 1


def mix(number: int) -> int:
    number &= MASK
    for multiplier in (0x7FEB352D, 0x2C1B3C6D):
        number = ((number ^ (number >> 16)) * multiplier) & MASK
    return number ^ (number >> 15)


def signed(number: int) -> int:
    return (number & MASK) - 2**32 * ((number & MASK) >= 2**31)


def keeps(p: float, key: int, row: int, position: int, column: int) -> bool:
    """The same in Python's whole numbers, which do not overflow by themselves."""
    place, other = mix(mix(row + key) + position), mix(column + (key ^ 0x9E3779B9))
    h = place ^ other
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & MASK
    h = ((h ^ (h >> 15)) * 0x846CA68B) & MASK
    return signed(h ^ (h >> 16)) >= round(p * 2**32) - 2**31


@pytest.mark.parametrize("key", [0, 1, 0x9E3779B9, MASK])
def test_is_the_hash_that_it_says(key):
    mask = keep_mask(0.3, key, ROWS, POSITIONS[:20], COLUMNS)
    for b, t, d in [(0, 0, 0), (5, 19, 39), (2, 7, 11), (3, 13, 38)]:
        assert bool(mask[b, t, d]) == keeps(0.3, key, int(ROWS[b]), int(POSITIONS[t]), int(COLUMNS[d]))
    expected = [keeps(0.3, key, int(ROWS[1]), int(POSITIONS[3]), d) for d in range(40)]
    assert mask[1, 3].tolist() == expected


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_drops_the_right_share_along_every_dimension(p):
    mask = keep_mask(p, 77, torch.arange(40), torch.arange(400), torch.arange(100)).double()
    for dims in ((0, 1), (0, 2), (1, 2)):
        shares = 1 - mask.mean(dims)
        size = mask.numel() / shares.numel()
        # Six standard deviations of a share.
        assert float((shares - p).abs().max()) < 6 * (p * (1 - p) / size) ** 0.5
    assert abs(float(1 - mask.mean()) - p) < 6 * (p * (1 - p) / mask.numel()) ** 0.5


def test_fates_are_independent():
    """Of neighbours, of two sites and of two rows: both dropped as often as chance has it."""
    one = ~keep_mask(0.5, 5, torch.arange(50), torch.arange(200), torch.arange(64))
    other = ~keep_mask(0.5, 6, torch.arange(50), torch.arange(200), torch.arange(64))
    pairs = [(one, other), (one[1:], one[:-1]), (one[:, 1:], one[:, :-1]), (one[..., 1:], one[..., :-1])]
    for a, b in [*pairs, (one[:, :100], one[:, 100:]), (one[..., :32], one[..., 32:])]:
        both = (a & b).double().mean()
        assert abs(float(both) - 0.25) < 6 * (0.25 * 0.75 / a.numel()) ** 0.5


def test_does_not_depend_on_how_the_batch_is_cut():
    x = torch.randn(len(ROWS), len(POSITIONS), len(COLUMNS))
    whole = positional_dropout(x, 0.2, 9, ROWS, POSITIONS, COLUMNS)
    for rows, positions, columns in [
        ((0, 2), (0, 500), (0, 40)),
        ((2, 6), (333, 1000), (13, 27)),
        ((5, 6), (999, 1000), (0, 1)),
    ]:
        b, t, d = slice(*rows), slice(*positions), slice(*columns)
        part = positional_dropout(x[b, t, d], 0.2, 9, ROWS[b], POSITIONS[t], COLUMNS[d])
        assert torch.equal(part, whole[b, t, d])


def test_scales_what_stays_and_passes_its_gradient():
    x = torch.randn(6, 10, 40, requires_grad=True)
    y = positional_dropout(x, 0.25, 1, ROWS, POSITIONS[:10], COLUMNS)
    y.sum().backward()
    mask = keep_mask(0.25, 1, ROWS, POSITIONS[:10], COLUMNS)
    torch.testing.assert_close(y.detach(), x.detach() * mask / 0.75)
    torch.testing.assert_close(x.grad, mask / 0.75)
    assert positional_dropout(x.bfloat16(), 0.25, 1, ROWS, POSITIONS[:10], COLUMNS).dtype == torch.bfloat16


def test_one_position_drops_whole_features():
    x = torch.ones(6, 50, 40)
    y = positional_dropout(x, 0.5, 3, ROWS, POSITIONS[:1], COLUMNS)
    assert torch.equal(y, y[:, :1].expand_as(y)) and 0.3 < float((y == 0).double().mean()) < 0.7
