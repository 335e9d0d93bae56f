"""Writing checkpoints: beside, flushed, read back, renamed; in the background if wanted. README.md has the steps."""

import contextlib
import json
import operator
import os
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mega_scale.checkpoint import folder as store
from mega_scale.files import Record, discard, flush, forget, hash_file, new_hash, reason, replace_text, write_json
from mega_scale.parallel import Engine, World
from mega_scale.parallel.shard import WEIGHT, EngineState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mega_scale.checkpoint.remote import RemoteRun
    from mega_scale.model.configuration_mega import BaseConfig

INDEX = "index.json"
FORMAT = 2
BUFFER = "buffer"
# What follows the name of a checkpoint while it is written, and until another of its step has its place.
UNFINISHED, _REPLACED = ".unfinished", ".replaced"

StoredRange = tuple[int, int, int]
"""Rank of tp whose shard it is (0 where a parameter is not sharded), first number in it, and the one after the last."""
Run = list[int]
"""Ranges that lie evenly in files: rank of tp, file, first number and length of the first range; then, for each way in
which it repeats, outermost first, how often it is there, and by how much files and first numbers differ."""

_ROOM = 1.05  # of what the tensors take, for all else
_SMALL_BYTES = 2**20
DIMENSIONS = 4  # of a mesh, along each of which what ranks hold repeats
_NAMED = 4  # ranks whose problem is told
_ALIGNMENT = 64  # bytes; every dtype can begin there
_LOOK_S = 5.0
_CHUNK_BYTES = 16 * 2**20
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def describe_model(config: "BaseConfig", tokenizer: "PreTrainedTokenizerBase") -> dict[str, bytes]:
    """Files of a checkpoint, by path, that make weights a model again: its configuration and tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {f"model/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in files}


class Saved(NamedTuple):
    step: int  # of the checkpoint
    folder: Path | None  # where it lies; None if it could not be written
    problem: str  # why not, or what went wrong beside it
    stall_s: float  # for how long training stood still (seconds)
    write_s: float  # from the beginning until all was written and read back (seconds)
    bytes: int  # size of all files


@dataclass
class _Save:
    """A checkpoint under way: copied where saves are asynchronous, written by all ranks, then completed by rank 0."""

    step: int
    folder: Path
    index: dict[str, Any]
    ranges: dict[str, StoredRange]
    began: float
    copying: Future[Any] | None
    writing: Future[Any]
    completing: Future[Any] | None = None
    stall_s: float = 0.0


class Saver:
    """Writes the checkpoints of a run; methods are collective, except for `wait_copied`.

    `described` has `config.yaml` and the files in `model/`, by path, on the first rank. Checkpoints of the steps in
    `held`, at first of `kept`, are not deleted. A run in an object store has a `remote`: its checkpoints are saved when
    they are there. `under_way` is the checkpoint that is being written, if any, on all ranks alike.
    """

    def __init__(
        self,
        run_dir: Path,
        engine: Engine,
        world: World,
        described: Mapping[str, bytes],
        config: store.CheckpointConfig,
        key: bytes | None = None,
        kept: int | None = None,
        remote: "RemoteRun | None" = None,
    ) -> None:
        self._run_dir, self._engine, self._world, self._described = run_dir, engine, world, described
        self._config, self._key, self._remote = config, key, remote
        self.held = set[int]() if kept is None else {kept}
        self._staging = Staging(world.device) if config.asynchronous else None
        self.under_way: _Save | None = None
        self.written = self.total = 0  # bytes of this rank's part of it
        self.on_wait: Callable[[], object] = lambda: None  # called now and then while training waits for it
        if world.rank == 0:
            # Remove what a killed run left half written, and restore what it was about to replace.
            for path in run_dir.glob(f"checkpoints/step-*{_REPLACED}"):
                if path.with_suffix("").exists():
                    forget(path)
                else:
                    with contextlib.suppress(OSError):
                        path.rename(path.with_suffix(""))
            store.sweep(run_dir, UNFINISHED)
            store.sweep(run_dir)
            self._serial = max(store.next_serial(run_dir), 0 if remote is None else remote.next_serial())

    def save(self, step: int, trainer: dict[str, Any]) -> list[Saved]:
        """Begin a checkpoint, or write it where saves are not asynchronous; wait for the one before.

        Returns what ended meanwhile: the save before, and this one if it is not asynchronous or could not begin.
        """
        ended = self.finish()
        began = time.perf_counter()
        folder = store.folder_of(self._run_dir, step)
        unfinished = folder.with_suffix(UNFINISHED)
        rank, state = self._world.rank, self._engine.state()
        tensors, ranges = rank_tensors(state, rank)
        if problem := self._prepare(unfinished, tensors):
            return [*ended, Saved(step, None, problem, time.perf_counter() - began, 0.0, 0)]
        self.written, self.total = 0, sum(tensor.nbytes for tensor in tensors.values())
        random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state()
        copying = None
        if (staging := self._staging) is not None:
            staging.mark()
            copying = _start("copy", lambda: staging.copy(tensors))

        def write() -> tuple[dict[str, Record], str]:
            state = tensors if copying is None else copying.result()
            for name in (store.STATE, store.RANDOM):  # a run in an object store has a folder on each host
                (unfinished / name).mkdir(parents=True, exist_ok=True)
            tables = {f"{store.STATE}/{store.state_file(rank)}": state, store.random_file(rank): random}
            found = {
                name: write_and_prove(unfinished / name, table, self._key, note=self._note)
                for name, table in tables.items()
            }
            trainer_text = (json.dumps(trainer, indent=1) + "\n").encode()
            for name, text in {store.TRAINER: trainer_text, **self._described}.items() if rank == 0 else ():
                (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
                (unfinished / name).write_bytes(text)
                found[name] = flush_and_hash(unfinished / name, self._key)
            try:
                if self._remote is not None:
                    self._remote.upload(unfinished, folder.name, found)
            except OSError as error:
                return found, reason(error)
            return found, ""

        # The index says how many steps the optimizer has done: now, since training goes on before it is written.
        index = build_index(state, [])
        writing = _start("write", write, background=staging is not None)
        self.under_way = _Save(step, folder, index, ranges, began, copying, writing)
        self.under_way.stall_s = time.perf_counter() - began
        return [*ended, *([] if staging is not None else self.finish())]

    def _note(self, count: int) -> None:
        self.written += count

    def wait_copied(self) -> None:
        """Wait until the state has been copied; call it before anything changes the state. Not collective."""
        save = self.under_way
        if save is not None and save.copying is not None:
            began = time.perf_counter()
            wait([save.copying])
            save.copying = None
            save.stall_s += time.perf_counter() - began

    def poll(self) -> list[Saved]:
        """Go on with a checkpoint that all ranks have written by now; call it after every step."""
        save = self.under_way
        if save is None or not self._world.all_agree((save.completing or save.writing).done()):
            return []
        return self._advance(save, time.perf_counter())

    def finish(self) -> list[Saved]:
        """Wait for the checkpoint that is being written, if there is one, and complete it."""
        ended: list[Saved] = []
        while (save := self.under_way) is not None:
            began = time.perf_counter()
            while wait([save.completing or save.writing], _LOOK_S).not_done:
                self.on_wait()
            ended = self._advance(save, began)
        return ended

    def _advance(self, save: _Save, began: float) -> list[Saved]:
        """From written to being completed, or from there to the end; all ranks' tasks are done."""
        if save.completing is None:
            problem = _problem(save.writing)
            records, unsent = ({}, "") if problem else save.writing.result()
            reports = self._world.gather([records, save.ranges, problem, unsent])
            save.completing = _start("complete", lambda: self._complete(save, reports), self._staging is not None)
            save.stall_s += time.perf_counter() - began
            return []
        problem = _problem(save.completing)
        outcome = [problem, *((0, 0.0, "") if problem else save.completing.result())]
        problem, size, write_s, remark = self._world.broadcast(outcome)
        if problem and self._world.rank == 0:
            forget(save.folder.with_suffix(UNFINISHED))
        elif self._remote is not None and self._world.local_rank == 0:
            forget(save.folder.with_suffix(UNFINISHED))  # of hosts other than the first
        self.under_way = None
        stall_s = save.stall_s + time.perf_counter() - began
        return [Saved(save.step, None if problem else save.folder, problem or remark, stall_s, write_s, size)]

    def _prepare(self, unfinished: Path, tensors: dict[str, Tensor]) -> str:
        """Make the folder, and see whether there is room; returns what is wrong, the same on all ranks."""
        needed = int(_ROOM * sum(tensor.nbytes for tensor in tensors.values())) + _SMALL_BYTES
        total = int(self._world.sum(torch.tensor(needed)))
        problem = ""
        if self._world.rank == 0:
            try:
                forget(unfinished)
                if self._remote is not None:
                    self._remote.withdraw(unfinished.stem)
                for folder in (store.STATE, store.RANDOM):
                    (unfinished / folder).mkdir(parents=True, exist_ok=True)
                free = shutil.disk_usage(unfinished).free
                if free < total:
                    problem = f"it needs {total:,} bytes, {free:,} are free in {unfinished.parent}: make room"
                    forget(unfinished)
            except OSError as error:
                problem = f"rank 0: {reason(error)}"
        # Also tells the others that the folder is there.
        return str(self._world.broadcast(problem))

    def _complete(self, save: _Save, reports: list[Any] | None) -> tuple[int, float, str]:
        """On rank 0, write what says that all is there, and give the folder its name. Raises OSError.

        Returns the size of all files, the seconds since the save began, and what went wrong beside it.
        """
        if reports is None:
            return 0, 0.0, ""
        if problems := [f"rank {rank}: {problem}" for rank, (*_, problem, _) in enumerate(reports) if problem]:
            raise OSError("; ".join(problems[:_NAMED]))
        unfinished, replaced = save.folder.with_suffix(UNFINISHED), save.folder.with_suffix(_REPLACED)
        index = save.index | describe_files([ranges for _, ranges, *_ in reports])
        files = {name: Record(*record) for records, *_ in reports for name, record in records.items()}
        manifest = store.Manifest(save.step, self._serial, files)
        write_index_and_manifest(unfinished, index, manifest, self._key)
        if os.path.lexists(save.folder):  # a run that was continued from before this step writes it anew
            discard(replaced)
            save.folder.rename(replaced)
        unfinished.rename(save.folder)
        flush(save.folder.parent)
        self._serial += 1
        remark = ""
        try:
            replace_text(save.folder.parent / store.LATEST, save.folder.name + "\n")
        except OSError as error:  # nobody resumes by its word
            remark = f"{store.LATEST} still names another: {reason(error)}"
        forget(replaced)
        if self._remote is not None:
            remark += self._publish(self._remote, save.folder, manifest, [unsent for *_, unsent in reports])
        # The one just written stays in any case: it was read back, and a damaged one may seem to be newer.
        always = [save.folder, *(store.folder_of(self._run_dir, step) for step in tuple(self.held))]
        others = [folder for folder in store.checkpoints(self._run_dir) if folder not in always]
        for folder in store.surplus([*others, save.folder], self._config.keep, self._config.keep_every):
            with contextlib.suppress(OSError):
                store.delete(folder)
        store.sweep(self._run_dir)
        return manifest.bytes, time.perf_counter() - save.began, remark

    def _publish(self, remote: "RemoteRun", folder: Path, manifest: store.Manifest, unsent: list[str]) -> str:
        """Make a checkpoint of what all ranks uploaded; returns what went wrong beside it. Raises OSError."""
        try:
            if failed := [f"rank {rank}: {problem}" for rank, problem in enumerate(unsent) if problem]:
                raise OSError("; ".join(failed[:_NAMED]))
            index = f"{store.STATE}/{INDEX}"
            remote.upload(folder, folder.name, {index: manifest.files[index]})
            remote.complete(folder)
        except OSError as error:
            raise OSError(f"it is not in {remote.url}, but in {folder} alone: {reason(error)}") from None
        try:
            held = (store.folder_of(self._run_dir, step).name for step in tuple(self.held))
            always = [folder.name, *(name for name in held if name != folder.name)]
            if self._config.keep:
                remote.keep(self._config.keep, self._config.keep_every, always)
            remote.upload_beside()
        except OSError as error:
            return reason(error)
        return ""


