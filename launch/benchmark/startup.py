"""The `startup` command: what a rank does before its first step, counted, by the number of ranks.

The code of a run meets, makes its groups and chooses a checkpoint as the first, the middle and the last of so many
ranks, each in a process of its own: on a process group that nobody else is in, and a store that counts and answers as
if the others had come. What depends on other ranks for its values, as the self-test, is left out.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from mega_scale.checkpoint import folder as store
from mega_scale.files import hash_file
from mega_scale.parallel import ParallelConfig, World, monitor

from . import harness
from .harness import Option

STARTUP = {
    "ranks": Option([64, 1024, 4096], "numbers of ranks"),
    "mesh": Option("dp_shard", "what the ranks are beyond two of sp", ["dp_shard", "dp_replicate"]),
}
HOST = 8  # ranks
MANIFEST = "bytes of the manifest"
LINEAR = (MANIFEST,)
"""What grows with the number of ranks: the manifest has a line for every file of a checkpoint."""

Counts = dict[str, dict[int, list[int]]]
"""By what is counted, and by the number of ranks: of the first, the middle and the last rank."""


class CountingStore(dist.Store):
    """A connection to keys that only this process writes, and its operations; the other ranks seem to have come."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__()
        self.values, self.operations, self._lock = values, 0, threading.Lock()

    def _count(self) -> None:
        self.operations += 1

    def set(self, key: str, value: Any) -> None:
        self._count()
        self.values[key] = _bytes(value)

    def get(self, key: str) -> Any:
        self._count()
        return self.values[key]

    def add(self, key: str, amount: int) -> int:
        self._count()
        with self._lock:
            self.values[key] = int(self.values.get(key, 0)) + amount
            return int(self.values[key])

    def compare_set(self, key: str, expected: Any, desired: Any) -> Any:
        self._count()
        return self.values.setdefault(key, _bytes(desired))

    def check(self, keys: list[str]) -> bool:
        self._count()
        return True

    def wait(self, keys: list[str], *timeout: Any) -> None:
        self._count()

    def multi_get(self, keys: list[str]) -> list[Any]:
        self._count()
        return [self.values.get(key, b"1") for key in keys]

    def deleteKey(self, key: str) -> bool:  # PyTorch's name
        self._count()
        return self.values.pop(key, None) is not None


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


class CountedWorld(World):
    """Counts collectives; gathering at the first rank by the store costs that one operations of every rank."""

    def __init__(self, world: World, counts: Counter[str]) -> None:
        super().__init__(**{name: getattr(world, name) for name in World.__dataclass_fields__ if name[0] != "_"})
        object.__setattr__(self, "counts", counts)

    def all_agree(self, flag: bool) -> bool:
        self.counts["collectives"] += 1  # type: ignore[attr-defined]
        return super().all_agree(flag)

    def broadcast(self, value: Any) -> Any:
        self.counts["collectives"] += 2  # type: ignore[attr-defined]  # its length, too
        return super().broadcast(value)

    def gather(self, value: Any) -> list[Any] | None:
        self.counts["store operations"] += 2 * self.size if self.rank == 0 else 1  # type: ignore[attr-defined]
        return super().gather(value)


def write_checkpoint(run_dir: Path, ranks: int) -> None:
    """A checkpoint as so many ranks write it, with files of a few bytes."""
    folder = store.folder_of(run_dir, 1)
    for name in (store.STATE, store.RANDOM):
        (folder / name).mkdir(parents=True)
    named = [f"{store.STATE}/{store.state_file(rank)}" for rank in range(ranks)]
    named += [store.random_file(rank) for rank in range(ranks)] + [
        store.TRAINER,
        "config.yaml",
        f"{store.STATE}/index.json",
    ]
    for name in named:
        (folder / name).write_bytes(b"{}")
    alike = hash_file(folder / named[0], None)
    store.write_manifest(folder, store.Manifest(1, 1, dict.fromkeys(named, alike)), None)
    (folder.parent / store.LATEST).write_text(f"{folder.name}\n")


