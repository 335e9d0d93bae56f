"""A run folder in an object store: worked on in a folder of this host, kept in the store.

Ranks write checkpoints where they always do, in a folder of their host, and each uploads its own files. An object
store renames nothing, so the manifest, which rank 0 uploads last, makes a checkpoint of what lies there, and goes first
when it is deleted. A run that starts gets the newest checkpoint of the store, proven, before it looks into its folder.

Stores are those of fsspec: `s3://`, `gs://`, `hf://` and others. Every upload is read back.
"""

import contextlib
import json
import os
import re
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mega_scale.checkpoint import folder as store
from mega_scale.checkpoint.run_folder import OVERWRITING
from mega_scale.files import (
    LockedError,
    Record,
    discard,
    forget,
    hash_file,
    in_turn,
    is_url,
    machine_id,
    process_start,
    reason,
    replace_text,
)
from mega_scale.object_store import ObjectStore, folder_of

# What lies beside the checkpoints and is kept in the store too.
_BESIDE = ("config.yaml", "metrics.jsonl", "status.json", "trackers.json", "tensorboard/events.out.tfevents.*")
_STEP = re.compile(r"(.+)/checkpoints/(step-[0-9]{8,})")
_FETCH_LOCK = "fetch.lock"


class StoreLock:
    """One job at a time, as `FileLock` sees to on disks: an object that says who has the run.

    Its owner writes it anew every `beat_s` seconds; one that has not changed for `stale_s` is a dead job's. Where a
    store cannot create an object only if there is none, two jobs that start in the same second may both believe to have
    it until the next beat, which tells one of them.
    """

    def __init__(
        self, objects: ObjectStore, lost: Callable[[str], None], *, beat_s: float = 15.0, stale_s: float = 90.0
    ) -> None:
        self._objects, self._lost, self._beat_s, self._stale_s = objects, lost, beat_s, stale_s
        self._own: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "machine": machine_id(),
            "started": process_start(os.getpid()),
            "token": secrets.token_hex(8),
            "beat": 0,
        }
        self._seen: tuple[bytes, float] | None = None
        self._held, self._released = False, threading.Event()

    def attempt(self) -> bool:
        """Take it, if it is free or its owner is dead; False: not known yet. Raises LockedError where it lives."""
        found = self._objects.read(store.LOCK)
        if found is None:
            taken = self._objects.create(store.LOCK, self._text())
        elif self._dead(found):
            self._objects.write(store.LOCK, self._text())
            taken = self._holds()
        else:
            return False
        if taken:
            self._held = True
            threading.Thread(target=self._keep, name="store lock", daemon=True).start()
        return taken

    def _dead(self, found: bytes) -> bool:
        """Whether an owner is known to be dead. Raises LockedError where it lives."""
        owner = _parsed(found)
        if self._own["machine"] is not None and owner.get("machine") == self._own["machine"]:
            if process_start(int(owner["pid"])) != owner["started"]:
                return True
        else:
            first, since = self._seen = self._seen or (found, time.monotonic())
            if found == first:
                return time.monotonic() - since > self._stale_s
        raise LockedError(
            f"{self._objects.url} is in use by another job ({self.owner}): wait for its end, choose another run_dir, "
            f"or, if you know that it is dead, delete {self._objects.url}/{store.LOCK}"
        )

    @property
    def owner(self) -> str:
        found = _parsed(self._objects.read(store.LOCK) or b"")
        return f"host {found.get('host', 'unknown')}, since {found.get('since', 'unknown')}"

    def release(self) -> None:
        """Let others have the run; may be called twice."""
        self._released.set()
        if self._held:
            self._held = False
            with contextlib.suppress(OSError):
                if self._holds():
                    self._objects.delete([store.LOCK])

    def _text(self) -> bytes:
        self._own["beat"] = self._own["beat"] + 1
        return json.dumps(self._own).encode()

    def _holds(self) -> bool:
        return str(self._own["token"]).encode() in (self._objects.read(store.LOCK) or b"")

    def _keep(self) -> None:
        while not self._released.wait(self._beat_s):
            with contextlib.suppress(OSError):  # of a store that does not answer: the next beat may come through
                if not self._holds():
                    if not self._released.is_set():
                        self._lost(f"another job has taken {self._objects.url} ({self.owner})")
                    return
                if not self._released.is_set():
                    self._objects.write(store.LOCK, self._text())