def _start(name: str, work: Callable[[], Any], background: bool = True) -> Future[Any]:
    """Work on a thread of its own, or on this one."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # whatever it is, the run goes on and says it
            future.set_exception(error)
            if not isinstance(error, Exception):
                raise

    if background:
        # A daemon: a run that fails does not wait for a checkpoint that can no longer be completed.
        threading.Thread(target=run, name=f"{name} checkpoint", daemon=True).start()
    else:
        run()
    return future


def _problem(done: Future[Any]) -> str:
    error = done.exception()
    return "" if error is None else reason(error)


class Staging:
    """A copy of the state in one buffer of host memory, locked beside a GPU: new memory costs more than the copy."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._locked = False

    def mark(self) -> None:
        """Let the next copy be of what the device has been told to compute so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors by name to the CPU, in any thread, and wait for it; the copies are valid until the next call."""
        sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors.values()]
        if self._stream is not None:
            # A thread begins on the first GPU, where leaving the stream would make a context of this process.
            torch.cuda.set_device(self._stream.device)
        if len(self._buffer) < sum(sizes):
            self._allocate(sum(sizes))
        copies = {}
        with torch.cuda.stream(self._stream):
            for (name, tensor), room in zip(tensors.items(), self._buffer[: sum(sizes)].split(sizes), strict=True):
                copy = room[: tensor.nbytes].copy_(_as_bytes(tensor), non_blocking=True)
                copies[name] = copy.view(tensor.dtype).view(tensor.shape)
        if self._stream is not None:
            self._stream.synchronize()
        return copies

    def _allocate(self, size: int) -> None:
        """Take a buffer of so many bytes, locked beside a GPU.

        PyTorch's own locked memory is rounded up to a power of two: 16 GiB for 10.5 of a rank of 7B on 8.
        """
        if self._locked:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._buffer.data_ptr()))
            self._locked = False
        self._buffer = torch.empty(0, dtype=torch.uint8)  # freed before there is another one
        self._buffer = torch.empty(size, dtype=torch.uint8)
        if self._stream is not None:
            try:
                torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self._buffer.data_ptr(), size, 0))
                self._locked = True
            except RuntimeError as error:
                warnings.warn(
                    f"{size:,} bytes of host memory cannot be locked ({error}): copies for checkpoints will be slower, "
                    "and training waits for them",
                    RuntimeWarning,
                    stacklevel=2,
                )