def count_rank(rank: int, size: int, run_dir: Path, config: ParallelConfig) -> dict[str, int]:
    """What this rank of so many does; for a process of its own, whose environment and process group it changes."""
    counts: Counter[str] = Counter()
    reading = [False]

    def audit(event: str, arguments: Any) -> None:
        if reading[0] and event in ("open", "os.scandir", "os.listdir"):
            counts["files opened" if event == "open" else "folders listed"] += 1

    sys.addaudithook(audit)
    local = {"LOCAL_RANK": str(rank % HOST), "LOCAL_WORLD_SIZE": str(min(HOST, size)), "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_PORT": "29500", **local})
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"):
        os.environ.pop(name, None)
    values, start = {"mega_scale/0/size": str(size).encode()}, dist.init_process_group
    connections: list[CountingStore] = []

    def fake(backend: str, **how: Any) -> None:
        start("fake", **{name: value for name, value in how.items() if name != "device_id"})

    def connected(*args: Any, **how: Any) -> CountingStore:
        connections.append(CountingStore(values))
        return connections[-1]

    def counted(function: Callable[..., Any], what: str) -> Callable[..., Any]:
        def call(*args: Any, **how: Any) -> Any:
            counts[what] += 1
            return function(*args, **how)

        return call

    with (
        mock.patch.object(dist, "TCPStore", connected),
        mock.patch.object(monitor, "_reach", lambda *args, **how: None),
        mock.patch.object(dist, "init_process_group", fake),
        mock.patch.object(dist, "new_group", counted(dist.new_group, "groups made")),
        mock.patch.object(os, "stat", counted(os.stat, "files looked at")),
    ):
        world = World.start(config)
        counts["files looked at"] = 0
        reading[0] = True
        store.find_checkpoint(run_dir, proof=store.verify_outline)
        together = CountedWorld(replace(world, pretended=True), counts)
        folder, _ = store.find_checkpoint(run_dir, world=together)
        reading[0] = False
        together.first(None)
    counts["connections to the store"] = len(connections)
    counts["store operations"] += connections[0].operations  # the other one is the monitor's: two a beat
    counts[MANIFEST] = (folder / store.MANIFEST).stat().st_size
    return dict(counts)


def count(sizes: list[int], config: ParallelConfig) -> Counts:
    """Count for the first, the middle and the last rank of each number of ranks."""
    found: Counts = {}
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            write_checkpoint(Path(name), size)
            for rank in (0, size // 2 + 1, size - 1):
                for what, number in _in_a_fork(partial(count_rank, rank, size, Path(name), config)).items():
                    found.setdefault(what, {}).setdefault(size, []).append(number)
    return found


def growing(counts: Counts) -> list[str]:
    """What grows faster than the logarithm of the number of ranks on one of the ranks, but for what is `LINEAR`."""
    found = []
    for what, by_size in counts.items():
        least, most = min(by_size), max(by_size)
        bound = math.log2(most) / math.log2(least)
        if what not in LINEAR and any(
            late > bound * early + 1 for early, late in zip(by_size[least], by_size[most], strict=True)
        ):
            found.append(what)
    return found


def _in_a_fork(work: Callable[[], Mapping[str, int]]) -> dict[str, int]:
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.write(writer, json.dumps(work()).encode())
        except BaseException as error:
            os.write(writer, json.dumps({"error": repr(error)}).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = json.loads(pipe.read() or b"{}")
    os.waitpid(process, 0)
    if "error" in answer or not answer:
        raise ValueError(f"a rank could not be counted: {answer.get('error', 'it ended')}")
    return dict(answer)


def run_startup(args: argparse.Namespace) -> None:
    """Count and print. Raises ValueError where numbers of ranks are not such, or an entry grows that should not."""
    if not all(ranks >= 2 * HOST and ranks % HOST == 0 for ranks in args.ranks):
        raise ValueError(f"--ranks {args.ranks}: give multiples of {HOST}, {2 * HOST} or more")
    counts = count(sorted(args.ranks), mesh_of(args.mesh))
    rows = [
        {"name": what, **{f"of_{size}": max(numbers) for size, numbers in by_size.items()}}
        for what, by_size in counts.items()
    ]
    columns = {"at most of a rank": "{name}", **{f"{size:,} ranks": f"{{of_{size}:,}}" for size in sorted(args.ranks)}}
    grown = growing(counts)
    harness.report(args, columns, rows, f"Linear: {', '.join([*LINEAR, *grown])}.")
    if grown:
        raise ValueError(f"with the number of ranks grow: {', '.join(grown)}")


def mesh_of(axis: str) -> ParallelConfig:
    """Two ranks along sp, and all others along one axis, or over eight copies."""
    return ParallelConfig(device="cpu", timeout_s=60, sp=2, dp_replicate=1 if axis == "dp_shard" else 8)
