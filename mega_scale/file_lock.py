"""One process at a time: a lock that holds on NFS, and that nobody has to remove for a dead owner.

Its file says who holds it. It appears whole or not at all, as a hard link, which NFS makes atomically too. Its owner
touches it every few seconds. An owner on this machine is dead when its process is gone; one elsewhere when the file has
not changed for a while by the clock of whoever watches, since clocks of hosts differ.

A dead owner's lock is replaced by the one process that makes its successor, a file with the dead owner's token in its
name. One that dies while it does so is succeeded in the same way.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

BEAT_S = 5.0
"""The owner touches the lock so often (seconds)."""

STALE_S = 60.0
"""An owner on another machine is dead when it has not touched the lock for so long (seconds)."""

_LOOK_S = 0.5


class LockedError(ValueError):
    """A living process holds the lock."""


class _Owner(NamedTuple):
    """What a lock says, and a stamp that changes with every touch."""

    record: dict[str, Any]
    stamp: tuple[int, ...]

    @property
    def token(self) -> str:
        return str(self.record.get("token", "unknown"))

    def __str__(self) -> str:
        host, pid, since = (self.record.get(key, "unknown") for key in ("host", "pid", "since"))
        return f"host {host}, process {pid}, since {since}"


class FileLock:
    """A lock.

    Args:
        path: of its file, in an existing folder.
        lost: called with one line, in another thread, when another process has taken the lock of this living one, as it
            may when this one was suspended.
        beat_s: time between two touches (seconds).
        stale_s: time without a touch after which an owner elsewhere is dead (seconds).
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
            "machine": _machine(),
            "started": _started(os.getpid()),
            "token": secrets.token_hex(8),
        }
        self._watched: tuple[_Owner, float] | None = None
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def attempt(self) -> bool:
        """Take the lock, if it is free or its owner is dead.

        Returns:
            Whether this process holds it; where it does not, it is not known yet whether the owner lives: try again.

        Raises:
            LockedError: a living process holds it; says who, since when, and how to break it.
            OSError: the folder cannot be written.
        """
        while not self._create(self._path):
            first = last = _read(self._path)
            steps: list[Path] = []
            while last is not None:
                steps.append(self._path.with_name(f"{self._path.name}.after-{last.token}"))
                following = _read(steps[-1])
                if following is None:
                    break
                last = following
            if first is None or last is None:
                continue  # released meanwhile
            if not self._dead(last):
                return False
            if not self._create(steps[-1]):
                continue
            now = _read(self._path)
            if now is None or now.token != first.token:
                steps[-1].unlink(missing_ok=True)
                continue
            os.replace(self._write(), self._path)
            for step in steps:
                step.unlink(missing_ok=True)
            break
        self._thread = threading.Thread(target=self._keep, name="file lock", daemon=True)
        self._thread.start()
        return True

    @property
    def owner(self) -> str:
        """Who holds it, in words."""
        return str(_read(self._path) or "nobody")

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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _dead(self, owner: _Owner) -> bool:
        """Whether an owner is known to be dead. Raises LockedError where it lives."""
        here = self._own["machine"] is not None and owner.record.get("machine") == self._own["machine"]
        if here and _started(int(owner.record["pid"])) != owner.record["started"]:
            return True
        if not here:
            if self._watched is None or self._watched[0].token != owner.token:
                self._watched = owner, time.monotonic()
            if self._watched[0].stamp == owner.stamp:
                return time.monotonic() - self._watched[1] > self._stale_s
        raise LockedError(
            f"{self._path.parent} is in use by another job ({owner}): wait for its end, choose another folder, or, if "
            f"you know that it is dead, delete {self._path}"
        )

    def _holds(self) -> bool:
        found = _read(self._path)
        return found is not None and found.token == self._own["token"]

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


def _read(path: Path) -> _Owner | None:
    """What a lock says; None where there is none. Opened anew, since only that asks an NFS server."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            found, status = file.read(), os.fstat(file.fileno())
    except FileNotFoundError:
        return None
    try:
        record = json.loads(found)
        int(record["pid"])
    except (ValueError, TypeError, KeyError):  # half written by another program, or where there are no hard links
        record = {}
    return _Owner(record, (status.st_ino, status.st_size, status.st_mtime_ns))


def _machine() -> str | None:
    """What all processes have in common that see each other by number; None where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When a process of this machine was started; None where there is no such process, or its end is not waited for."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else rest[18]
