"""The order of an epoch is a permutation, a new one for every seed and epoch, and the same for ever."""

import numpy as np
import pytest

from mega_scale.data.sources import shuffled


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097, 100_003])
def test_every_row_occurs_once(length):
    found = shuffled(np.arange(length), length, seed=3, epoch=1)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(np.sort(found), np.arange(length))


def test_places_can_be_looked_up_on_their_own():
    whole = shuffled(np.arange(1000), 1000, seed=7, epoch=2)
    places = np.array([999, 0, 500, 500])
    np.testing.assert_array_equal(shuffled(places, 1000, seed=7, epoch=2), whole[places])


def test_order_is_fixed_for_ever():
    """Another order would make every checkpoint of before continue on other rows."""
    assert shuffled(np.arange(10), 10, seed=0, epoch=0).tolist() == [3, 7, 4, 6, 5, 2, 1, 0, 9, 8]


def test_seeds_and_epochs_differ():
    orders = [shuffled(np.arange(1000), 1000, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for i, order in enumerate(orders):
        for other in [np.arange(1000), *orders[:i]]:
            assert (order == other).mean() < 0.02  # one in a thousand by chance


def test_rows_go_everywhere():
    """Over many epochs each of 10 rows stands at each of 10 places about equally often."""
    counts = np.zeros((10, 10))
    for epoch in range(2000):
        counts[np.arange(10), shuffled(np.arange(10), 10, seed=5, epoch=epoch)] += 1
    chi_square = ((counts - 200) ** 2 / 200).sum()
    assert chi_square < 130  # 81 degrees of freedom: above this once in 2,000 tries
