"""Model and optimizer as files, in one canonical form for both engines: reading them, and rewriting them as others.

    index.json              shape and sharding of every parameter, and which numbers of which one lie in which file
    part-00000.safetensors  `weight/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME` or, of what Muon steps, `momentum/NAME`,
                            and `average/NAME` where it is kept, each a range of numbers, fp32

Every engine keeps of each parameter, and of its moments, one contiguous range of the flattened shard that its rank of
`tp` has. Ranks that hold the same numbers share the work of writing them. Any number of ranks in any mesh reads what it
needs: the ranges that overlap with its own, or, where `tp` differs, whole parameters, one at a time.
"""

import functools
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mega_scale.checkpoint import folder as store
from mega_scale.checkpoint import saver
from mega_scale.files import FileLock, Record, discard, flush, reason, replace_text
from mega_scale.hub.folder import LazyTensors
from mega_scale.parallel import Engine, World
from mega_scale.parallel.shard import (
    AVERAGE,
    KINDS,
    MOMENTS,
    WEIGHT,
    EngineState,
    Shard,
    Sharding,
    assemble,
    by_source,
)

_MOST_STEPS = 2**53  # what every kind of number that counts steps can hold
_MOST_FILES = 2**20
_OPEN_FILES = 64


def load_checkpoint(folder: Path, engine: Engine, world: World) -> dict[str, Any]:
    """Bring engine and random state to where a verified checkpoint left them, whichever layout wrote it; collective.

    Returns what `trainer.json` holds. Raises ValueError, having changed nothing, where it holds another model, or what
    no trainer wrote.
    """
    state = store.read_state(folder)
    # Nothing in training draws from it that ranks do not draw alike, so other ranks than before go on without.
    random: dict[str, Tensor] = {}
    if store.random_file(world.rank) in store.own_files(folder):
        path = folder / store.random_file(world.rank)
        try:
            random = load_file(path)
            torch.Generator().set_state(random["cpu"])
            if torch.cuda.is_available() and "cuda" in random:
                torch.Generator("cuda").set_state(random["cuda"])
        except (OSError, SafetensorError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path} holds no random state ({reason(error)}): choose another checkpoint") from None
    with torch.no_grad():
        StateReader(folder / store.STATE).load(engine.state())
    engine.loaded(state["step"])
    if random:
        torch.set_rng_state(random["cpu"])
        if torch.cuda.is_available() and "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"])
    world.barrier()
    return state


