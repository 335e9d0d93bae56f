"""Bytes of files, compressed or not: everything before a damage, and then what the damage costs.

What a file is compressed with is told by its first bytes, whatever its name says.
"""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from mega_scale.data.rows import Cause

_MAGIC = {
    b"\x1f\x8b": "gz",
    b"BZh": "bz2",
    b"\xfd7zXZ\0": "xz",
    b"\x04\x22\x4d\x18": "lz4",
    b"\x28\xb5\x2f\xfd": "zst",
    b"PK\3\4": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!\x1a\x07": "rar",
    b"\x1f\x9d": "Z",
    b"\x5d\0\0": "lzma",
    b"LZIP\1": "lzip",
    b"\x89LZO\0": "lzo",
    b"\x02\x21\x4c\x18": "old lz4",
    b"x\x9c": "zlib",
    b"PAR1\x15": "parquet",
    b"ARROW1\0\0": "arrow",
}
_READ = ("gz", "zst", "bz2", "xz", "lz4")
_UNREAD_SUFFIXES = (".br", ".zip", ".7z", ".z", ".lzma", ".lzo", ".snappy", ".rar")  # brotli's has no magic
_REMEDIES = {"tar": "unpack it", "parquet": "set data.source=parquet", "arrow": "set data.source=arrow"}
_BZ2_BLOCKS = (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90")  # a text, too, may begin with "BZh9"
_HEAD = 512  # bytes: tar names itself in the middle of its first block
_DECODERS: dict[str, tuple[bytes, Callable[[], Any]]] = {
    "gz": (b"\x1f\x8b", lambda: zlib.decompressobj(31)),
    "bz2": (b"BZh", bz2.BZ2Decompressor),
    "xz": (b"\xfd7zXZ\0", lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ)),
}
_ARROW_CODECS = {"zst": "zstd", "lz4": "lz4"}
_BROKEN = (zlib.error, lzma.LZMAError, EOFError, OSError, pa.ArrowException)
_CHUNK = 1 << 16
_STEP = 64  # bytes: how closely a damage is located in what pyarrow decompresses


class DamageError(Exception):
    """A file cannot be read from here on.

    Args:
        cause: What is wrong.
        detail: The cause in words.
        lost: Bytes on disk that cannot be read; None if nobody knows, since the file was cut.
        complete: Whether all that was compressed has been read, and only what follows it is wrong.
    """

    def __init__(self, cause: Cause, detail: str, lost: int | None, *, complete: bool = False) -> None:
        super().__init__(detail)
        self.cause, self.lost, self.complete = cause, lost, complete


def file_kind(head: bytes) -> str | None:
    """Name the compression, archive or columnar format of a file from its first 512 bytes; None for plain text."""
    if head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5:  # a frame to skip; lz4 has it too
        return "zst"
    if head[257:262] == b"ustar" and b"\0" in head[:100]:
        return "tar"
    kind = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)
    return None if kind == "bz2" and head[4:10] not in _BZ2_BLOCKS else kind


class FileBytes(io.BufferedReader):
    """A file's content, decompressed.

    Args:
        file: Its name.
        size: Bytes to read of it, its size when it was listed: what is appended later is not read. None reads all.

    Raises:
        DamageError: Here, or in a read after the last good byte.
    """

    def __init__(self, file: str, size: int | None = None) -> None:
        source = _Source(file, size)
        try:
            kind = _compression(source, file)
        except BaseException:
            source.close()
            raise
        self._chunks = None if kind is None else _Chunks(source, kind)
        super().__init__(source if self._chunks is None else self._chunks, 1 << 20)
        if kind is not None and (inner := file_kind(self.peek(_HEAD))) is not None:
            self.close()
            remedy = "compress it only once" if inner in _READ else _REMEDIES.get(inner, "use .zst or .gz alone")
            raise DamageError("unreadable", f"it is a {inner} file within {kind}: {remedy}", source.size)

    @property
    def is_compressed(self) -> bool:
        """Whether its bytes are not those on disk."""
        return self._chunks is not None

    def on_disk(self, size: int) -> int:
        """Bytes on disk of `size` bytes that were read, at the ratio so far, rounded up."""
        chunks = self._chunks
        return size if chunks is None else -(-size * chunks.source.tell() // max(chunks.produced, size, 1))


class _Source(io.RawIOBase):
    """The bytes on disk up to a size; says when the file has become shorter, or fails."""

    def __init__(self, file: str, size: int | None) -> None:
        self.size, self.at_most, self._place = size or 0, _CHUNK * 16, 0
        try:
            self._file = open(file, "rb", buffering=0)  # noqa: SIM115  closed with this
            if size is None:
                self.size = self._file.seek(0, io.SEEK_END)
                self._file.seek(0)
        except OSError as error:
            raise self._failed(error) from None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self.at_most, max(self.size - self._place, 0))
        try:
            got = self._file.readinto(memoryview(buffer)[:wanted]) or 0
        except OSError as error:
            raise self._failed(error) from None
        if wanted and not got:
            detail = f"the file became shorter while it was read: {self._place} bytes of {self.size}"
            raise DamageError("truncated_file", detail, self.size - self._place)
        self._place += got
        return got

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = self._file.seek(offset, whence)
        return self._place

    def tell(self) -> int:
        return self._place

    def close(self) -> None:
        if not self.closed and hasattr(self, "_file"):
            self._file.close()
        super().close()

    def _failed(self, error: OSError) -> DamageError:
        return DamageError("unreadable", f"{type(error).__name__}: {error}", self.size - self._place)


