"""Files on this machine: paths that users give, files that are whole or not there, hashes, and a lock."""

import contextlib
import errno
import hashlib
import hmac
import json
import os
import re
import secrets
import shutil
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

_PACKAGE = Path(__file__).resolve().parent
_LONGEST_REASON = 2000  # characters: what several ranks say comes in one line
_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.\-]+):/")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://(?!/).+")
# Not stores: folders of this machine, and what only lives in a process or cannot be written.
_NO_STORES = ("file", "local", "http", "https", "data")


def is_url(path: str | None) -> bool:
    """Whether a path lies in an object store, such as `s3://bucket/run`."""
    match = _URL.fullmatch((path or "").strip())
    return match is not None and match[1].lower() not in _NO_STORES


def path_or_url(text: str) -> Path | str:
    """A path of this host, or a place in an object store, as an argument of a command."""
    return text if is_url(text) else Path(text)


def local_path(path: str, key: str) -> str:
    """Expand `~` and `~user` in a path, a glob or a name, given as `key`.

    Raises ValueError where it is empty, or begins with a scheme (`s3://` or `s3:/`) or an unknown user.
    """
    if not path.strip():
        raise ValueError(f"{key}={path!r} names nothing: give a path, or leave {key} out")
    if scheme := _SCHEME.match(path):
        raise ValueError(
            f"{key}={path!r}: {scheme[1]}:// is no local path, and stores are not supported: mount it, or copy it here "
            f"(a folder of this name is ./{path.strip()})"
        )
    expanded = os.path.expanduser(path)
    if expanded.startswith("~") and not os.path.exists(expanded):
        raise ValueError(f"{key}={path!r}: there is no such user, or no home folder (a file of this name is ./{path})")
    return expanded


def installed() -> bool:
    """Whether a wheel was installed, in which `launch` and `configs` lie inside the package."""
    return (_PACKAGE / "launch").is_dir()


def shipped(folder: str) -> Path:
    """Where a folder of the project's top level is: inside an installed package, beside it in a checkout."""
    return (_PACKAGE if installed() else _PACKAGE.parent) / folder


def flush(path: Path) -> None:
    """Have the disk keep a file, or the names in a folder. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, content: Any) -> None:
    replace_text(path, json.dumps(content, indent=1) + "\n")


def read_regular(path: Path, limit: int) -> bytes:
    """Read a file of which nobody knows yet what it is: no link is followed, no pipe waited for.

    Raises OSError where it is missing, unreadable, no regular file, or larger than `limit` bytes.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path.name} is no regular file")
        if status.st_size > limit:
            raise OSError(f"{path.name} has {status.st_size:,} bytes, more than the {limit:,} that one can have")
        return file.read(limit)


def append_line(path: Path, line: str) -> None:
    """Append a line to a file; where there is no room for all of it, none of it stays. Raises OSError."""
    data = (line + "\n").encode()
    with open(path, "ab", buffering=0) as file:
        size, written = file.tell(), 0
        try:
            while written < len(data):
                written += file.write(data[written:])
        except OSError:
            file.truncate(size)
            raise


def discard(path: Path) -> None:
    """Delete what lies at a path, if anything; of a link the link alone. Raises OSError where some of it stays."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    shutil.rmtree(path, ignore_errors=True)  # as much as can be, where one file cannot
    if path.exists():
        path.rmdir()


def forget(path: Path) -> None:
    """Delete what lies at a path, as far as that is possible."""
    with contextlib.suppress(OSError):
        discard(path)


def reason(error: BaseException) -> str:
    """What is wrong, in one line; of an OSError without its number and the name of the class."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, OSError):
        text = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
    return " ".join(text.split())[:_LONGEST_REASON]


def replace_text(path: Path, text: str) -> None:
    """Give a file another content at once: whoever reads it finds all of the old or all of the new. Raises OSError."""
    fresh = path.with_name(f"{path.name}.unfinished-{os.getpid()}")
    try:
        fresh.write_text(text, encoding="utf-8")
        flush(fresh)
        os.replace(fresh, path)
    except OSError:
        forget(fresh)
        raise
    flush(path.parent)


