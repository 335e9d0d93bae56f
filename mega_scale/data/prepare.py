"""Text to prepared data, shard by shard: in parallel, and after an interruption only what is missing.

What each shard holds follows from the text, the settings and the size of a shard, not from the number of processes. A
shard is done when its record, `00000.json`, is there; the manifest is written when all are. So interrupted or not, with
one process, many, or datatrove's tasks on many machines, the files are the same to the byte.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mega_scale.data.config import DataConfig, FileRange
from mega_scale.data.sources import Tally, is_held_out, open_source, usable
from mega_scale.data.tokenizer import batched, encode, load_tokenizer, token_type, tokenizer_digest
from mega_scale.data.tokens import FORMAT, PreparedManifest, ShardRecord, ShardWriter, write_manifest
from mega_scale.files import FileLock, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOCK = "prepare.lock"
"""File by which one job at a time has the folder."""

_PLAN = "plan.json"
# What a preparation writes beside its plan and tokenizer; the file that declares it whole is the first to go.
_WRITTEN = ("manifest.json", "[0-9][0-9][0-9][0-9][0-9]*.json", "train-*", "validation-*", "*.unfinished*")
# Settings that decide what the files hold.
_SETTINGS = (
    "source", "path", "hub_name", "hub_config", "hub_split", "text_column", "validation_path", "validation_split",
    "validation_fraction", "max_document_bytes",
)  # fmt: skip


class ShardPlan(NamedTuple):
    """What one shard is made of: whether its text is all for validation, and file ranges in order."""

    held_out: bool
    ranges: list[FileRange]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(part.size for part in self.ranges)


class Preparation:
    """One folder's preparation: what is to be done, and one shard of it, of `shard_bytes` bytes of its files.

    A folder that was begun in the same way is gone on with; `overwrite` deletes what was prepared there. `shards` says
    what every shard is made of.

    Raises:
        ValueError: A key cannot be prepared, the text cannot be found, the folder holds something else, or what is to
            be overwritten is in use.
    """

    def __init__(
        self,
        folder: Path,
        config: DataConfig,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        shard_bytes: int,
        overwrite: bool = False,
    ) -> None:
        apart, here = "prepare each source into a folder of its own", "it holds for training; set it to null here"
        refusals = {
            "mixture": (config.mixture is not None, f"{apart}, and mix the folders"),
            "streaming": (config.streaming, "preparing reads ranges in parallel; set it to false"),
            "max_documents": (config.max_documents is not None, here),
            "validation_documents": (config.validation_documents is not None, here),
            "source": (config.source == "prepared", "it is prepared; name the text"),
        }
        for key, (wrong, remedy) in refusals.items():
            if wrong:
                raise ValueError(f"data.{key}={getattr(config, key)!r}: {remedy}")
        self._folder, self._config, self._tokenizer = folder, config, tokenizer
        self._sources = {False: open_source(config)}
        if config.separate_validation:
            self._sources[True] = open_source(config, held_out=True)
        self.shards: list[ShardPlan] = []
        for held_out, source in self._sources.items():
            held = shard_bytes + 1
            for part in source.ranges(shard_bytes):  # small ones are joined until they have the size of a shard
                if held + part.size > shard_bytes:
                    self.shards.append(ShardPlan(held_out, []))
                    held = 0
                self.shards[-1].ranges.append(part)
                held += part.size
        self._digest = tokenizer_digest(tokenizer, config.add_bos)
        self._plan = self._claim(shard_bytes, overwrite)

    def missing(self) -> list[int]:
        """Numbers of the shards that are not done."""
        return [i for i in range(len(self.shards)) if not self._record(i).is_file()]

    def tally(self) -> Tally:
        """Rows of the shards that are done, and the bad ones."""
        total = Tally(bytes=sum(shard.size for shard in self.shards))
        for i in range(len(self.shards)):
            if self._record(i).is_file():
                total.merge(Tally.from_json(_read_json(self._record(i))["rows"]))
        return total

    def make(self, number: int) -> Tally:
        """Make one shard; gives its rows, and the bad ones.

        Raises:
            ValueError: The text cannot be read, or another job has overwritten the folder.
        """
        (held_out, ranges), fraction, tally = self.shards[number], self._config.validation_fraction, Tally()
        parts = ["train", "validation"] if fraction else ["train"]
        if True in self._sources:
            parts = ["validation"] if held_out else ["train"]
        dtype = token_type(self._tokenizer)
        writers = {part: ShardWriter(self._folder, f"{part}-{number:05}", dtype) for part in parts}
        rows = (row for part in ranges for row in self._sources[held_out].read(part))
        for texts in batched(usable(rows, tally)):
            split = {parts[0]: texts}
            if len(parts) > 1:
                apart = [is_held_out(text, fraction) for text in texts]
                split = {
                    part: [text for text, is_apart in zip(texts, apart, strict=True) if is_apart == (part != "train")]
                    for part in parts
                }
            for part, chosen in split.items():
                for encoded in encode(chosen, self._tokenizer, self._config.add_bos):
                    writers[part].add(encoded)
        self._require_own()
        records = {part: asdict(writer.close()) for part, writer in writers.items()}
        write_json(self._record(number), {"shards": records, "rows": tally.to_json()})
        return tally

    def finish(self) -> PreparedManifest:
        """Declare the folder whole.

        Raises:
            ValueError: A shard is missing, there are too many bad rows (names the last one's file and line), or another
                job has overwritten the folder.
        """
        self._require_own()
        if missing := self.missing():
            raise ValueError(f"{len(missing)} of {len(self.shards)} shards of {str(self._folder)!r} are missing: go on")
        tally = self.tally()
        tally.check(self._config.max_bad_share, ended=True)
        parts: dict[str, list[ShardRecord]] = {}
        for i in range(len(self.shards)):
            for part, record in _read_json(self._record(i))["shards"].items():
                parts.setdefault(part, []).append(ShardRecord(**record))
        for leftover in self._folder.glob("*.unfinished*"):
            leftover.unlink()
        self._tokenizer.save_pretrained(self._folder / "tokenizer")
        dtype, add_bos = token_type(self._tokenizer), self._config.add_bos
        manifest = PreparedManifest(self._digest, self._config.tokenizer, dtype, parts, tally, add_bos)
        write_manifest(self._folder, manifest)
        return manifest

    def _record(self, number: int) -> Path:
        return self._folder / f"{number:05}.json"

    def _require_own(self) -> None:
        if _read_json(self._folder / _PLAN) != self._plan:
            raise ValueError(f"{str(self._folder)!r} was overwritten by another job meanwhile: this one ends")

    def _claim(self, shard_bytes: int, overwrite: bool) -> Any:
        """Write down what the folder is for, or refuse one that is for something else; gives what is written."""
        names = sorted({part.file for shard in self.shards for part in shard.ranges if os.path.isfile(part.file)})
        plan = {
            "format": FORMAT,
            "tokenizer": self._digest,
            "shard_bytes": shard_bytes,
            "settings": {key: getattr(self._config, key) for key in _SETTINGS},
            # Size and time of change, by which a changed file is noticed.
            "files": {name: [os.path.getsize(name), os.stat(name).st_mtime_ns] for name in names},
            "units": self.shards,
        }
        plan = json.loads(json.dumps(plan))  # as it is read
        folder, path = str(self._folder), self._folder / _PLAN
        if path.is_file() and not overwrite:
            there = _read_json(path)
            different = [key for key, value in plan.items() if there.get(key) != value]
            if different:
                raise ValueError(
                    f"{folder!r} was begun with other {', '.join(different)}: give the same keys, files and tokenizer "
                    "to go on, replace it with --overwrite, or name another folder"
                )
            return there
        if not path.is_file() and self._folder.is_dir() and any(self._folder.iterdir()):
            raise ValueError(f"{folder!r} is not empty, and no data was prepared there: name another folder")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                self._clear()
            write_json(path, plan)
        except OSError as error:
            raise ValueError(f"{folder!r} cannot be written ({error.strerror}): name another folder") from None
        return plan

    def _clear(self) -> None:
        """Delete what was prepared, but for the plan, which is written anew; refused while another job makes it."""
        tokenizer = self._folder / "tokenizer"
        if Path(self._config.tokenizer).resolve().is_relative_to(tokenizer.resolve()):
            where = "lies in the folder that is to be overwritten: copy it elsewhere"
            raise ValueError(f"data.tokenizer={self._config.tokenizer!r} {where}")
        with FileLock(self._folder / LOCK):
            for old in [old for pattern in _WRITTEN for old in self._folder.glob(pattern)]:
                old.unlink(missing_ok=True)
            shutil.rmtree(tokenizer, ignore_errors=True)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# Processes of this machine


def run(preparation: Preparation, processes: int, max_bad_share: float) -> Iterator[int]:
    """Make all missing shards in processes of this machine; yields the number of each when it is done.

    Raises:
        ValueError: The text cannot be read, has too many bad rows, or a process ended.
    """
    tally, waiting = preparation.tally(), preparation.missing()
    # Forked, they share the tokenizer and the source.
    context, others = multiprocessing.get_context("fork"), multiprocessing.active_children()
    with ProcessPoolExecutor(min(processes, max(len(waiting), 1)), context, _begin, (preparation,)) as pool:
        jobs = {pool.submit(_make, number): number for number in waiting}
        try:
            for job in as_completed(jobs):
                tally.merge(job.result())
                tally.check(max_bad_share, ended=False)
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


@dataclass(frozen=True)
class ClusterStep:
    """A step of a datatrove pipeline: makes a task's share of the missing shards, or declares the folder whole."""

    folder: Path
    config: DataConfig
    shard_bytes: int
    finish: bool = False

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        """Do it; passes `data` on, which is nothing."""
        preparation = self.open()
        if self.finish:
            preparation.finish()
            return data
        for number in preparation.missing():
            if number % world_size == rank:
                preparation.make(number)
                preparation.tally().check(self.config.max_bad_share, ended=False)
        return data

    def open(self) -> Preparation:
        """Open the preparation in a process that has only its description."""
        tokenizer = load_tokenizer(self.config.tokenizer)
        return Preparation(self.folder, self.config, tokenizer, shard_bytes=self.shard_bytes)


def run_on_cluster(
    folder: Path, config: DataConfig, shard_bytes: int, *, tasks: int, processes: int | None, slurm: dict[str, str]
) -> None:
    """Prepare a folder by `tasks` tasks of datatrove's executors; run again, they go on with what is missing.

    So many `processes` run at once on this machine; None submits the tasks to Slurm and returns, with `slurm` the
    arguments of datatrove's SlurmPipelineExecutor. Logs go beside the folder.

    Raises:
        ValueError: datatrove is not installed, or Slurm's partition or time is not said.
    """
    try:
        from datatrove.executor.local import LocalPipelineExecutor  # noqa: PLC0415  an extra
        from datatrove.executor.slurm import SlurmPipelineExecutor  # noqa: PLC0415
    except ImportError:
        raise ValueError("datatrove is not installed: pip install 'mega_scale[cluster]'") from None
    if processes is None and (missing := {"partition", "time"} - set(slurm)):
        raise ValueError(f"--slurm needs {' and '.join(sorted(missing))}, as in --slurm partition=cpu time=12:00:00")
    folder = folder.absolute()
    make = ClusterStep(folder, config, shard_bytes)
    finish = ClusterStep(folder, config, shard_bytes, finish=True)
    make.open()  # the tasks find the plan, and none of them has to write it
    # What is done is known by its files; a task that was marked as done would leave out a shard that was lost.
    common: dict[str, Any] = {"skip_completed": False}
    logs = folder.with_name(f"{folder.name}-logs")
    if processes is not None:
        LocalPipelineExecutor([make], tasks, processes, str(logs / "shards"), **common).run()
        LocalPipelineExecutor([finish], 1, 1, str(logs / "manifest"), **common).run()
        return
    common |= {key: int(value) if value.isdecimal() else value for key, value in slurm.items()}

    def job(step: ClusterStep, name: str, tasks: int, **keys: Any) -> SlurmPipelineExecutor:
        names = {"job_name": f"{folder.name}-{name}", "logging_dir": str(logs / name)}
        return SlurmPipelineExecutor([step], tasks=tasks, **names, **keys, **common)

    job(finish, "manifest", 1, depends=job(make, "shards", tasks)).run()
