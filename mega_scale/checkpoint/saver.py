"""Writing checkpoints: beside, flushed, read back, renamed; in the background if wanted.

A rank goes on training while a thread copies what it has to write into host memory, and then writes the copy. The copy
has to be complete before the optimizer changes the state: forward and backward passes only read it. Between two steps
the ranks ask each other whether all threads are done; then rank 0 writes index and manifest, renames the folder,
moves `latest`, and deletes what is not to be kept. Until then the folder has another name, and is no checkpoint.
"""

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mega_scale.checkpoint.folder import (
    LATEST,
    RANDOM,
    STATE,
    TRAINER,
    CheckpointConfig,
    delete,
    folder_of,
    newest_first,
    next_serial,
    run_lock,
    surplus,
    sweep,
    verify,
)
from mega_scale.checkpoint.manifest import Manifest, write_manifest
from mega_scale.checkpoint.state import (
    INDEX,
    StateReader,
    StoredRange,
    as_bytes,
    build_index,
    rank_tensors,
    state_file,
    write_tensors,
)
from mega_scale.files import Record, discard, flush, hash_file, new_hash, reason, replace_text, write_json
from mega_scale.parallel import Engine, World

_UNFINISHED, _REPLACED = ".unfinished", ".replaced"
_ROOM = 1.05  # of what the tensors take, for all else
_SMALL_BYTES = 2**20
_NAMED = 4  # ranks whose problem is told
_ALIGNMENT = 64  # bytes; every dtype can begin there


class Saved(NamedTuple):
    """How a save ended.

    Args:
        step: of the checkpoint.
        folder: where it lies; none if it could not be written.
        problem: why not, or what went wrong beside it.
        stall_s: for how long training stood still (seconds).
        write_s: from the beginning until all was written and read back (seconds).
        bytes: size of all files.
    """

    step: int
    folder: Path | None
    problem: str
    stall_s: float
    write_s: float
    bytes: int


