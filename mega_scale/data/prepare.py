"""Text to prepared data, shard by shard: in parallel, and after an interruption only what is missing.

What each shard holds follows from the text, the settings and the size of a shard, not from the number of processes. A
shard is done when its record, `00000.json`, is there; the manifest is written when all are. So interrupted or not, with
one process or many, the files are the same to the byte.
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
from typing import Any

from transformers import PreTrainedTokenizerBase

from mega_scale.data.config import DataConfig
from mega_scale.data.prepared import FORMAT, Manifest, write_json, write_manifest
from mega_scale.data.readers import FileRange
from mega_scale.data.rows import Tally, usable
from mega_scale.data.sources import TextSource, is_held_out, open_source
from mega_scale.data.token_files import ShardRecord, ShardWriter
from mega_scale.data.tokenizer import batched, encode, token_type, tokenizer_digest
from mega_scale.files import FileLock

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


@dataclass(frozen=True)
class Unit:
    """What one shard is made of.

    Args:
        held_out: Whether it is text that is all for validation.
        pieces: Parts of files, in order.
    """

    held_out: bool
    pieces: list[FileRange]

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(piece.size for piece in self.pieces)


class Preparation:
    """One folder's preparation: what is to be done, and one shard of it.

    Args:
        folder: Where the files go; created. One that was begun in the same way is gone on with.
        config: The keys under `data:`, validated.
        tokenizer: Ends every document with its eos or sep token.
        shard_bytes: Text of a shard, bytes of its files.
        overwrite: Whether what was prepared there is deleted, and all is made anew.

    Attributes:
        units: What every shard is made of.

    Raises:
        ValueError: A key cannot be prepared, the text cannot be found, the folder holds something else, or what is to
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
        _require_preparable(config)
        self._folder, self._config, self._tokenizer = folder, config, tokenizer
        self._sources: dict[bool, TextSource] = {False: open_source(config)}
        if config.validation_path or config.validation_split:
            self._sources[True] = open_source(config, held_out=True)
        self.units = [
            Unit(held_out, pieces)
            for held_out, source in self._sources.items()
            for pieces in _grouped(source.ranges(shard_bytes), shard_bytes)
        ]
        self._digest = tokenizer_digest(tokenizer, config.add_bos)
        self._plan = self._claim(shard_bytes, overwrite)

    def missing(self) -> list[int]:
        """Numbers of the shards that are not done."""
        return [i for i in range(len(self.units)) if not self._record(i).is_file()]

    def tally(self) -> Tally:
        """Rows of the shards that are done, and the bad ones."""
        total = Tally(bytes=sum(unit.size for unit in self.units))
        for i in range(len(self.units)):
            if self._record(i).is_file():
                total.merge(Tally.from_json(json.loads(self._record(i).read_text(encoding="utf-8"))["rows"]))
        return total

    def make(self, number: int) -> Tally:
        """Make one shard.

        Args:
            number: Of the shard, 0 to below the number of `units`.

        Returns:
            Its rows, and the bad ones.

        Raises:
            ValueError: The text cannot be read, or another job has overwritten the folder.
        """
        unit, tally = self.units[number], Tally()
        dtype = token_type(self._tokenizer)
        parts = self._parts(unit)
        writers = {part: ShardWriter(self._folder, f"{part}-{number:05}", dtype) for part in parts}
        rows = (row for piece in unit.pieces for row in self._sources[unit.held_out].read(piece))
        for texts in batched(usable(rows, tally)):
            for part, chosen in self._split(texts, parts).items():
                for piece in encode(chosen, self._tokenizer, self._config.add_bos):
                    writers[part].add(piece)
        self._require_own()
        shards = {part: asdict(writer.close()) for part, writer in writers.items()}
        write_json(self._record(number), {"shards": shards, "rows": tally.to_json()})
        return tally

    def finish(self) -> Manifest:
        """Declare the folder whole, when no shard is missing.

        Returns:
            What it holds.

        Raises:
            ValueError: A shard is missing, there are too many bad rows (names the last one's file and line), or another
                job has overwritten the folder.
        """
        self._require_own()
        if missing := self.missing():
            raise ValueError(f"{len(missing)} of {len(self.units)} shards of {str(self._folder)!r} are missing: go on")
        tally = self.tally()
        tally.check(self._config.max_bad_share, ended=True)
        parts: dict[str, list[ShardRecord]] = {}
        for i in range(len(self.units)):
            record = json.loads(self._record(i).read_text(encoding="utf-8"))
            for part, shard in record["shards"].items():
                parts.setdefault(part, []).append(ShardRecord(**shard))
        for leftover in self._folder.glob("*.unfinished*"):
            leftover.unlink()
        self._tokenizer.save_pretrained(self._folder / "tokenizer")
        dtype = token_type(self._tokenizer)
        manifest = Manifest(self._digest, self._config.tokenizer, dtype, parts, tally, self._config.add_bos)
        write_manifest(self._folder, manifest)
        return manifest

    def _parts(self, unit: Unit) -> list[str]:
        if True in self._sources:
            return ["validation"] if unit.held_out else ["train"]
        return ["train", "validation"] if self._config.validation_fraction else ["train"]

    def _split(self, texts: list[str], parts: list[str]) -> dict[str, list[str]]:
        if len(parts) == 1:
            return {parts[0]: texts}
        found: dict[str, list[str]] = {part: [] for part in parts}
        for text in texts:
            found["validation" if is_held_out(text, self._config.validation_fraction) else "train"].append(text)
        return found

    def _record(self, number: int) -> Path:
        return self._folder / f"{number:05}.json"

    def _require_own(self) -> None:
        if json.loads((self._folder / _PLAN).read_text(encoding="utf-8")) != self._plan:
            raise ValueError(f"{str(self._folder)!r} was overwritten by another job meanwhile: this one ends")

    def _clear(self) -> None:
        """Delete what was prepared, but for the plan, which is written anew; refused while another job makes it."""
        tokenizer = self._folder / "tokenizer"
        if Path(self._config.tokenizer).resolve().is_relative_to(tokenizer.resolve()):
            raise ValueError(
                f"data.tokenizer={self._config.tokenizer!r} lies in the folder that is to be overwritten: copy it "
                "elsewhere"
            )
        with FileLock(self._folder / LOCK):
            for old in [old for pattern in _WRITTEN for old in self._folder.glob(pattern)]:
                old.unlink(missing_ok=True)
            shutil.rmtree(tokenizer, ignore_errors=True)

    def _claim(self, shard_bytes: int, overwrite: bool) -> Any:
        """Write down what the folder is for, or refuse one that is for something else; gives what is written."""
        plan = {
            "format": FORMAT,
            "tokenizer": self._digest,
            "shard_bytes": shard_bytes,
            "settings": {key: getattr(self._config, key) for key in _SETTINGS},
            "files": _files(self.units),
            "units": [[unit.held_out, [list(piece) for piece in unit.pieces]] for unit in self.units],
        }
        plan = json.loads(json.dumps(plan))  # as it is read
        path = self._folder / _PLAN
        if path.is_file() and not overwrite:
            there = json.loads(path.read_text(encoding="utf-8"))
            different = [key for key, value in plan.items() if there.get(key) != value]
            if different:
                raise ValueError(
                    f"{str(self._folder)!r} was begun with other {', '.join(different)}: give the same keys, files and "
                    "tokenizer to go on, replace it with --overwrite, or name another folder"
                )
            return there
        if not path.is_file() and self._folder.is_dir() and any(self._folder.iterdir()):
            raise ValueError(f"{str(self._folder)!r} is not empty, and no data was prepared there: name another folder")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                self._clear()
            write_json(path, plan)
        except OSError as error:
            reason = error.strerror
            raise ValueError(f"{str(self._folder)!r} cannot be written ({reason}): name another folder") from None
        return plan