def _parsed(found: bytes) -> dict[str, Any]:
    try:
        owner = json.loads(found)
        return owner if isinstance(owner, dict) else {}
    except ValueError:
        return {}


def work_folder(url: str, cache: Path) -> Path:
    """The folder of this host where a run of a store is worked on."""
    return folder_of(url, cache, "runs")


class RemoteRun:
    """A run in a store and the folder of this host where it is worked on; `key` signs checkpoints."""

    def __init__(self, url: str, cache: Path, key: bytes | None = None, setting: str = "run_dir") -> None:
        self.objects, self.key = ObjectStore(url, setting), key
        self.url, self.folder = self.objects.url, work_folder(url, cache)

    def lock(self, lost: Callable[[str], None]) -> StoreLock:
        return StoreLock(self.objects, lost)

    # From the store

    def checkpoints(self) -> dict[str, dict[str, int]]:
        """Sizes of the files of each checkpoint, by its name, the newest first.

        A listing may lack what was written last: `latest` is asked too, and the checkpoint that it names is one of them
        though it be gone, without files, so that nobody takes an older one without a word.
        """
        found: dict[str, dict[str, int]] = {}
        for name, size in self.objects.names("checkpoints").items():
            _, _, rest = name.partition("/")
            step, _, file = rest.partition("/")
            if file and store.is_name(step):
                found.setdefault(step, {})[file] = size
        found = {step: files for step, files in found.items() if store.MANIFEST in files}
        pointer = (self.objects.read(f"checkpoints/{store.LATEST}") or b"").decode(errors="replace").strip()
        if store.is_name(pointer) and pointer not in found:
            text = self.objects.read(f"checkpoints/{pointer}/{store.MANIFEST}")
            records = json.loads(text)["files"].items() if text else ()
            found[pointer] = {name: size for name, (size, _) in records}
        ages = {step: (self._serial(step) or (1 << 62 if step == pointer else 0), step) for step in found}
        return {step: found[step] for step in sorted(found, key=ages.__getitem__, reverse=True)}

    def next_serial(self) -> int:
        """Number for the next checkpoint, greater than that of all in the store."""
        return max((self._serial(step) for step in self.checkpoints()), default=0) + 1

    def _serial(self, step: str) -> int:
        with self._described(step) as folder:
            return store.claimed_serial(folder)

    @contextlib.contextmanager
    def _described(self, step: str, names: Iterable[str] = ()) -> Iterator[Path]:
        """A folder, for a while, with a checkpoint's manifest and some more of its small files."""
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / step
            for name in (store.MANIFEST, *names):
                if (data := self.objects.read(f"checkpoints/{step}/{name}")) is not None:
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (folder / name).write_bytes(data)
            yield folder

    def summaries(self) -> Iterator[dict[str, Any]]:
        """`folder.summary` of each checkpoint, the oldest first; states are not read."""
        for step, sizes in reversed(self.checkpoints().items()):
            small = [name for name in sizes if not name.startswith(f"{store.STATE}/part-")]
            with self._described(step, small) as folder:
                large = {name: size for name, size in sizes.items() if name not in small}
                found = store.summary(folder, self.key, large)
                place, problem = f"{self.url}/checkpoints/{step}", found["problem"]
                yield found | {"folder": place, "problem": problem and problem.replace(str(folder), place)}

    def fetch(self, log: Callable[[str], None], *, step: str | None = None, older: bool = True) -> Path:
        """Bring the newest checkpoint, or that of a `step`, into the folder of this host, and return where it lies.

        Processes of one host do this one after the other; what is here already is not sent again. A checkpoint that is
        damaged in the store is named, and (`older`) the one before it is taken. Raises ValueError where none can be.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        problems = []
        with in_turn(self.folder / _FETCH_LOCK):
            for name in [step] if step is not None else self.checkpoints():
                try:
                    place = self.bring(name)
                except (store.CheckpointError, OSError) as error:
                    problems.append(f"{self.url}/checkpoints/{name} cannot be used: {reason(error)}")
                    if not older:
                        break
                    continue
                for line in problems:
                    log(line)
                return place
        missing = f"{self.url} has no checkpoints: give the run_dir of a run that has saved"
        raise store.CheckpointError("; ".join(problems) or missing)

    def bring(self, name: str, folder: Path | None = None) -> Path:
        """Download a checkpoint as a whole, unless it is there. Raises CheckpointError or OSError."""
        target = (folder or self.folder) / "checkpoints" / name
        with self._described(name) as described:
            manifest = store.read_manifest(described, self.key)
            text = (described / store.MANIFEST).read_bytes()
        if target.is_dir() and (target / store.MANIFEST).read_bytes() == text:
            with contextlib.suppress(store.CheckpointError):
                store.verify_quickly(target, self.key)
                return target
        partial = target.with_suffix(".unfinished")
        forget(partial)
        for file, record in manifest.files.items():
            (partial / file).parent.mkdir(parents=True, exist_ok=True)
            self.objects.get(f"checkpoints/{name}/{file}", partial / file, record, self.key)
        (partial / store.MANIFEST).write_bytes(text)
        discard(target)
        partial.rename(target)
        replace_text(target.parent / store.LATEST, name + "\n")
        return target

    def prepare(self, log: Callable[[str], None], *, resumes: bool) -> None:
        """Make the folder of this host what the store says of the run, before a job looks into it.

        What this host has is deleted where the store has gone on without it, or was emptied. A run that `resumes` gets
        its newest checkpoint. Raises ValueError where it has checkpoints, none of which can be used.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with in_turn(self.folder / _FETCH_LOCK):
            remote, names = self.checkpoints(), self.objects.names()
            newest = next(iter(remote), None)
            # Where nothing is left in the store, somebody has deleted the run.
            if names and (here := store.checkpoints(self.folder)[-1:]):
                if newest is None or store.claimed_serial(here[0]) > self._serial(newest):
                    log(f"{here[0]} is newer than all in {self.url}, where it was not uploaded to")
                    return
                text = self.objects.read(f"checkpoints/{newest}/{store.MANIFEST}")
                if here[0].name == newest and (here[0] / store.MANIFEST).read_bytes() == text:
                    return
            patterns = ("checkpoints/*", *_BESIDE, OVERWRITING)
            for path in [path for pattern in patterns for path in self.folder.glob(pattern)]:
                discard(path)
            for name in names:
                if name in (*_BESIDE, OVERWRITING) or name.startswith("tensorboard/"):
                    (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (self.folder / name).write_bytes(self.objects.read(name) or b"")
        if remote and resumes:
            self.fetch(log)

    # Into the store

    def withdraw(self, name: str) -> None:
        """Take away the name of a checkpoint that is going to be written anew: it is none until that is complete."""
        self.objects.delete([f"checkpoints/{name}/{store.MANIFEST}"])

    def upload(self, folder: Path, name: str, records: Mapping[str, Record]) -> None:
        """Upload files of a checkpoint from its folder, and read them back. Raises OSError."""
        for file, record in records.items():
            self.objects.put(folder / file, f"checkpoints/{name}/{file}", record, self.key)

    def complete(self, folder: Path) -> None:
        """Upload the manifest of a checkpoint whose files are all there: now it is one. Raises OSError."""
        path = folder / store.MANIFEST
        name = f"checkpoints/{folder.name}/{store.MANIFEST}"
        self.objects.put(path, name, hash_file(path, self.key), self.key)
        self.objects.write(f"checkpoints/{store.LATEST}", (folder.name + "\n").encode())

    def upload_beside(self) -> None:
        """Upload metrics, events and the like as they are now. Raises OSError."""
        for path in [path for pattern in _BESIDE for path in self.folder.glob(pattern)]:
            data = path.read_bytes()
            self.objects.write(path.relative_to(self.folder).as_posix(), data)

    def delete(self, name: str) -> None:
        """Delete a checkpoint, its manifest first. Raises OSError."""
        self.withdraw(name)
        self.objects.delete(self.objects.names(f"checkpoints/{name}"))

    def keep(self, newest: int, every: int, always: Iterable[str] = ()) -> None:
        """Delete the checkpoints that `checkpoint.keep` and `keep_every` leave out, but none of `always`."""
        names = [name for name in reversed(self.checkpoints()) if name not in always]
        for path in store.surplus([Path(name) for name in (*names, *always)], newest, every):
            if path.name not in always:
                self.delete(path.name)

    def prune(
        self,
        newest: int,
        every: int = 0,
        *,
        damaged: bool = False,
        dry: bool = False,
        spared: Callable[[Path], bool] = lambda folder: False,
    ) -> tuple[list[str], list[str]]:
        """`folder.prune` of a run in a store: every checkpoint is downloaded and verified first."""
        valid, broken, lock = [], [], self.lock(lambda _: None)
        staying = set[str]()

        def look(folder: Path) -> None:
            if spared(folder):
                staying.add(folder.name)

        while not dry and not lock.attempt():
            time.sleep(1.0)
        try:
            for name in reversed(self.checkpoints()):
                try:
                    self.verify(name, look)
                    valid.append(Path(name))
                except store.CheckpointError:
                    broken.append(Path(name))
            if not valid:
                raise ValueError(f"{self.url} has no valid checkpoint ({len(broken)} damaged ones): nothing is deleted")
            old = [path.name for path in store.surplus(valid, newest, every)]
            chosen = [name for name in old if name not in staying]
            chosen += [path.name for path in broken] if damaged else []
            for name in () if dry else chosen:
                self.delete(name)
        finally:
            lock.release()
        kept = [name for name in old if name in staying]
        return [f"{self.url}/checkpoints/{name}" for name in chosen], [
            f"{self.url}/checkpoints/{name}" for name in kept
        ]

    def verify(self, name: str, look: Callable[[Path], None] = lambda folder: None) -> store.Manifest:
        """Download a checkpoint and verify every byte of it; then `look` at the copy. Raises CheckpointError."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                manifest = store.verify(copy := self.bring(name, Path(folder)), self.key)
                look(copy)
                return manifest
            except (store.CheckpointError, OSError) as error:
                place = f"{self.url}/checkpoints/{name}"
                raise store.CheckpointError(f"{place} is no valid checkpoint: {reason(error)}") from None

    def clear(self) -> None:
        """Delete the run: its checkpoints, newest last, and what lies beside them. Raises OSError."""
        for name in reversed(self.checkpoints()):
            self.withdraw(name)
        self.objects.delete(name for name in self.objects.names() if name != store.LOCK)


def split_url(url: str) -> tuple[str, str | None]:
    """URL of a run, and the name of the checkpoint that the whole URL means, None for the newest."""
    match = _STEP.fullmatch(url.strip().rstrip("/"))
    return (match[1], match[2]) if match else (url, None)


def localized(
    path: Path | str, cache: Path, key: bytes | None, log: Callable[[str], None], *, older: bool = True
) -> Path:
    """The path itself, or for a run or checkpoint in a store, the checkpoint's copy on this host. Raises ValueError."""
    if not is_url(str(path)):
        return Path(path)
    url, step = split_url(str(path))
    return RemoteRun(url, cache, key, "path").fetch(log, step=step, older=older)