class _Chunks(io.RawIOBase):
    """What a source holds, decompressed; a damage is raised when all before it has been read."""

    def __init__(self, source: _Source, kind: str) -> None:
        self.source, self.produced = source, 0
        self._rest = memoryview(b"")
        self._damage: DamageError | None = None
        codec = _ARROW_CODECS.get(kind)
        self._chunks = _members(source, *_DECODERS[kind]) if codec is None else _arrow_stream(source, codec)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        into, done = memoryview(buffer), 0
        while done < len(into) and (self._rest or self._fetch()):
            size = min(len(into) - done, len(self._rest))
            into[done : done + size] = self._rest[:size]
            self._rest = self._rest[size:]
            done += size
        if not done and self._damage is not None:
            raise self._damage
        return done

    def _fetch(self) -> bool:
        try:
            chunk = next((chunk for chunk in self._chunks if chunk), b"")
        except DamageError as damage:
            self._damage, chunk = damage, b""
        self.produced += len(chunk)
        self._rest = memoryview(chunk)
        return bool(chunk)

    def close(self) -> None:
        self.source.close()
        super().close()


def _compression(source: _Source, file: str) -> str | None:
    """What a file is compressed with; None for plain text."""
    head = source.read(_HEAD) or b""
    source.seek(0)
    kind, name = file_kind(head), file.lower()
    if kind == "zst" and head[0] >> 4 == 5 and name.endswith(".lz4"):
        kind = "lz4"
    if kind not in _READ and name.endswith(_UNREAD_SUFFIXES):
        kind = name.rpartition(".")[2]
    if kind is not None and kind not in _READ:
        remedy = _REMEDIES.get(kind, "use .zst or .gz")
        raise DamageError("unreadable", f"it is a {kind} file, which is not read as text: {remedy}", source.size)
    if kind is None and name.endswith(tuple(f".{suffix}" for suffix in _READ)) and len(head) < 10:
        raise DamageError("truncated_file", f"the file has {len(head)} bytes, less than any compressed one", None)
    return kind


def _members(source: _Source, magic: bytes, make: Callable[[], Any]) -> Iterator[bytes]:
    """Decompress the members of a file, one or more, with zeros after each."""
    rest = source.read(_CHUNK) or b""
    while rest:
        start, decoder = source.tell() - len(rest), make()
        while not decoder.eof:
            if not rest:
                whole = _lacks_trailer(decoder)
                detail = "the compressed data ends before its end" + (", in its checksum" if whole else "")
                raise DamageError("truncated_file", detail, 0 if whole else None, complete=whole)
            place = source.tell() - len(rest)
            try:
                chunk = decoder.decompress(rest)
            except _BROKEN:
                yield from _up_to_damage(source, make, start, place)
                return
            yield chunk
            rest = decoder.unused_data if decoder.eof else source.read(_CHUNK) or b""
        while not (rest := rest.lstrip(b"\0")) and (rest := source.read(_CHUNK) or b""):
            pass
        if len(rest) < len(magic):
            rest += source.read(len(magic)) or b""
        if rest[: len(magic)] != magic[: len(rest)]:
            lost = source.size - source.tell() + len(rest)
            raise DamageError("corrupt", "something else follows the compressed data", lost, complete=True)


def _lacks_trailer(decoder: Any) -> bool:
    """Whether a gzip member that was cut lacks nothing but its checksum and length."""
    if not hasattr(decoder, "copy"):  # bz2 and xz
        return False
    found = []
    for filling in (b"\0", b"\xff"):  # no code for the end of the data begins with both
        try:
            decoder.copy().decompress(filling * 8)
        except zlib.error as error:
            found.append("check" in str(error))
    return found == [True, True]


def _up_to_damage(source: _Source, make: Callable[[], Any], start: int, place: int) -> Iterator[bytes]:
    """Decompress the chunk at `place` of the member at `start` byte by byte; raises DamageError after the last one."""
    decoder = make()
    source.seek(start)
    while (left := place - source.tell()) > 0:
        decoder.decompress(source.read(min(left, _CHUNK)))
    while byte := source.read(1):
        try:
            chunk = decoder.decompress(byte)
        except _BROKEN as error:
            # A wrong checksum is about anything before it; bz2 and xz do not say what was wrong.
            known = isinstance(error, zlib.error) and "check" not in str(error)
            first = source.tell() - 1 if known else start
            raise DamageError("corrupt", f"{type(error).__name__}: {error}", source.size - first) from None
        if chunk:
            yield chunk


def _arrow_stream(source: _Source, codec: str) -> Iterator[bytes]:
    """Decompress by pyarrow, which drops what came just before a damage: that is read again in small steps."""

    def opened() -> Any:
        return pa.CompressedInputStream(pa.PythonFile(source, "r"), codec)

    stream, given = opened(), 0
    try:
        while chunk := stream.read(_CHUNK):
            given += len(chunk)
            yield chunk
        return
    except _BROKEN:
        source.seek(0)
    again = opened()  # the first one would close the source if it were dropped
    source.at_most = _STEP
    while given:
        given -= len(again.read(min(given, _CHUNK)))
    while True:
        place = source.tell()
        try:
            byte = again.read(1)
        except _BROKEN as error:
            raise _arrow_damage(error, source.size, place) from None
        if not byte:
            return
        yield byte


def _arrow_damage(error: Exception, size: int, place: int) -> DamageError:
    words, detail = str(error).lower(), f"{type(error).__name__}: {error}"
    if "truncated" in words:
        return DamageError("truncated_file", detail, None)
    if "memory" in words:
        detail += "; compress it with a smaller window, as zstd does without --long"
    if "checksum" in words:  # what is wrong may lie anywhere
        return DamageError("corrupt", detail, size)
    return DamageError("corrupt", detail, size - place, complete="unknown frame" in words and place > 0)