class _Task:
    """Work on a thread of its own, or on this one."""

    def __init__(self, name: str, work: Callable[[], Any], background: bool) -> None:
        self.result: Any = None
        self.error: Exception | None = None
        self.ended = 0.0
        self._work = work
        # A daemon: a run that fails does not wait for a checkpoint that can no longer be completed.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True) if background else None
        if self._thread is None:
            self._run()
        else:
            self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self._work()
        except Exception as error:  # whatever it is, the run goes on and says it
            self.error = error
        self.ended = time.perf_counter()

    @property
    def done(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    @property
    def problem(self) -> str:
        return "" if self.error is None else _text(self.error)

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def wait(self) -> Any:
        """What the work returned; raises what it raised."""
        self.join()
        if self.error is not None:
            raise self.error
        return self.result


class _Save:
    """A checkpoint under way: written by all ranks, then completed by rank 0."""

    def __init__(self, step: int, folder: Path, index: dict[str, Any], spans: dict[str, StoredRange]) -> None:
        self.step, self.folder, self.index, self.spans = step, folder, index, spans
        self.began, self.stall_s = time.perf_counter(), 0.0
        self.copying: _Task | None = None
        self.writing: _Task | None = None
        self.completing: _Task | None = None
        self.problem = ""

    @property
    def done(self) -> bool:
        task = self.completing or self.writing
        return task is None or task.done


class Saver:
    """Writes the checkpoints of a run; methods are collective, except for `wait_copied`.

    Args:
        run_dir: folder of the run, shared by all ranks.
        engine: what is saved.
        world: all ranks.
        describe: writes `config.yaml` and `model/` into a folder.
        config: how, and how many are kept.
        key: secret to sign with, if there is one.
    """

    def __init__(
        self,
        run_dir: Path,
        engine: Engine,
        world: World,
        describe: Callable[[Path], None],
        config: CheckpointConfig,
        key: bytes | None = None,
    ) -> None:
        self._run_dir, self._engine, self._world, self._describe = run_dir, engine, world, describe
        self._config, self._key = config, key
        self._staging = Staging(world.device) if config.asynchronous else None
        self._save: _Save | None = None
        self._serial = 1
        if world.rank == 0:
            self._tidy()
            self._serial = next_serial(run_dir)

    def save(self, step: int, trainer: dict[str, Any]) -> list[Saved]:
        """Begin a checkpoint, or write it where saves are not asynchronous; waits for the one before.

        Args:
            step: optimizer steps done.
            trainer: plain JSON, `trainer.json`.

        Returns:
            What ended meanwhile: the save before, and this one if it is not asynchronous or could not begin.
        """
        ended = self.finish()
        began = time.perf_counter()
        folder = folder_of(self._run_dir, step)
        unfinished = _unfinished(folder)
        state = self._engine.state()
        tensors, spans = rank_tensors(state, self._world.rank)
        problem = self._prepare(unfinished, tensors)
        if problem:
            return [*ended, Saved(step, None, problem, time.perf_counter() - began, 0.0, 0)]
        rank, random, copying = self._world.rank, _random_state(), self._copy(tensors)

        def write() -> dict[str, Record]:
            state = tensors if copying is None else copying.wait()
            names = {f"{STATE}/{state_file(rank)}": state, f"{RANDOM}/rank-{rank:05d}.safetensors": random}
            found = {name: _write_and_prove(unfinished / name, content, self._key) for name, content in names.items()}
            if rank == 0:
                write_json(unfinished / TRAINER, trainer)
                self._describe(unfinished)
                small = [p for p in unfinished.rglob("*") if p.is_file() and p.parent.name not in (STATE, RANDOM)]
                small = [p for p in small if not p.name.startswith(".")]  # of NFS or a desktop, and soon gone
                found |= {path.relative_to(unfinished).as_posix(): _hash_and_flush(path, self._key) for path in small}
            return found

        # The index says how many steps the optimizer has done: now, since training goes on before it is written.
        self._save = _Save(step, folder, build_index(state, []), spans)
        self._save.began, self._save.copying = began, copying
        self._save.writing = self._task("write", write)
        self._save.stall_s = time.perf_counter() - began
        return [*ended, *([] if self._staging is not None else self.finish())]

    def wait_copied(self) -> None:
        """Wait until the state has been copied; call it before anything changes the state. Not collective."""
        if self._save is not None and self._save.copying is not None:
            began = time.perf_counter()
            self._save.copying.join()
            self._save.copying = None
            self._save.stall_s += time.perf_counter() - began

    def poll(self) -> list[Saved]:
        """Go on with a checkpoint that all ranks have written by now; call it after every step."""
        if self._save is None or not self._world.all_agree(self._save.done):
            return []
        return self._advance()

    def finish(self) -> list[Saved]:
        """Wait for the checkpoint that is being written, if there is one, and complete it."""
        ended: list[Saved] = []
        while self._save is not None and not ended:
            began = time.perf_counter()
            for task in (self._save.writing, self._save.completing):
                if task is not None:
                    task.join()
            self._save.stall_s += time.perf_counter() - began
            ended = self._advance()
        return ended

    def _advance(self) -> list[Saved]:
        """From written to being completed, or from there to the end; all ranks' tasks are done."""
        save = self._save
        assert save is not None and save.writing is not None
        began = time.perf_counter()
        if save.completing is None:
            reports = self._world.gather([save.writing.result, save.spans, save.writing.problem])
            save.completing = self._task("complete", lambda: self._complete(save, reports))
            save.stall_s += time.perf_counter() - began
            return []
        outcome = [save.completing.problem, save.completing.result, save.completing.ended - save.began]
        problem, size, write_s, remark = self._world.broadcast([*outcome, save.problem])
        if problem and self._world.rank == 0:
            _forget(_unfinished(save.folder))
        self._save = None
        stall_s = save.stall_s + time.perf_counter() - began
        return [Saved(save.step, None if problem else save.folder, problem or remark, stall_s, write_s, size or 0)]

    def _copy(self, tensors: dict[str, Tensor]) -> _Task | None:
        """Begin to copy, where that is needed."""
        staging = self._staging
        if staging is None:
            return None
        staging.mark()
        return self._task("copy", lambda: staging.copy(tensors))

    def _task(self, name: str, work: Callable[[], Any]) -> _Task:
        return _Task(f"{name} checkpoint", work, background=self._staging is not None)

    def _prepare(self, unfinished: Path, tensors: dict[str, Tensor]) -> str:
        """Make the folder, and see whether there is room; returns what is wrong, the same on all ranks."""
        needed = int(_ROOM * sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())) + _SMALL_BYTES
        total = int(self._world.sum(torch.tensor(needed)))
        problem = ""
        if self._world.rank == 0:
            try:
                _forget(unfinished)
                for folder in (STATE, RANDOM):
                    (unfinished / folder).mkdir(parents=True, exist_ok=True)
                free = shutil.disk_usage(unfinished).free
                if free < total:
                    problem = f"it needs {total:,} bytes, {free:,} are free in {unfinished.parent}: make room"
                    _forget(unfinished)
            except OSError as error:
                problem = f"rank 0: {_text(error)}"
        # Also tells the others that the folder is there.
        return str(self._world.broadcast(problem))

    def _complete(self, save: _Save, reports: list[Any] | None) -> int:
        """Write what says that all is there, and give the folder its name; returns the size of all files.

        Raises OSError.
        """
        if reports is None:
            return 0
        problems = [f"rank {rank}: {problem}" for rank, (_, _, problem) in enumerate(reports) if problem]
        if problems:
            raise OSError("; ".join(problems[:_NAMED]))
        unfinished = _unfinished(save.folder)
        write_json(unfinished / STATE / INDEX, save.index | {"parts": [spans for _, spans, _ in reports]})
        files = {name: Record(*record) for records, _, _ in reports for name, record in records.items()}
        files[f"{STATE}/{INDEX}"] = _hash_and_flush(unfinished / STATE / INDEX, self._key)
        manifest = Manifest(save.step, self._serial, files)
        write_manifest(unfinished, manifest, self._key)
        for folder in (*(path for path in unfinished.rglob("*") if path.is_dir()), unfinished):
            flush(folder)
        replaced = save.folder.with_name(save.folder.name + _REPLACED)
        if os.path.lexists(save.folder):  # a run that was continued from before this step writes it anew
            discard(replaced)
            save.folder.rename(replaced)
        unfinished.rename(save.folder)
        flush(save.folder.parent)
        self._serial += 1
        try:
            replace_text(save.folder.parent / LATEST, save.folder.name + "\n")
        except OSError as error:  # nobody resumes by its word
            save.problem = f"{LATEST} still names another: {_text(error)}"
        _forget(replaced)
        self._delete_old(save.folder)
        return manifest.bytes

    def _delete_old(self, newest: Path) -> None:
        """Delete the oldest; the one just written stays in any case, and it was read back."""
        for folder in surplus(self._run_dir, newest, self._config.keep, self._config.keep_every):
            with contextlib.suppress(OSError):
                delete(folder)
        sweep(self._run_dir)

    def _tidy(self) -> None:
        """Remove what a killed run left half written, and restore what it was about to replace."""
        for path in self._run_dir.glob(f"checkpoints/step-*{_REPLACED}"):
            original = path.with_name(path.name.removesuffix(_REPLACED))
            with contextlib.suppress(OSError):
                if not original.exists():
                    path.rename(original)
            _forget(path)
        for path in self._run_dir.glob(f"checkpoints/step-*{_UNFINISHED}"):
            _forget(path)
        sweep(self._run_dir)


