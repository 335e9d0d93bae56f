"""Object stores of fsspec (`s3://`, `gs://`, `hf://`): objects below a URL, and copies of them on this host."""

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from mega_scale.files import Record, forget, hash_file, in_turn, new_hash, reason

T = TypeVar("T")
# What has to be installed for a kind of store, and by which extra of ours, where there is one.
_PACKAGES = {
    "s3": ("s3fs", "'mega_scale[s3]'"), "s3a": ("s3fs", "'mega_scale[s3]'"), "gs": ("gcsfs", "gcsfs"),
    "gcs": ("gcsfs", "gcsfs"), "hf": ("huggingface_hub", "huggingface_hub"), "az": ("adlfs", "adlfs"),
    "abfs": ("adlfs", "adlfs"), "abfss": ("adlfs", "adlfs"),
}  # fmt: skip
_TRIES, _PAUSE_S = 5, 0.5  # of a request; the pause doubles
_CHUNK_BYTES = 8 * 2**20


class ObjectStore:
    """The objects below one URL, by name with slashes. Methods raise OSError after several tries, ValueError never."""

    def __init__(self, url: str, key: str = "run_dir") -> None:
        """Open a store; raises ValueError, naming `key`, where its package is missing or it cannot be reached."""
        self.url = url.strip().rstrip("/")
        scheme = self.url.partition("://")[0].lower()
        package, install = _PACKAGES.get(scheme, (f"an fsspec file system for {scheme}://", ""))
        remedy = f"{key}={url!r} needs {package}" + (f": pip install {install}" if install else ", which is not known")
        try:
            import fsspec  # noqa: PLC0415 - takes a second, for runs in a store only

            self._fs, self._root = fsspec.core.url_to_fs(self.url, use_listings_cache=False, skip_instance_cache=True)
        except (ImportError, ValueError) as error:
            raise ValueError(f"{remedy} ({' '.join(str(error).split())[:200]})") from None

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _try(self, work: Callable[[], T]) -> T:
        """Do what may fail for a moment; what is not there is no failure of that kind."""
        for attempt in range(_TRIES):
            try:
                return work()
            except (FileNotFoundError, FileExistsError, PermissionError):
                raise
            except Exception as error:  # each file system has errors of its own
                if attempt == _TRIES - 1 or "Credentials" in type(error).__name__:
                    raise OSError(f"{self.url} does not answer as it should: {reason(error)}") from error
                time.sleep(_PAUSE_S * 2**attempt)
        raise AssertionError

    def names(self, prefix: str = "") -> dict[str, int]:
        """Sizes of all objects by name, bytes; a listing may lack what has just been written."""
        base = self._path(prefix).rstrip("/")

        def find() -> dict[str, Any]:
            self._fs.invalidate_cache()
            found: dict[str, Any] = self._fs.find(base, detail=True)
            return found

        try:
            found = self._try(find)
        except FileNotFoundError:
            return {}
        start = len(self._path(""))
        # `find` of what is one object lists the object itself.
        return {
            path[start:]: int(facts["size"] or 0) for path, facts in found.items() if path.startswith(self._path(""))
        }

    def read(self, name: str) -> bytes | None:
        """All of a small object; None where there is none."""
        try:
            found: bytes = self._try(lambda: self._fs.cat_file(self._path(name)))
        except FileNotFoundError:
            return None
        return found

    def write(self, name: str, data: bytes) -> None:
        """Write a small object as a whole."""
        self._try(lambda: self._fs.pipe_file(self._path(name), data))

    def create(self, name: str, data: bytes) -> bool:
        """Write an object that is not there; False where there is one, as far as the store can tell."""
        try:
            self._try(lambda: self._fs.pipe_file(self._path(name), data, mode="create"))
        except FileExistsError:
            return False
        except OSError as error:
            if isinstance(error.__cause__, (NotImplementedError, TypeError)):  # this store has no such request
                if self.read(name) is not None:
                    return False
                self.write(name, data)
                return True
            # Refused because of the one that is there: stores word that each in their way.
            if self.read(name) is not None:
                return False
            raise
        return True

    def put(self, path: Path, name: str, record: Record, key: bytes | None) -> None:
        """Upload a file, and read it back; raises OSError where it does not come back as it was written."""
        for attempt in range(_TRIES):
            self._try(lambda: self._fs.put_file(str(path), self._path(name)))
            if self._try(lambda: self._hash(name, key)) == record:
                return
            time.sleep(_PAUSE_S * 2**attempt)
        raise OSError(f"{self.url}/{name} does not read back as it was uploaded")

    def get(self, name: str, path: Path, record: Record, key: bytes | None) -> None:
        """Download a file; raises OSError where it is not what the record says."""
        for attempt in range(_TRIES):
            self._try(lambda: self._fs.get_file(self._path(name), str(path)))
            if hash_file(path, key) == record:
                return
            forget(path)
            time.sleep(_PAUSE_S * 2**attempt)
        raise OSError(f"{self.url}/{name} does not hold what was written")

    def copy(self, name: str, path: Path, size: int) -> None:
        """Download an object of a size (bytes); the file appears when it is whole."""
        partial = path.with_name(f"{path.name}.partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        self._try(lambda: self._fs.get_file(self._path(name), str(partial)))
        if (found := partial.stat().st_size) != size:
            raise OSError(f"{self.url}/{name} came with {found} bytes, not {size}")
        partial.replace(path)

    def _hash(self, name: str, key: bytes | None) -> Record:
        found, size = new_hash(key), 0
        with self._fs.open(self._path(name), "rb", block_size=_CHUNK_BYTES, cache_type="readahead") as file:
            while chunk := file.read(_CHUNK_BYTES):
                found.update(chunk)
                size += len(chunk)
        return Record(size, found.hexdigest())

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                self._try(lambda name=name: self._fs.rm_file(self._path(name)))  # type: ignore[misc]


def folder_of(url: str, cache: Path, kind: str) -> Path:
    """The folder of this host for what lies at a URL."""
    url = url.strip().rstrip("/")
    return cache / kind / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{url.rpartition('/')[2]}"


def copy_folder(url: str, cache: Path, key: str) -> Path:
    """Copy all that lies below a URL, given as `key`, to this host, unless it is there; returns the folder.

    Processes of one host do this one after the other. Raises ValueError where nothing lies there, OSError where the
    store does not answer.
    """
    objects, folder = ObjectStore(url, key), folder_of(url, cache, "copies")
    folder.mkdir(parents=True, exist_ok=True)
    with in_turn(folder.with_name(f"{folder.name}.lock")):
        sizes = objects.names()
        if not sizes:
            raise ValueError(f"{key}={url!r}: nothing lies there: name a folder that launch/prepare.py has written")
        # What tells that the folder is whole comes last.
        for name, size in sorted(sizes.items(), key=lambda item: item[0] == "manifest.json"):
            path = folder / name
            if not path.is_file() or path.stat().st_size != size:
                objects.copy(name, path, size)
    return folder