def check_destination(folder: Path, *, overwrite: bool, kind: str = "export", holds: str = "config.json") -> None:
    """Refuse a destination that a command must not replace: a file, or a folder with content.

    With `overwrite`, an earlier one of its `kind` may be replaced, which is known by the file that it `holds`.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{folder} exists and is not empty: choose another folder, or replace it with --overwrite")
    if not (folder / holds).is_file():
        raise ValueError(f"{folder} holds no {holds}, so it is no {kind} and stays: choose another folder")


@contextlib.contextmanager
def write_folder(folder: Path) -> Iterator[Path]:
    """Create or replace a folder as a whole: what is written into the one given gets its name when all went well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial, replaced = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("partial", "replaced"))
    partial.mkdir()
    try:
        yield partial
        if folder.exists() and any(folder.iterdir()):
            folder.rename(replaced)
            partial.rename(folder)
            shutil.rmtree(replaced)
        else:
            partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# Hashes


class Record(NamedTuple):
    """A file as it was written: its size in bytes, and its hash."""

    size: int
    hash: str


def new_hash(key: bytes | None) -> "xxhash.xxh3_128 | hmac.HMAC":
    """A hash of a checkpoint's file: xxh3 of 128 bits, or HMAC-SHA256 with a secret."""
    return xxhash.xxh3_128() if key is None else hmac.new(key, digestmod=hashlib.sha256)


def hash_file(path: Path, key: bytes | None) -> Record:
    """Size and hash of a file; with a secret, an HMAC. Raises OSError."""
    with open(path, "rb", buffering=0) as file:
        found = hashlib.file_digest(file, lambda: new_hash(key))
        return Record(file.tell(), found.hexdigest())


# A lock

BEAT_S, STALE_S = 5.0, 60.0
_LOOK_S = 0.5
_LONGEST = 2**16  # bytes of a lock


class LockedError(ValueError):
    """A living process holds the lock."""


