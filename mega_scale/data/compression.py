"""Bytes of files, compressed or not: everything before a damage, and then what the damage costs.

What a file is compressed with is told by its first bytes, whatever its name says.
"""

import bz2
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pyarrow as pa

Damage = Literal["truncated_file", "corrupt", "unreadable"]

_MAGIC = {
    b"\x1f\x8b": "gz", b"BZh": "bz2", b"\xfd7zXZ\0": "xz", b"\x04\x22\x4d\x18": "lz4", b"\x28\xb5\x2f\xfd": "zst",
    b"PK\3\4": "zip", b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!\x1a\x07": "rar", b"\x1f\x9d": "Z", b"\x5d\0\0": "lzma",
    b"LZIP\1": "lzip", b"\x89LZO\0": "lzo", b"\x02\x21\x4c\x18": "old lz4", b"x\x9c": "zlib", b"PAR1\x15": "parquet",
    b"ARROW1\0\0": "arrow",
}  # fmt: skip
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

    `lost` are the bytes on disk that cannot be read, None if nobody knows, since the file was cut. It is `complete` if
    all that was compressed has been read, and only what follows it is wrong.
    """

    def __init__(
        self, cause: Damage | Literal["broken_json"], detail: str, lost: int | None, *, complete: bool = False
    ) -> None:
        super().__init__(detail)
        self.cause, self.lost, self.complete = cause, lost, complete


def describe(error: BaseException) -> str:
    """The kind of an error and its words."""
    return f"{type(error).__name__}: {error}"


def file_kind(head: bytes) -> str | None:
    """Name the compression, archive or columnar format of a file from its first 512 bytes; None for plain text."""
    if head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5:  # a frame to skip; lz4 has it too
        return "zst"
    if head[257:262] == b"ustar" and b"\0" in head[:100]:
        return "tar"
    kind = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)
    return None if kind == "bz2" and head[4:10] not in _BZ2_BLOCKS else kind


class FileBytes(io.BufferedReader):
    """A file's content, decompressed if it has a `kind`; raises DamageError here, or after the last good byte.

    With the file's `size` when it was listed, what is appended later is not read.
    """

    def __init__(self, file: str, size: int | None = None) -> None:
        source = _Source(file, size)
        try:
            kind = _compression(source, file.lower())
        except BaseException:
            source.close()
            raise
        self.kind, self._chunks = kind, None if kind is None else _Chunks(source, kind)
        super().__init__(source if self._chunks is None else self._chunks, 1 << 20)
        if kind is not None and (inner := file_kind(self.peek(_HEAD))) is not None:
            self.close()
            remedy = "compress it only once" if inner in _READ else _REMEDIES.get(inner, "use .zst or .gz alone")
            raise DamageError("unreadable", f"it is a {inner} file within {kind}: {remedy}", source.size)

    def on_disk(self, size: int) -> int:
        """Bytes on disk of `size` bytes that were read, at the ratio so far, rounded up."""
        chunks = self._chunks
        return size if chunks is None else -(-size * chunks.source.place // max(chunks.produced, size, 1))


class _Source(io.FileIO):
    """The bytes on disk up to a size; says when the file has become shorter, or fails."""

    read = io.RawIOBase.read  # type: ignore[assignment]  # which reads by `readinto`

    def __init__(self, file: str, size: int | None) -> None:
        self.at_most, self.place = _CHUNK * 16, 0
        try:
            super().__init__(file)
        except OSError as error:
            raise DamageError("unreadable", describe(error), size or 0) from None
        self.size = os.fstat(self.fileno()).st_size if size is None else size

    def readinto(self, buffer: Any) -> int:
        place = self.tell()
        wanted = min(len(buffer), self.at_most, max(self.size - place, 0))
        try:
            got = super().readinto(memoryview(buffer)[:wanted]) or 0
        except OSError as error:
            raise DamageError("unreadable", describe(error), self.size - place) from None
        if wanted and not got:
            detail = f"the file became shorter while it was read: {place} bytes of {self.size}"
            raise DamageError("truncated_file", detail, self.size - place)
        self.place = place + got
        return got


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
        while done < len(into):
            if not self._rest:
                try:
                    self._rest = memoryview(next((chunk for chunk in self._chunks if chunk), b""))
                except DamageError as damage:
                    self._damage = damage
                self.produced += len(self._rest)
                if not self._rest:
                    break
            size = min(len(into) - done, len(self._rest))
            into[done : done + size] = self._rest[:size]
            self._rest = self._rest[size:]
            done += size
        if not done and self._damage is not None:
            raise self._damage
        return done

    def close(self) -> None:
        self.source.close()
        super().close()


def _compression(source: _Source, name: str) -> str | None:
    """What a file of a name in small letters is compressed with; None for plain text."""
    head = source.read(_HEAD) or b""
    source.seek(0)
    kind = file_kind(head)
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
            raise DamageError("corrupt", describe(error), source.size - first) from None
        if chunk:
            yield chunk


def _arrow_stream(source: _Source, codec: str) -> Iterator[bytes]:
    """Decompress by pyarrow, which drops what came just before a damage: that is read again in small steps."""
    stream, given = pa.CompressedInputStream(pa.PythonFile(source, "r"), codec), 0
    try:
        while chunk := stream.read(_CHUNK):
            given += len(chunk)
            yield chunk
        return
    except _BROKEN:
        source.seek(0)
    # Another one beside the first, which would close the source if it were dropped.
    again = pa.CompressedInputStream(pa.PythonFile(source, "r"), codec)
    source.at_most = _STEP
    while given:
        given -= len(again.read(min(given, _CHUNK)))
    while True:
        place = source.tell()
        try:
            byte = again.read(1)
        except _BROKEN as error:
            words, detail, lost = str(error).lower(), describe(error), source.size - place
            if "truncated" in words:
                raise DamageError("truncated_file", detail, None) from None
            if "memory" in words:
                detail += "; compress it with a smaller window, as zstd does without --long"
            if "checksum" in words:  # what is wrong may lie anywhere
                raise DamageError("corrupt", detail, source.size) from None
            raise DamageError("corrupt", detail, lost, complete="unknown frame" in words and place > 0) from None
        if not byte:
            return
        yield byte
