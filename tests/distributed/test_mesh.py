"""The arithmetic of the mesh: where ranks stand, which rows they read, and what an axis of -1 becomes."""

from itertools import product

import pytest

from mega_scale.parallel import ParallelConfig
from mega_scale.parallel.mesh import MeshShape, divisors, multiples, nearest

SHAPES = [MeshShape(*sizes) for sizes in product((1, 2, 3), (1, 2, 4), (1, 2), (1, 3))]


def test_axes_are_those_of_shapes_and_of_the_settings():
    assert all(hasattr(ParallelConfig, axis) for axis in MeshShape._fields)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ranks_with_one_dp_rank_are_those_that_share_rows(shape):
    """Ranks are numbered row-major, tp fastest."""
    places = list(product(*(range(size) for size in shape)))
    assert shape.size == len(places) == shape.dp * shape.sp * shape.tp == shape.dp_replicate * shape.fsdp * shape.tp
    for rank, (replicate, shard, _, _) in enumerate(places):
        assert shape.dp_rank(rank) == replicate * shape.dp_shard + shard


def test_a_mesh_of_sixteen():
    shape = MeshShape(2, 2, 2, 2)
    assert [shape.dp_rank(rank) for rank in range(16)] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert (shape.size, shape.dp, shape.fsdp) == (16, 4, 4)


@pytest.mark.parametrize(
    ("world_size", "sizes", "expected"),
    [
        (1, {}, (1, 1, 1, 1)),
        (8, {}, (1, 8, 1, 1)),
        (8, {"tp": 2}, (1, 4, 1, 2)),
        (8, {"sp": 2, "tp": 4}, (1, 1, 2, 4)),
        (24, {"dp_replicate": 3, "sp": 2}, (3, 4, 2, 1)),
        (8, {"dp_replicate": 2, "dp_shard": 2, "tp": 2}, (2, 2, 1, 2)),
        (8, {"dp_replicate": 8, "dp_shard": 1}, (8, 1, 1, 1)),
    ],
)
def test_resolve(world_size, sizes, expected):
    assert MeshShape.resolve(world_size, **sizes) == ParallelConfig(**sizes).mesh(world_size) == expected


def test_numbers_for_remedies():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert nearest(divisors(12), 5) == "4 or 6"
    assert nearest([7], 2) == "7"
    assert multiples(16, 30) == "16 or 32"
    assert multiples(16, 7) == multiples(16, 16) == "16"
