"""Writing checkpoints: beside, flushed, read back, renamed; in the background if wanted.

A rank copies what it has to write into host memory and goes on training, while a thread writes the copy. Between two
steps the ranks ask each other whether all threads are done; then rank 0 writes index and manifest, renames the folder,
moves `latest`, and deletes what is not to be kept. Until then the folder has another name, and is no checkpoint.
"""

import contextlib
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mega_scale.parallel import INDEX, Engine, World, index_of, own_part, part_file, write_tensors
from mega_scale.training.checkpoint.config import CheckpointConfig
from mega_scale.training.checkpoint.files import dump, flush, replace_text
from mega_scale.training.checkpoint.folder import LATEST, RANDOM, STATE, TRAINER, checkpoints, folder_of, serial_of
from mega_scale.training.checkpoint.manifest import Manifest, Record, hash_file, new_hash, write_manifest
from mega_scale.training.checkpoint.retention import DELETED, delete, surplus
from mega_scale.training.checkpoint.staging import Staging

_UNFINISHED, _REPLACED = ".unfinished", ".replaced"
_ROOM = 1.05  # of what the tensors take, for all else
_SMALL_BYTES = 2**20


class Saved(NamedTuple):
    """How a save ended.

    Args:
        step: of the checkpoint.
        folder: where it lies; none if it could not be written.
        problem: why not.
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


class _Job:
    """One rank's part of a checkpoint, being written."""

    def __init__(self, step: int, folder: Path, work: Callable[[], dict[str, Record]]) -> None:
        self.step, self.folder = step, folder
        self.records: dict[str, Record] = {}
        self.problem = ""
        self.began, self.ended, self.stall_s = time.perf_counter(), 0.0, 0.0
        self._work = work
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        try:
            self.records = self._work()
        except Exception as error:
            self.problem = _text(error)
        self.ended = time.perf_counter()

    def start(self) -> None:
        # A daemon: a run that fails does not wait for a checkpoint that can no longer be completed.
        self._thread = threading.Thread(target=self.run, name=f"checkpoint of step {self.step}", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()


class Saver:
    """Writes the checkpoints of a run; every method is collective.

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
        self._staging = Staging(pin_memory=world.device.type == "cuda") if config.asynchronous else None
        self._job: _Job | None = None
        self._spans: dict[str, tuple[int, int, int]] = {}
        self._index: dict[str, Any] = {}
        self._serial = 0
        if world.rank == 0:
            self._tidy()
            self._serial = max((serial_of(folder) for folder in checkpoints(run_dir)), default=0)

    def save(self, step: int, trainer: dict[str, Any]) -> list[Saved]:
        """Begin a checkpoint, or write it where saves are not asynchronous; waits for the one before.

        Args:
            step: optimizer steps done.
            trainer: plain JSON to find again in `trainer.json`.

        Returns:
            What ended meanwhile: the save before, and this one if it is not asynchronous or could not begin.
        """
        ended = self.finish()
        began = time.perf_counter()
        folder = folder_of(self._run_dir, step)
        unfinished = folder.with_name(folder.name + _UNFINISHED)
        state = self._engine.state()
        tensors, spans = own_part(state, self._world.rank, self._world.at.tp)
        problem = self._prepare(unfinished, tensors)
        if problem:
            return [*ended, Saved(step, None, problem, time.perf_counter() - began, 0.0, 0)]
        if self._staging is not None:
            tensors = self._staging.copy(tensors)
        rank, random = self._world.rank, _random_state()

        def work() -> dict[str, Record]:
            names = {f"{STATE}/{part_file(rank)}": tensors, f"{RANDOM}/rank-{rank:05d}.safetensors": random}
            found = {name: _write_and_prove(unfinished / name, content, self._key) for name, content in names.items()}
            if rank == 0:
                dump(unfinished / TRAINER, trainer)
                self._describe(unfinished)
                small = [p for p in unfinished.rglob("*") if p.is_file() and p.parent.name not in (STATE, RANDOM)]
                found |= {path.relative_to(unfinished).as_posix(): _hash_and_flush(path, self._key) for path in small}
            return found

        # The index says how many steps the optimizer has done: now, since training goes on before it is written.
        self._job, self._index, self._spans = _Job(step, folder, work), index_of(state, []), spans
        if self._staging is None:
            self._job.run()
            return [*ended, *self.finish()]
        self._job.start()
        self._job.stall_s = time.perf_counter() - began
        return ended

    def poll(self) -> list[Saved]:
        """Complete a checkpoint that all ranks have written by now; call it after every step."""
        if self._job is None or not self._world.all_agree(self._job.done):
            return []
        return self.finish()

    def finish(self) -> list[Saved]:
        """Wait for the checkpoint that is being written, if there is one, and complete it."""
        if self._job is None:
            return []
        job, self._job = self._job, None
        began = time.perf_counter()
        job.join()
        reports = self._world.gather([job.records, self._spans, job.problem, job.ended - job.began])
        outcome: list[Any] = ["", 0, 0.0]
        if reports is not None:
            problems = [f"rank {rank}: {report[2]}" for rank, report in enumerate(reports) if report[2]]
            outcome = ["; ".join(problems[:4]), 0, max(report[3] for report in reports)]
            if not problems:
                try:
                    index = self._index | {"parts": [report[1] for report in reports]}
                    outcome[1] = self._commit(job, index, [report[0] for report in reports])
                except OSError as error:
                    outcome[0] = f"rank 0: {_text(error)}"
            if outcome[0]:
                shutil.rmtree(job.folder.with_name(job.folder.name + _UNFINISHED), ignore_errors=True)
        problem, size, write_s = self._world.broadcast(outcome)
        job.stall_s += time.perf_counter() - began
        return [Saved(job.step, None if problem else job.folder, problem, job.stall_s, write_s, size)]

    def _prepare(self, unfinished: Path, tensors: dict[str, Tensor]) -> str:
        """Make the folder, and see whether there is room; returns what is wrong, the same on all ranks."""
        needed = int(_ROOM * sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())) + _SMALL_BYTES
        total = int(self._world.sum(torch.tensor(needed)))
        problem = ""
        if self._world.rank == 0:
            try:
                shutil.rmtree(unfinished, ignore_errors=True)
                for folder in (STATE, RANDOM):
                    (unfinished / folder).mkdir(parents=True)
                free = shutil.disk_usage(unfinished).free
                if free < total:
                    problem = f"it needs {total:,} bytes, {free:,} are free in {unfinished.parent}: make room"
                    shutil.rmtree(unfinished, ignore_errors=True)
            except OSError as error:
                problem = f"rank 0: {_text(error)}"
        # Also tells the others that the folder is there.
        return str(self._world.broadcast(problem))

    def _commit(self, job: _Job, index: dict[str, Any], records: list[dict[str, list[Any]]]) -> int:
        """Rank 0: write what says that all is there, and give the folder its name; returns the size of all files."""
        unfinished = job.folder.with_name(job.folder.name + _UNFINISHED)
        dump(unfinished / STATE / INDEX, index)
        files = {name: Record(*record) for of_rank in records for name, record in of_rank.items()}
        files[f"{STATE}/{INDEX}"] = _hash_and_flush(unfinished / STATE / INDEX, self._key)
        manifest = Manifest(job.step, self._serial + 1, files)
        write_manifest(unfinished, manifest, self._key)
        for folder in (*(path for path in unfinished.rglob("*") if path.is_dir()), unfinished):
            flush(folder)
        replaced = job.folder.with_name(job.folder.name + _REPLACED)
        if job.folder.exists():  # a run that was continued from before this step writes it anew
            shutil.rmtree(replaced, ignore_errors=True)
            job.folder.rename(replaced)
        unfinished.rename(job.folder)
        flush(job.folder.parent)
        self._serial += 1
        replace_text(job.folder.parent / LATEST, job.folder.name + "\n")
        shutil.rmtree(replaced, ignore_errors=True)
        self._delete_old()
        return manifest.bytes

    def _delete_old(self) -> None:
        """Delete the oldest; the one just written stays in any case, and it was read back."""
        for folder in surplus(self._run_dir, self._config.keep, self._config.keep_every):
            with contextlib.suppress(OSError):
                delete(folder)

    def _tidy(self) -> None:
        """Remove what a killed run left half written, and restore what it was about to replace."""
        for path in self._run_dir.glob(f"checkpoints/step-*{_REPLACED}"):
            original = path.with_name(path.name.removesuffix(_REPLACED))
            with contextlib.suppress(OSError):
                if not original.exists():
                    path.rename(original)
            shutil.rmtree(path, ignore_errors=True)
        for suffix in (_UNFINISHED, DELETED):
            for path in self._run_dir.glob(f"checkpoints/step-*{suffix}"):
                shutil.rmtree(path, ignore_errors=True)


def _write_and_prove(path: Path, tensors: dict[str, Tensor], key: bytes | None) -> Record:
    """Write a file, flush it, and read it back.

    Raises:
        OSError: it cannot be written, or does not come back as it was.
    """
    found = new_hash(key)
    record = Record(write_tensors(path, tensors, found.update), found.hexdigest())
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
    named = f"{error.strerror} ({error.filename})" if isinstance(error, OSError) and error.filename else str(error)
    return " ".join(f"{type(error).__name__}: {named}".split())[:300]