# The canonical form, written; state.py describes it


def rank_tensors(state: EngineState, rank: int) -> tuple[dict[str, Tensor], dict[str, StoredRange]]:
    """1-D tensors that a rank writes, by their name in the file, and the range of each parameter.

    They are views of the engine's memory, which only a step changes. Rank 0 writes the buffers, copies, since a forward
    pass may change them.
    """
    tensors: dict[str, Tensor] = {}
    ranges: dict[str, StoredRange] = {}
    for name, local in state.tensors.items():
        length = len(local.tensors[WEIGHT])
        first, last = (length * number // local.copies for number in (local.copy, local.copy + 1))
        if last > first:
            sharded = state.shardings[name].dim is not None
            ranges[name] = (state.tp_rank if sharded else 0, local.start + first, local.start + last)
            tensors |= {f"{kind}/{name}": tensor[first:last] for kind, tensor in local.tensors.items()}
    if rank == 0:
        tensors |= {f"{BUFFER}/{name}": buffer.clone() for name, buffer in state.buffers.items()}
    return tensors, ranges


def build_index(state: EngineState, ranges: list[dict[str, StoredRange]]) -> dict[str, Any]:
    """What `index.json` holds, from any rank's state and from what each rank wrote, in their order."""
    return {
        "format": FORMAT,
        "optimizer_steps": int(state.steps[0]) if state.steps else 0,
        "table": state.shardings,
        "ties": state.ties,
        "tp": state.tp,
        "shapes": {name: list(local.shape) for name, local in state.tensors.items()},
        "kinds": {name: list(local.tensors) for name, local in state.tensors.items()},
        "averaged": 0 if state.averaged is None else int(state.averaged),
        "buffers": list(state.buffers),
    } | describe_files(ranges)


def describe_files(ranges: Sequence[Mapping[str, StoredRange]]) -> dict[str, Any]:
    """What `index.json` says of where numbers lie, from the ranges that each file has, in their order.

    Ranks hold rows of equal length, so that a parameter takes a run or a few, however many they are.
    """
    found: dict[str, list[Run]] = {}
    for file, held in enumerate(ranges):
        for name, (tp_rank, start, stop) in held.items():
            found.setdefault(name, []).append([tp_rank, file, start, stop - start])
    order = operator.itemgetter(0, 3)  # rank of tp and length; files stay in order
    return {"files": len(ranges), "runs": {name: _fold(sorted(runs, key=order)) for name, runs in found.items()}}


def _fold(runs: list[Run], times: int = DIMENSIONS) -> list[Run]:
    """Join runs that follow each other at equal distances, and are alike otherwise; then what that gives, and so on."""
    found: list[tuple[Run, int, list[int]]] = []  # the first, how many, and what is between two
    for run in runs:
        if found:
            first, count, apart = found[-1]
            between = [run[at] - first[at] - (count - 1) * apart[at - 1] for at in (1, 2)]
            alike = (run[0], run[3:]) == (first[0], first[3:])
            if alike and between[1] > 0 and (count == 1 or between == apart):
                found[-1] = first, count + 1, between
                continue
        found.append((run, 1, [0, 0]))
    folded = [run if count == 1 else [*run[:4], count, *apart, *run[4:]] for run, count, apart in found]
    return folded if times == 1 or len(folded) == len(runs) else _fold(folded, times - 1)


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    update: Callable[[bytes | memoryview], None],
    read: Callable[[str], Tensor] | None = None,
) -> int:
    """Write contiguous tensors as a safetensors file, https://github.com/huggingface/safetensors#format, and flush it.

    Tensors are copied from their device one at a time; where they lie on the meta device, `read` gives each in its
    turn. `update` is given every byte of the file, in order. The interpreter's lock is free while the system writes.

    Returns the size of the file (bytes). Raises OSError.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)

    def contents() -> Iterator[memoryview]:
        yield memoryview(len(header).to_bytes(8, "little") + header)
        for name, like in tensors.items():
            if like.numel():
                yield _as_bytes((like if read is None else read(name)).cpu()).numpy().data

    with open(path, "wb", buffering=0) as file:
        for content in contents():
            # In chunks, which are still in the processor's cache when they are hashed.
            for start in range(0, len(content), _CHUNK_BYTES):
                chunk = content[start : start + _CHUNK_BYTES]
                update(chunk)
                while chunk:
                    chunk = chunk[file.write(chunk) :]
        os.fsync(file.fileno())
        return file.tell()


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def write_and_prove(
    path: Path,
    tensors: Mapping[str, Tensor],
    key: bytes | None,
    read: Callable[[str], Tensor] | None = None,
    note: Callable[[int], object] = lambda count: None,
) -> Record:
    """Write a file, flush it, and read it back. Raises OSError where it does not come back as it was.

    `note` is called with the number of bytes of every piece that is written.
    """
    found = new_hash(key)

    def update(data: Any) -> None:
        found.update(data)
        note(memoryview(data).nbytes)

    try:
        size = write_tensors(path, tensors, update, *([] if read is None else [read]))
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say which file it was
        raise
    record = Record(size, found.hexdigest())
    if hash_file(path, key) != record:
        raise OSError(f"{path} does not read back as it was written: look at the disk")
    return record


def flush_and_hash(path: Path, key: bytes | None) -> Record:
    flush(path)
    return hash_file(path, key)


def write_index_and_manifest(folder: Path, index: dict[str, Any], manifest: store.Manifest, key: bytes | None) -> None:
    """Write the last two files of a checkpoint, and flush its folders: then it may get its name."""
    write_json(folder / store.STATE / INDEX, index)
    manifest.files[f"{store.STATE}/{INDEX}"] = flush_and_hash(folder / store.STATE / INDEX, key)
    store.write_manifest(folder, manifest, key)
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        flush(path)