def _unfinished(folder: Path) -> Path:
    return folder.with_name(folder.name + _UNFINISHED)


def _forget(path: Path) -> None:
    """Delete what nobody needs, as far as that is possible."""
    with contextlib.suppress(OSError):
        discard(path)


def _write_and_prove(path: Path, tensors: dict[str, Tensor], key: bytes | None) -> Record:
    """Write a file, flush it, and read it back. Raises OSError where it does not come back as it was."""
    found = new_hash(key)
    try:
        record = Record(write_tensors(path, tensors, found.update), found.hexdigest())
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say which file it was
        raise
    if hash_file(path, key) != record:
        raise OSError(f"{path} does not read back as it was written: look at the disk")
    return record


def _hash_and_flush(path: Path, key: bytes | None) -> Record:
    flush(path)
    return hash_file(path, key)


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _text(error: BaseException) -> str:
    named = reason(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    return " ".join(named.split())[:300]


# A copy of the state in host memory


class Staging:
    """One buffer, made at the first copy and used again: new memory costs more than the copy.

    Args:
        device: of the state. From a GPU, copies go into locked memory, beside what else it computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def mark(self) -> None:
        """Let the next copy be of what the device has been told to compute so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors by name to the CPU, in any thread, and wait for it; the copies are valid until the next call."""
        places, end = {}, 0
        for name, tensor in tensors.items():
            length = tensor.numel() * tensor.element_size()
            places[name] = slice(end, end + length)
            end += -(-length // _ALIGNMENT) * _ALIGNMENT
        if len(self._buffer) < end:
            self._buffer = torch.empty(end, dtype=torch.uint8, pin_memory=self._stream is not None)
        copies = {}
        with torch.cuda.stream(self._stream):
            for name, tensor in tensors.items():
                room = self._buffer[places[name]]
                room.copy_(as_bytes(tensor), non_blocking=True)
                copies[name] = room.view(tensor.dtype).view(tensor.shape)
        if self._stream is not None:
            self._stream.synchronize()
        return copies


# Checkpoints rewritten in another number of files, or with another signature; memory for one parameter


def convert(folder: Path, run_dir: Path, parts: int, key: bytes | None = None, new_key: bytes | None = None) -> Path:
    """Write a checkpoint anew into another run folder; it is resumed from as the original is.

    Args:
        folder: of the checkpoint, which is verified first.
        run_dir: the other run folder.
        parts: files for the state, as so many ranks would have written them.
        key: secret with which the checkpoint is signed, if it is.
        new_key: secret to sign the new one with, if it is to be.

    Returns:
        Folder of the new checkpoint.

    Raises:
        ValueError: the checkpoint is damaged, or the destination holds a run, or a job that trains has it.
    """
    if parts < 1:
        raise ValueError(f"parts={parts} is not possible: give at least 1")
    manifest = verify(folder, key)
    run_dir.mkdir(parents=True, exist_ok=True)
    with run_lock(run_dir):
        return _rewrite(folder, manifest, run_dir, parts, new_key)


def _rewrite(folder: Path, manifest: Manifest, run_dir: Path, parts: int, new_key: bytes | None) -> Path:
    final = folder_of(run_dir, manifest.step)
    if final.exists():
        raise ValueError(f"{final} exists: choose another folder")
    if newest_first(run_dir):
        raise ValueError(f"{run_dir} holds a run already, which the new checkpoint would join: choose another folder")
    fresh = final.with_name(final.name + ".unfinished")
    discard(fresh)
    (fresh / STATE).mkdir(parents=True)
    small = [name for name in manifest.files if not name.startswith(f"{STATE}/")]  # what else lies there is not ours
    for name in small:
        (fresh / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, fresh / name)
    reader = StateReader(folder / STATE)
    files: dict[str, Record] = {}
    spans = []
    for part in range(parts):
        own, hashed = reader.file_contents(part, parts), new_hash(new_key)
        size = write_tensors(fresh / STATE / state_file(part), own.like, hashed.update, own.read)
        files[f"{STATE}/{state_file(part)}"] = Record(size, hashed.hexdigest())
        spans.append(own.ranges)
    write_json(fresh / STATE / INDEX, reader.index(spans))
    for name in (*small, f"{STATE}/{INDEX}"):
        flush(fresh / name)
        files[name] = hash_file(fresh / name, new_key)
    write_manifest(fresh, Manifest(manifest.step, manifest.serial, files), new_key)
    for path in (*(path for path in fresh.rglob("*") if path.is_dir()), fresh):
        flush(path)
    fresh.rename(final)
    flush(final.parent)
    if newest_first(run_dir)[0] == final:
        replace_text(final.parent / LATEST, final.name + "\n")
    return final
