"""Text to prepared data, shard by shard: in parallel, and after an interruption only what is missing.

A shard is done when its record, `00000.json`, is there; the manifest is written when all are.
"""

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mega_scale.data.config import SOURCE_KEYS, DataConfig, FileRange
from mega_scale.data.sources import Tally, is_held_out, open_source, usable
from mega_scale.data.tokenizer import batched, encode, load_tokenizer, token_type, tokenizer_digest
from mega_scale.data.tokens import FORMAT, PreparedManifest, ShardRecord, ShardWriter, write_manifest
from mega_scale.files import FileLock, write_json

LOCK = "prepare.lock"
"""File by which one job at a time has the folder."""

_PLAN = "plan.json"
# What a preparation writes beside its plan and tokenizer; the file that declares it whole is the first to go.
_WRITTEN = ("manifest.json", "[0-9][0-9][0-9][0-9][0-9]*.json", "train-*", "validation-*", "*.unfinished*")
# Settings that decide what the files hold: all that say where text comes from, but for those refused here.
_SETTINGS = (*(key for key in SOURCE_KEYS if key not in ("max_documents", "streaming")), "max_document_bytes")


class Preparation:
    """One folder's preparation: what is to be done, and one shard of it, of `shard_bytes` bytes of its files.

    A folder that was begun in the same way is gone on with; `overwrite` deletes what was prepared there. `shards` says
    of every shard whether all of its text is for validation, and the ranges in it; `sizes` are their bytes. Raises
    ValueError where a key cannot be prepared, the text cannot be found, the folder holds something else, or what is to
    be overwritten is in use.
    """

    def __init__(
        self,
        folder: Path,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        shard_bytes: int,
        overwrite: bool = False,
    ) -> None:
        here = "it holds for training; set it to null here"
        for key, remedy in {
            "mixture": "prepare each source into a folder of its own, and mix the folders",
            "streaming": "preparing reads ranges in parallel; set it to false",
            "max_documents": here,
            "validation_documents": here,
            "source": "it is prepared; name the text",
        }.items():
            value = getattr(config, key)
            if value == "prepared" if key == "source" else value not in (None, False):
                raise ValueError(f"data.{key}={value!r}: {remedy}")
        self.folder, self.config, self.shard_bytes, self._tokenizer = folder, config, shard_bytes, tokenizer
        self._sources = {False: open_source(config)}
        if config.separate_validation:
            self._sources[True] = open_source(config, held_out=True)
        self.shards: list[tuple[bool, list[FileRange]]] = []
        self.sizes: list[int] = []
        for held_out, source in self._sources.items():
            for i, part in enumerate(source.ranges(shard_bytes)):  # small ones are joined to the size of a shard
                if i == 0 or self.sizes[-1] + part.size > shard_bytes:
                    self.shards.append((held_out, []))
                    self.sizes.append(0)
                self.shards[-1][1].append(part)
                self.sizes[-1] += part.size
        self._digest = tokenizer_digest(tokenizer, config.add_bos)
        self._plan = self._claim(overwrite)

    def missing(self) -> list[int]:
        """Numbers of the shards that are not done."""
        return [i for i in range(len(self.shards)) if not self._record(i).is_file()]

    def tally(self) -> Tally:
        """Rows of the shards that are done, and the bad ones."""
        total = Tally(bytes=sum(self.sizes))
        for record in self._records():
            total.merge(Tally.from_json(record["rows"]))
        return total

    def make(self, number: int) -> Tally:
        """Make one shard; gives its rows, and the bad ones.

        Raises ValueError where the text cannot be read, or another job has overwritten the folder.
        """
        (held_out, ranges), fraction, tally = self.shards[number], self.config.validation_fraction, Tally()
        is_split = fraction > 0 and not self.config.separate_validation
        parts, dtype = ["validation" if held_out else "train"], token_type(self._tokenizer)
        if is_split:
            parts = ["train", "validation"]
        writers = {part: ShardWriter(self.folder, f"{part}-{number:05}", dtype) for part in parts}
        rows = (row for part in ranges for row in self._sources[held_out].read(part))
        for texts in batched(usable(rows, tally)):
            apart = [held_out or (is_split and is_held_out(text, fraction)) for text in texts]
            for part, writer in writers.items():
                chosen = [text for text, is_apart in zip(texts, apart, strict=True) if is_apart == (part != "train")]
                for encoded in encode(chosen, self._tokenizer, self.config.add_bos):
                    writer.add(encoded)
        self._require_own()
        records = {part: asdict(writer.close()) for part, writer in writers.items()}
        write_json(self._record(number), {"shards": records, "rows": tally.to_json()})
        return tally

    def finish(self) -> PreparedManifest:
        """Declare the folder whole.

        Raises ValueError where a shard is missing, there are too many bad rows (names the last one's file and line), or
        another job has overwritten the folder.
        """
        self._require_own()
        if missing := self.missing():
            raise ValueError(f"{len(missing)} of {len(self.shards)} shards of {str(self.folder)!r} are missing: go on")
        tally = self.tally()
        tally.check(self.config.max_bad_share, ended=True)
        parts: dict[str, list[ShardRecord]] = {}
        for record in self._records():
            for part, shard in record["shards"].items():
                parts.setdefault(part, []).append(ShardRecord(**shard))
        for leftover in self.folder.glob("*.unfinished*"):
            leftover.unlink()
        self._tokenizer.save_pretrained(self.folder / "tokenizer")
        dtype, add_bos = token_type(self._tokenizer), self.config.add_bos
        manifest = PreparedManifest(self._digest, self.config.tokenizer, dtype, parts, tally, add_bos)
        write_manifest(self.folder, manifest)
        return manifest

    def _record(self, number: int) -> Path:
        return self.folder / f"{number:05}.json"

    def _records(self) -> list[Any]:
        paths = map(self._record, range(len(self.shards)))
        return [_read_json(path) for path in paths if path.is_file()]

    def _require_own(self) -> None:
        if _read_json(self.folder / _PLAN) != self._plan:
            raise ValueError(f"{str(self.folder)!r} was overwritten by another job meanwhile: this one ends")

    def _claim(self, overwrite: bool) -> Any:
        """Write down what the folder is for, or refuse one that is for something else; gives what is written."""
        names = sorted({part.file for _, ranges in self.shards for part in ranges if os.path.isfile(part.file)})
        plan = {
            "format": FORMAT,
            "tokenizer": self._digest,
            "shard_bytes": self.shard_bytes,
            "settings": {key: getattr(self.config, key) for key in _SETTINGS},
            # Size and time of change, by which a changed file is noticed.
            "files": {name: [os.path.getsize(name), os.stat(name).st_mtime_ns] for name in names},
            "units": self.shards,
        }
        plan = json.loads(json.dumps(plan))  # as it is read
        folder, path = str(self.folder), self.folder / _PLAN
        if path.is_file() and not overwrite:
            there = _read_json(path)
            different = [key for key, value in plan.items() if there.get(key) != value]
            if different:
                raise ValueError(
                    f"{folder!r} was begun with other {', '.join(different)}: give the same keys, files and tokenizer "
                    "to go on, replace it with --overwrite, or name another folder"
                )
            return there
        if not path.is_file() and self.folder.is_dir() and any(self.folder.iterdir()):
            raise ValueError(f"{folder!r} is not empty, and no data was prepared there: name another folder")
        tokenizer = self.folder / "tokenizer"
        if path.is_file() and Path(self.config.tokenizer).resolve().is_relative_to(tokenizer.resolve()):
            where = "lies in the folder that is to be overwritten: copy it elsewhere"
            raise ValueError(f"data.tokenizer={self.config.tokenizer!r} {where}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if path.is_file():  # all but the plan, which is written anew, is deleted
                with FileLock(self.folder / LOCK):
                    for old in [old for pattern in _WRITTEN for old in self.folder.glob(pattern)]:
                        old.unlink(missing_ok=True)
                    shutil.rmtree(tokenizer, ignore_errors=True)
            write_json(path, plan)
        except OSError as error:
            raise ValueError(f"{folder!r} cannot be written ({error.strerror}): name another folder") from None
        return plan


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# Processes of this machine


def run(preparation: Preparation, processes: int) -> Iterator[int]:
    """Make all missing shards in processes of this machine; yields the number of each when it is done.

    Raises ValueError where the text cannot be read, has too many bad rows, or a process ended.
    """
    tally, waiting = preparation.tally(), preparation.missing()
    # Forked, they share the tokenizer and the source.
    context, others = multiprocessing.get_context("fork"), multiprocessing.active_children()
    with ProcessPoolExecutor(min(processes, max(len(waiting), 1)), context, _begin, (preparation,)) as pool:
        jobs = {pool.submit(_make, number): number for number in waiting}
        try:
            for job in as_completed(jobs):
                tally.merge(job.result())
                tally.check(preparation.config.max_bad_share, ended=False)
                yield jobs[job]
        except BrokenProcessPool:
            raise ValueError(
                "a process ended without an answer, killed perhaps for want of memory: run the same command again to "
                "go on, with fewer processes"
            ) from None
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():
                if process not in others:
                    process.kill()  # a shard takes minutes, and none that is half made is taken for whole
            raise
        finally:
            pool.shutdown(cancel_futures=True)


_inherited: list[Preparation] = []


def _begin(preparation: Preparation) -> None:
    parent = os.getppid()

    def end_with_parent() -> None:  # one that was killed, or this process would wait for work for ever
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    _inherited[:] = [preparation]
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # of Ctrl-C, the parent tells
    threading.Thread(target=end_with_parent, daemon=True).start()


def _make(number: int) -> Tally:
    return _inherited[0].make(number)


# Tasks of datatrove, on many machines


def run_on_cluster(preparation: Preparation, *, tasks: int, processes: int | None, slurm: dict[str, str]) -> None:
    """Make all missing shards in `tasks` tasks of datatrove's executors, and declare the folder whole.

    So many `processes` run at once on this machine; None submits the tasks to Slurm and returns, with `slurm` the
    arguments of datatrove's SlurmPipelineExecutor. Logs go beside the folder. Raises ValueError where datatrove is not
    installed, or Slurm's partition or time is not said.
    """
    try:
        from datatrove.executor.local import LocalPipelineExecutor  # noqa: PLC0415  an extra
        from datatrove.executor.slurm import SlurmPipelineExecutor  # noqa: PLC0415
    except ImportError:
        raise ValueError("datatrove is not installed: pip install 'mega_scale[cluster]'") from None
    if processes is None and (missing := {"partition", "time"} - set(slurm)):
        raise ValueError(f"--slurm needs {' and '.join(sorted(missing))}, as in --slurm partition=cpu time=12:00:00")
    folder = preparation.folder.absolute()
    step = partial(_do_task, folder, preparation.config, preparation.shard_bytes)
    logs = folder.with_name(f"{folder.name}-logs")
    # What is done is known by its files; a task that was marked as done would leave out a shard that was lost.
    common: dict[str, Any] = {"skip_completed": False}
    if processes is not None:
        LocalPipelineExecutor([partial(step, False)], tasks, processes, str(logs / "shards"), **common).run()
        preparation.finish()
        return
    common |= {key: int(value) if value.isdecimal() else value for key, value in slurm.items()}

    def job(name: str, tasks: int, **keys: Any) -> SlurmPipelineExecutor:
        names = {"job_name": f"{folder.name}-{name}", "logging_dir": str(logs / name)}
        return SlurmPipelineExecutor([partial(step, name == "manifest")], tasks=tasks, **names, **keys, **common)

    job("manifest", 1, depends=job("shards", tasks)).run()


def _do_task(
    folder: Path, config: DataConfig, shard_bytes: int, last: bool, data: Any, rank: int, world_size: int
) -> None:
    """Make a task's share of the missing shards, or as the `last` task declare the folder whole."""
    preparation = Preparation(folder, config, load_tokenizer(config.tokenizer), shard_bytes=shard_bytes)
    if last:
        preparation.finish()
        return
    for number in preparation.missing():
        if number % world_size == rank:
            preparation.make(number)
            preparation.tally().check(config.max_bad_share, ended=False)