def run(preparation: Preparation, processes: int, max_bad_share: float) -> Iterator[int]:
    """Make all missing shards in processes of this machine.

    Args:
        preparation: What is to be done.
        processes: How many at once.
        max_bad_share: Largest share of bad rows so far.

    Returns:
        The number of each shard when it is done.

    Raises:
        ValueError: The text cannot be read, has too many bad rows, or a process ended.
    """
    tally = preparation.tally()
    waiting = preparation.missing()
    # Forked, they share the tokenizer and the source.
    context, others = multiprocessing.get_context("fork"), multiprocessing.active_children()
    with ProcessPoolExecutor(min(processes, max(len(waiting), 1)), context, _set, (preparation,)) as pool:
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


def _set(preparation: Preparation) -> None:
    _inherited[:] = [preparation]
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # of Ctrl-C, the parent tells
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process when the one that started it was killed, or it would wait for work for ever."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _make(number: int) -> Tally:
    return _inherited[0].make(number)


def _grouped(pieces: list[FileRange], size: int) -> Iterator[list[FileRange]]:
    """Join small pieces until they have the size of a shard."""
    group: list[FileRange] = []
    held = 0
    for piece in pieces:
        if group and held + piece.size > size:
            yield group
            group, held = [], 0
        group.append(piece)
        held += piece.size
    if group:
        yield group


def _files(units: list[Unit]) -> dict[str, Any]:
    """Size and time of change of every file, by which a changed one is noticed."""
    names = sorted({piece.file for unit in units for piece in unit.pieces if os.path.isfile(piece.file)})
    return {name: [os.path.getsize(name), os.stat(name).st_mtime_ns] for name in names}


def _require_preparable(config: DataConfig) -> None:
    refusals = {
        "mixture": (config.mixture is not None, "prepare each source into a folder of its own, and mix the folders"),
        "streaming": (config.streaming, "preparing reads pieces in parallel; set it to false"),
        "max_documents": (config.max_documents is not None, "it holds for training; set it to null here"),
        "validation_documents": (config.validation_documents is not None, "it holds for training; set it to null here"),
    }
    for key, (wrong, remedy) in refusals.items():
        if wrong:
            raise ValueError(f"data.{key}={getattr(config, key)!r}: {remedy}")
    if config.source == "prepared":
        raise ValueError("data.source='prepared': it is prepared; name the text")
