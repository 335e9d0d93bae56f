"""What a rank does before its first step does not grow with the number of ranks, or as its logarithm at most."""

import resource

import pytest

from launch.benchmark import startup
from mega_scale.checkpoint import folder
from mega_scale.parallel import monitor


@pytest.mark.parametrize("mesh", ["dp_shard", pytest.param("dp_replicate", marks=pytest.mark.slow)])
def test_no_entry_becomes_linear(mesh):
    most = 4096 if mesh == "dp_shard" else 1024
    counts = startup.count([64, most], startup.mesh_of(mesh))
    assert startup.growing(counts) == []
    assert max(counts["store operations"][most]) < 40 and max(counts["groups made"][most]) <= 4
    assert max(counts["files looked at"][most]) < 40  # of two a rank
    assert counts["collectives"][most][0] > 0
    assert max(counts[startup.MANIFEST][most]) < 400 * most


@pytest.mark.slow
def test_what_would_become_linear_is_found(monkeypatch):
    everything = folder.verify
    monkeypatch.setattr(folder, "verify", lambda path, key=None, share=(0, 1): everything(path, key))
    assert {"files looked at", "files opened"} <= set(
        startup.growing(startup.count([64, 1024], startup.mesh_of("dp_shard")))
    )


@pytest.mark.parametrize(
    ("ranks", "limits", "raised"),
    [(64, (1024, 4096), None), (1024, (1024, 4096), (2560, 4096)), (4096, (1024, -1), (8704, -1))],
)
def test_the_process_that_keeps_the_store_may_have_a_connection_of_every_rank(monkeypatch, ranks, limits, raised):
    found = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda which, new: found.append(new))
    monitor._allow_connections(ranks)
    assert found == ([] if raised is None else [raised])


def test_too_few_connections_are_refused_with_the_number_to_allow(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 4096))
    with pytest.raises(ConnectionError, match=r"4096 files open, and 4096 ranks need 8704 .*ulimit -Hn"):
        monitor._allow_connections(4096)