class FileLock:
    """One process at a time: a lock that holds on NFS, and that nobody has to remove for a dead owner.

    Its file says who holds it, and appears whole, as a hard link, which NFS makes atomically too. An owner on this
    machine is dead when its process is gone. One elsewhere touches the file every `beat_s` seconds, and is dead when it
    has not changed for `stale_s` by the clock of whoever watches, since clocks of hosts differ. A dead owner's lock is
    replaced by the one process that takes another lock, with the dead owner's token in its name.

    `lost` is called with one line, in another thread, when another process has taken the lock of this living one, as it
    may when this one was suspended.
    """

    def __init__(
        self,
        path: Path,
        lost: Callable[[str], None] = lambda _: None,
        *,
        beat_s: float = BEAT_S,
        stale_s: float = STALE_S,
    ) -> None:
        self._path, self._lost, self._beat_s, self._stale_s = path, lost, beat_s, stale_s
        self._own = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "machine": machine_id(),
            "started": process_start(os.getpid()),
            "token": secrets.token_hex(8),
        }
        self._watched: dict[str, tuple[tuple[int, ...], float]] = {}
        self._released = threading.Event()

    def attempt(self) -> bool:
        """Take the lock, if it is free or its owner is dead. False: it is not known yet whether the owner lives.

        Raises LockedError where a living process holds it, and OSError where the folder cannot be written.
        """
        if not self._take(self._path):
            return False
        threading.Thread(target=self._keep, name="file lock", daemon=True).start()
        return True

    def _take(self, path: Path) -> bool:
        """Make the lock, or replace a dead owner's; False: it is not known yet whether the owner lives."""
        while not self._create(path):
            owner = _read(path)
            if owner is None:
                continue  # released meanwhile
            successor = path.with_name(f"{path.name}.after-{owner['token']}")
            if not self._dead(owner) or not self._take(successor):
                return False
            now = _read(path)
            dead = now is not None and now["token"] == owner["token"]  # and not succeeded meanwhile
            if dead:
                os.replace(self._write(), path)
            successor.unlink(missing_ok=True)
            if dead:
                break
        return True

    @property
    def owner(self) -> str:
        return _in_words(_read(self._path))

    def release(self) -> None:
        """Let others have the folder; may be called twice, and by a process that does not hold the lock."""
        self._released.set()
        with contextlib.suppress(OSError):
            if self._holds():
                self._path.unlink()

    def __enter__(self) -> "FileLock":
        while not self.attempt():
            time.sleep(_LOOK_S)
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _dead(self, owner: dict[str, Any]) -> bool:
        """Whether an owner is known to be dead. Raises LockedError where it lives."""
        if self._own["machine"] is not None and owner.get("machine") == self._own["machine"]:
            if process_start(int(owner["pid"])) != owner["started"]:
                return True
        else:
            stamp, since = self._watched.setdefault(owner["token"], (owner["stamp"], time.monotonic()))
            if stamp == owner["stamp"]:
                return time.monotonic() - since > self._stale_s
        raise LockedError(
            f"{self._path.parent} is in use by another job ({_in_words(owner)}): wait for its end, choose another "
            f"folder, or, if you know that it is dead, delete {self._path}"
        )

    def _holds(self) -> bool:
        found = _read(self._path)
        return found is not None and found["token"] == self._own["token"]

    def _keep(self) -> None:
        while not self._released.wait(self._beat_s):
            with contextlib.suppress(OSError):  # of a file server that does not answer: the next beat may come through
                if self._holds():
                    os.utime(self._path)
                # Deleted to break it, though this process lives: whoever comes first has it.
                elif self._path.exists() or not self._create(self._path):
                    if not self._released.is_set():
                        self._lost(f"another job has taken {self._path.parent} ({self.owner})")
                    return

    def _create(self, path: Path) -> bool:
        """Make a lock that did not exist; says whether it did not."""
        fresh = self._write()
        try:
            os.link(fresh, path)
        except FileExistsError:
            return fresh.stat().st_nlink > 1  # NFS may ask twice, and then answers for the second time
        except OSError:  # a file system without hard links
            try:
                with path.open("x", encoding="utf-8") as file:
                    json.dump(self._own, file)
            except FileExistsError:
                return False
        finally:
            fresh.unlink()
        return True

    def _write(self) -> Path:
        fresh = self._path.with_name(f".{self._path.name}.{self._own['token']}")
        fresh.write_text(json.dumps(self._own) + "\n", encoding="utf-8")
        return fresh


@contextlib.contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Hold a lock; one that lives is waited for. Raises OSError."""
    lock, taken = FileLock(path), False
    while not taken:
        with contextlib.suppress(LockedError):
            taken = lock.attempt()
        if not taken:
            time.sleep(_LOOK_S)
    try:
        yield
    finally:
        lock.release()


def _read(path: Path) -> dict[str, Any] | None:
    """What a lock says, and a `stamp` that changes with every touch; None where there is none."""
    try:
        # Opened anew, since only that asks an NFS server. Links and pipes are there, and say nothing.
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            found, status = file.read(_LONGEST), os.fstat(file.fileno())
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        found, status = b"", os.lstat(path)
    try:
        record = json.loads(found)
        int(record["pid"])
    except (ValueError, TypeError, KeyError):  # half written by another program, or where there are no hard links
        record = {}
    stamp = status.st_ino, status.st_size, status.st_mtime_ns
    return {**record, "token": str(record.get("token", "unknown")), "stamp": stamp}


def _in_words(owner: dict[str, Any] | None) -> str:
    host, pid, since = ((owner or {}).get(key, "unknown") for key in ("host", "pid", "since"))
    return f"host {host}, process {pid}, since {since}"


def machine_id() -> str | None:
    """What all processes have in common that see each other by number; None where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def process_start(pid: int) -> str | None:
    """When a process of this machine was started; None where there is no such process, or its end is not waited for."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else rest[18]