class StateReader:
    """Reads the files of a state, in the folder of `index.json`; needs no process group, and memory for one parameter.

    Raises ValueError where the index cannot be read, or is of another format.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = functools.lru_cache(_OPEN_FILES)(functools.partial(_open, folder))
        try:
            found: dict[str, Any] = json.loads((folder / saver.INDEX).read_text(encoding="utf-8"))
            if found["format"] == 1:  # which lists every range
                found |= saver.describe_files(found.pop("parts")) | {"format": saver.FORMAT}
            if found["format"] != saver.FORMAT:
                raise ValueError(f"it has format {found['format']}, this version reads up to {saver.FORMAT}")
            self.index = found
            self.shardings = {
                name: Sharding(source, None if rows is None else tuple(rows), *rest)
                for name, (source, rows, *rest) in found["table"].items()
            }
            self.ties: dict[str, str] = found["ties"]
            self.tp, self.optimizer_steps = found["tp"], found["optimizer_steps"]
            self.shapes = {name: torch.Size(shape) for name, shape in found["shapes"].items()}
            self.buffers, self.averaged = list(found["buffers"]), found.get("averaged", 0)
            self.kinds = {name: tuple(kinds) for name, kinds in _kinds(found).items()}
            self.trained = {name for name, kinds in self.kinds.items() if len(kinds) > 1}
            self._check_counts()
            self._stored = self._stored_shards(found["files"], found["runs"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError) as error:
            raise ValueError(f"{folder / saver.INDEX} cannot be read ({error!r}): choose another checkpoint") from None

    def _check_counts(self) -> None:
        """See that counts are counts, so that nothing is looped over that no model has."""
        for what, steps in (("the optimizer has done", self.optimizer_steps), ("the average is of", self.averaged)):
            if type(steps) is not int or not 0 <= steps < _MOST_STEPS:
                raise ValueError(f"it says that {what} {steps!r} steps")
        for name in self.shapes:
            if name not in self.kinds or not {WEIGHT} <= set(self.kinds[name]) <= set(KINDS):
                raise ValueError(f"it says that {self.kinds.get(name)} is there of {name}")
        if type(self.tp) is not int or self.tp < 1:
            raise ValueError(f"it says that layers are cut in {self.tp!r}")
        if missing := self.shardings.keys() - self.shapes.keys():
            raise ValueError(f"it has no shape of {min(missing)}")
        for name, sharding in self.shardings.items():
            if sharding.dim is not None:
                length = self.shapes[name][sharding.dim]
                if sharding.length not in (None, length) or (sharding.length is None and length % self.tp):
                    raise ValueError(f"{name} cannot be cut in {self.tp}")

    def _stored_shards(self, files: int, runs: dict[str, list[saver.Run]]) -> dict[tuple[str, Shard], list[saver.Run]]:
        """By parameter and shard, the runs in which its numbers lie."""
        found: dict[tuple[str, Shard], list[saver.Run]] = {}
        for name, stored in runs.items():
            for run in stored:
                tp_rank, file, start, length, *repeats = run
                counts, steps = repeats[::3], repeats[2::3]
                if not (
                    all(type(number) is int for number in (files, *run))
                    and 0 <= tp_rank < self.tp
                    and min(start, length, file) >= 0
                    and len(counts) == len(steps) <= saver.DIMENSIONS
                    and all(number > 0 for number in (*counts, *steps))
                    and math.prod(counts) <= files <= _MOST_FILES  # a file has one range of a parameter
                ):
                    raise ValueError(f"it has {run} as a run of {name} in {files} files")
                shard = self.shardings[name].shard(self.shapes[name], tp_rank, self.tp)
                found.setdefault((name, shard), []).append(run)
        return found

    def load(self, state: EngineState) -> None:
        """Write what the files hold into an engine's memory, which is changed only if all of it fits."""
        buffers = {name: self.buffer(name) for name in state.buffers if name in self.buffers}
        there = {name: self.shapes.get(name) for name in self.shardings}
        there |= {name: buffer.shape for name, buffer in buffers.items()}
        here = {name: local.shape for name, local in state.tensors.items()}
        here |= {name: buffer.shape for name, buffer in state.buffers.items()}
        if names := sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name)):
            shapes = (found.get(names[0]) for found in (there, here))
            texts = ["missing" if shape is None else str(tuple(shape)) for shape in shapes]
            raise ValueError(
                f"{self._folder} holds another model: {names[0]} is {texts[0]} there and {texts[1]} here "
                f"({len(names)} such parameters): set the checkpoint's model.* keys"
            )
        wanted, missing = [], []
        for name, local in state.tensors.items():
            for kind, tensor in local.tensors.items():
                # An average that is kept from here on begins with the weights.
                stored = WEIGHT if kind == AVERAGE and not self.averaged else kind
                wanted.append((tensor, (name, stored, local.shard, local.start, local.start + len(tensor))))
                missing += [(name, stored)] if stored not in self.kinds[name] else []
        if missing:
            name, kind = min(missing)
            remedy = "set optimizer.name to that of the checkpoint's config.yaml, or start anew with init_from"
            raise ValueError(f"{self._folder} has no {kind} of {name}, which is trained here: {remedy}")
        for _, numbers in wanted:
            self._find(*numbers)
        for tensor, numbers in wanted:
            tensor.copy_(self.read(*numbers))
        for step in state.steps:
            step.fill_(self.optimizer_steps)
        if state.averaged is not None:
            state.averaged.fill_(self.averaged)
        for name, buffer in state.buffers.items():
            buffer.copy_(buffers[name])

    def read(self, name: str, kind: str, shard: Shard, start: int, stop: int) -> Tensor:
        """Numbers start:stop of a flattened shard, (stop - start,) on the CPU; `kind` is one of KINDS."""
        if start < stop and (name, shard) not in self._stored:
            return shard.of(self.whole(name, kind)).reshape(-1)[start:stop]
        return self._range(name, kind, shard, start, stop)

    def whole(self, name: str, kind: str = WEIGHT) -> Tensor:
        """A whole parameter, or another of its KINDS, on the CPU."""
        shards = self._shards(name)
        return self.shardings[name].join(
            [self._range(name, kind, shard, 0, shard.numel).view(shard.sizes) for shard in shards]
        )

    def buffer(self, name: str) -> Tensor:
        """A buffer, on the CPU; raises ValueError where there is none of that name."""
        return self._tensor(0, f"{saver.BUFFER}/{name}")

    def _shards(self, name: str) -> list[Shard]:
        sharding = self.shardings[name]
        ranks = 1 if sharding.dim is None else self.tp
        return [sharding.shard(self.shapes[name], rank, ranks) for rank in range(ranks)]

    def _range(self, name: str, kind: str, shard: Shard, start: int, stop: int) -> Tensor:
        parts = self._find(name, kind, shard, start, stop) or [torch.empty(0)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _find(self, name: str, kind: str, shard: Shard, start: int, stop: int) -> list[Tensor]:
        """Parts of stored tensors, in order, that make up a range, or what it is cut from; reads none."""
        wanted = [(shard, start, stop)]
        if start < stop and (name, shard) not in self._stored:
            wanted = [(other, 0, other.numel) for other in self._shards(name)]
        found: list[Tensor] = []
        for one, first, last in wanted:
            at = first
            runs = self._stored.get((name, one), [])
            pieces = [piece for run in runs for piece in _pieces(run[1:], first, last)]
            for begin, end, file in sorted(pieces):
                if begin <= at < min(end, last):
                    stored = self._tensor(file, f"{kind}/{name}")
                    if stored.dtype != torch.float32 or stored.shape != (end - begin,):
                        raise self._lacks(file, f"{kind}/{name}", f"it is {stored.dtype}, {tuple(stored.shape)}")
                    found.append(stored[at - begin : min(end, last) - begin])
                    at = min(end, last)
            if at < last:
                raise ValueError(
                    f"{self._folder} lacks numbers {at} to {last} of {kind} {name}: choose another checkpoint"
                )
        return found

    def _tensor(self, file: int, name: str) -> Tensor:
        if (found := self._file(file).get(name)) is None:
            raise self._lacks(file, name, "it has none of that name")
        return found

    def _lacks(self, file: int, name: str, why: str) -> ValueError:
        return ValueError(f"{self._folder / store.state_file(file)} lacks {name} ({why}): choose another checkpoint")


def _pieces(run: saver.Run, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """First number, the one after the last, and file, of each range of a run that overlaps with start:stop.

    The run is without its rank of tp. Whatever its length, only what overlaps is looked at.
    """
    file, first, length, *repeats = run
    if not repeats:
        if max(first, start) < min(first + length, stop):
            yield first, first + length, file
        return
    count, apart, step, *inner = repeats
    extent = length + sum((n - 1) * each for n, each in zip(inner[::3], inner[2::3], strict=True))
    earliest = max((start - first - extent) // step + 1, 0)
    for number in range(earliest, min(-((first - stop) // step), count)):
        yield from _pieces([file + number * apart, first + number * step, length, *inner], start, stop)


def _kinds(index: dict[str, Any]) -> dict[str, list[str]]:
    """By parameter, what an index says is there of it; older ones name only those that are trained."""
    if "kinds" in index:
        found: dict[str, list[str]] = index["kinds"]
        return found
    trained = set(index["trained"])
    return {name: [WEIGHT, *(MOMENTS if name in trained else ())] for name in index["shapes"]}


def _open(folder: Path, file: int) -> dict[str, Tensor]:
    path = folder / store.state_file(file)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({reason(error)}): choose another checkpoint") from None


def open_weights(folder: Path, average: bool = False) -> LazyTensors:
    """Open the weights of a state, the folder of `index.json`, or their `average`; memory is bounded by one tensor.

    Returns full CPU tensors by state-dict name, tied names and persistent buffers included; weights that are not
    trained are their own average. Raises ValueError where files are missing, or no average was kept.
    """
    reader = StateReader(folder)
    if average and not reader.averaged:
        raise ValueError(f"{folder.parent} holds no average of the weights: train with train.weight_average=0.9999")
    stored = by_source(reader.shardings) | {name: [name] for name in reader.buffers}
    stored |= {name: stored[owner] for name, owner in reader.ties.items()}

    def read(name: str) -> Tensor:
        if name not in reader.shardings:
            return reader.buffer(name)
        return reader.whole(name, AVERAGE if average and AVERAGE in reader.kinds[name] else WEIGHT)

    return LazyTensors({name: functools.partial(assemble, parts, read) for name, parts in stored.items()})


# Checkpoints rewritten in another number of files, or with another signature; memory for one parameter


def convert(folder: Path, run_dir: Path, parts: int, key: bytes | None = None, new_key: bytes | None = None) -> Path:
    """Write a checkpoint, verified first, anew into another run folder; it is resumed from as the original is.

    Its state has `parts` files, as so many ranks would have written them. `new_key` is the secret to sign it with.
    Raises ValueError where it is damaged, the destination holds a run, or a job that trains has it.
    """
    if parts < 1:
        raise ValueError(f"parts={parts} is not possible: give at least 1")
    manifest = store.verify(folder, key)
    run_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(run_dir / store.LOCK):
        final = store.folder_of(run_dir, manifest.step)
        if os.path.lexists(final) or store.checkpoints(run_dir):
            raise ValueError(f"{run_dir} holds a run already, or {final} exists: choose another folder")
        fresh = final.with_suffix(saver.UNFINISHED)
        discard(fresh)
        (fresh / store.STATE).mkdir(parents=True)
        files: dict[str, Record] = {}
        for name in manifest.files:  # what else lies there is not ours
            if not name.startswith(f"{store.STATE}/"):
                (fresh / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, fresh / name)
                files[name] = saver.flush_and_hash(fresh / name, new_key)
        reader, ranges = StateReader(folder / store.STATE), []
        for part in range(parts):
            name = f"{store.STATE}/{store.state_file(part)}"
            files[name], found = _rewrite_part(reader, fresh / name, part, parts, new_key)
            ranges.append(found)
        # Whole along tp.
        table = {name: sharding._replace(dim=None, length=None) for name, sharding in reader.shardings.items()}
        index = reader.index | {"table": table, "tp": 1} | saver.describe_files(ranges)
        saver.write_index_and_manifest(fresh, index, store.Manifest(manifest.step, manifest.serial, files), new_key)
        fresh.rename(final)
        flush(final.parent)
        replace_text(final.parent / store.LATEST, final.name + "\n")
    return final


def _rewrite_part(
    reader: StateReader, path: Path, part: int, parts: int, key: bytes | None
) -> tuple[Record, dict[str, saver.StoredRange]]:
    """Write one of `parts` files, each of which has its share of every parameter."""
    like: dict[str, Tensor] = {}
    ranges: dict[str, saver.StoredRange] = {}
    for name, shape in reader.shapes.items():
        first, last = (shape.numel() * number // parts for number in (part, part + 1))
        if last > first:
            ranges[name] = (0, first, last)
            like |= {f"{kind}/{name}": torch.empty(last - first, device="meta") for kind in reader.kinds[name]}
    if part == 0:
        like |= {f"{saver.BUFFER}/{name}": reader.buffer(name).to("meta") for name in reader.buffers}

    def read(stored: str) -> Tensor:
        kind, name = stored.split("/", 1)
        if kind == saver.BUFFER:
            return reader.buffer(name)
        _, first, last = ranges[name]
        return reader.whole(name, kind).view(-1)[first:last]

    return saver.write_and_prove(path, like, key, read), ranges
