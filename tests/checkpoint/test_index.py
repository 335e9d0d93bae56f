"""Which numbers lie in which file: as few words of any number of ranks, and what is read of them."""

import json

import pytest

from mega_scale.checkpoint.saver import describe_files
from mega_scale.checkpoint.state import _pieces


def held(numel, copies, shards, tp, sharded, row):
    """Ranges of a parameter by rank, as `rank_tensors` has them: shards of whole rows, copies that share their work."""
    found = []
    each = -(-(numel // row) // shards) * row
    for rank in range(copies * shards * tp):
        copy, shard, channel = rank // (shards * tp), rank // tp % shards, rank % tp
        first, last = (min(each * number, numel) for number in (shard, shard + 1))
        among, of = (copy, copies) if sharded else (copy * tp + channel, copies * tp)
        start, stop = (first + (last - first) * number // of for number in (among, among + 1))
        found.append({"w": (channel if sharded else 0, start, stop)} if stop > start else {})
    return found


@pytest.mark.parametrize("numel", [1, 7, 4096, 5005, 65_520])
@pytest.mark.parametrize(("copies", "shards", "tp"), [(1, 1, 1), (1, 8, 1), (3, 4, 1), (1, 4, 2), (2, 3, 4), (5, 7, 2)])
def test_runs_are_the_ranges_that_they_came_from(numel, copies, shards, tp):
    for sharded, row in ((False, 1), (False, 7), (True, 1), (True, 5)):
        ranges = held(numel, copies, shards, tp, sharded, row)
        runs = json.loads(json.dumps(describe_files(ranges)))["runs"].get("w", [])
        for begin, end in ((0, numel), (0, 1), (numel // 3, numel // 2 + 1), (numel - 1, numel), (5, 5)):
            want = [
                (tp_rank, start, stop, file)
                for file, one in enumerate(ranges)
                for tp_rank, start, stop in one.values()
                if max(start, begin) < min(stop, end)
            ]
            got = [(run[0], *piece) for run in runs for piece in _pieces(run[1:], begin, end)]
            assert sorted(got) == sorted(want)


@pytest.mark.parametrize("numel", [4096, 4096 * 4096, 4096 * 11_008])
@pytest.mark.parametrize("sharded", [False, True])
def test_many_ranks_take_about_as_many_words_as_few(numel, sharded):
    few, many = (
        len(json.dumps(describe_files(held(numel, copies, shards, 8, sharded, 1))))
        for copies, shards in ((2, 4), (8, 64))
    )
    assert many <= 1.2 * few + 16
