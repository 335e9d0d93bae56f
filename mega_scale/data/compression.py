"""Bytes of files, compressed or not: everything before a damage, and then what the damage costs."""

import bz2
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pyarrow as pa

from mega_scale.data.config import Damage
from mega_scale.files import reason

_MAGIC = {
    b"\x1f\x8b": "gz", b"BZh": "bz2", b"\xfd7zXZ\0": "xz", b"\x04\x22\x4d\x18": "lz4", b"\x28\xb5\x2f\xfd": "zst",
    b"PK\3\4": "zip", b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!\x1a\x07": "rar", b"\x1f\x9d": "Z", b"\x5d\0\0": "lzma",
    b"LZIP\1": "lzip", b"\x89LZO\0": "lzo", b"\x02\x21\x4c\x18": "old lz4", b"x\x9c": "zlib", b"PAR1\x15": "parquet",
    b"ARROW1\0\0": "arrow",
}  # fmt: skip
_UNREAD_SUFFIXES = (".br", ".zip", ".7z", ".z", ".lzma", ".lzo", ".snappy", ".rar")  # brotli's has no magic
_REMEDIES = {"tar": "unpack it", "parquet": "set data.source=parquet", "arrow": "set data.source=arrow"}
_BZ2_BLOCKS = (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90")  # a text, too, may begin with "BZh9"
_HEAD = 512  # bytes: tar names itself in the middle of its first block
_DECODERS: dict[str, Callable[[], Any]] = {
    "gz": lambda: zlib.decompressobj(31),
    "bz2": bz2.BZ2Decompressor,
    "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
}
_ARROW_CODECS = {"zst": "zstd", "lz4": "lz4"}
_READ = (*_DECODERS, *_ARROW_CODECS)
_BROKEN = (zlib.error, lzma.LZMAError, EOFError, OSError, pa.ArrowException)
_CHUNK = 1 << 16


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
        self._source = _Source(file, size)
        try:
            self.kind = _compression(self._source, file.lower())
        except BaseException:
            self._source.close()
            raise
        self._content = None if self.kind is None else _Content(self._source, self.kind)
        super().__init__(self._content or self._source, 1 << 20)
        if self.kind is not None and (inner := file_kind(self.peek(_HEAD))) is not None:
            self.close()
            remedy = "compress it only once" if inner in _READ else _REMEDIES.get(inner, "use .zst or .gz alone")
            raise DamageError("unreadable", f"it is a {inner} file within {self.kind}: {remedy}", self._source.size)

    def on_disk(self, size: int) -> int:
        """Bytes on disk of `size` bytes that were read, at the ratio so far, rounded up."""
        return size if self._content is None else -(-size * self._source.tell() // max(self._content.produced, size, 1))


class _Source(io.FileIO):
    """The bytes on disk up to a size; says when the file has become shorter, or fails.

    `place` is where the last read began. Bytes from `damaged` on are read one by one. The next checksum covers those
    from `member` on.
    """

    read = io.RawIOBase.read  # type: ignore[assignment]  # which reads by `readinto`

    def __init__(self, file: str, size: int | None) -> None:
        self.place = self.member = 0
        self.damaged: int | None = None
        try:
            super().__init__(file)
        except OSError as error:
            raise DamageError("unreadable", reason(error), size or 0) from None
        self.size = os.fstat(self.fileno()).st_size if size is None else size

    def readinto(self, buffer: Any) -> int:
        place = self.place = self.tell()
        most = len(buffer) if self.damaged is None else max(self.damaged - place, 1)
        wanted = min(len(buffer), most, max(self.size - place, 0))
        try:
            got = super().readinto(memoryview(buffer)[:wanted]) or 0
        except OSError as error:
            raise DamageError("unreadable", reason(error), self.size - place) from None
        if wanted and not got:
            detail = f"the file became shorter while it was read: {place} bytes of {self.size}"
            raise DamageError("truncated_file", detail, self.size - place)
        return got


class _Content(io.RawIOBase):
    """What a source holds, decompressed; `produced` counts its bytes so far."""

    def __init__(self, source: _Source, kind: str) -> None:
        self._source, self.produced = source, 0
        self._rest, self._chunks = memoryview(b""), _decompress(source, kind)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = memoryview(next(self._chunks, b""))
            self.produced += len(self._rest)
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size

    def close(self) -> None:
        self._source.close()
        super().close()


def _compression(source: _Source, name: str) -> str | None:
    """What a file of a name in small letters is compressed with; None for plain text."""
    head = source.read(_HEAD)
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


def _decompress(source: _Source, kind: str) -> Iterator[bytes]:
    """Decompress; decoders drop what comes just before a damage, so that is read again byte by byte."""
    read, given = _decoder(source, kind), 0
    try:
        while chunk := read(_CHUNK):
            given += len(chunk)
            yield chunk
        return
    except _BROKEN:
        source.damaged = source.place
        source.seek(0)
    again, last, place, damage = _decoder(source, kind), bytearray(), 0, None  # the first would close what it reads
    try:
        while chunk := again(_CHUNK if given > 0 else 1):
            given, place = given - len(chunk), source.tell()
            if given < 0:
                last += chunk
    except _BROKEN as error:
        words, detail, lost = str(error).lower(), reason(error), source.size - place
        if "memory" in words:
            detail += "; compress it with a smaller window, as zstd does without --long"
        if "check" in words or kind in ("bz2", "xz"):  # which do not say what is wrong: it may lie anywhere before
            lost = source.size - source.member
        damage = DamageError("corrupt", detail, lost, complete="unknown frame" in words and place > 0)
        if "truncated" in words:
            damage = DamageError("truncated_file", detail, None)
    if last:
        yield bytes(last)
    if damage is not None:
        raise damage


def _decoder(source: _Source, kind: str) -> Callable[[int], bytes]:
    """What gives the next bytes of a source; at most so many, where the decoder can be told."""
    if kind in _ARROW_CODECS:
        stream = pa.CompressedInputStream(pa.PythonFile(source, "r"), _ARROW_CODECS[kind])
        return stream.read
    members = _members(source, kind)
    return lambda _: next(members, b"")


def _members(source: _Source, kind: str) -> Iterator[bytes]:
    """Decompress the members of a file, one or more, with zeros after each."""
    magic, rest = next(magic for magic, name in _MAGIC.items() if name == kind), source.read(_CHUNK)
    while rest:
        source.member, decoder = source.tell() - len(rest), _DECODERS[kind]()
        while not decoder.eof:
            if not rest:
                whole = _lacks_trailer(decoder)
                detail = "the compressed data ends before its end" + (", in its checksum" if whole else "")
                raise DamageError("truncated_file", detail, 0 if whole else None, complete=whole)
            if chunk := decoder.decompress(rest):
                yield chunk
            rest = decoder.unused_data if decoder.eof else source.read(_CHUNK)
        while not (rest := rest.lstrip(b"\0")) and (rest := source.read(_CHUNK)):
            pass
        if len(rest) < len(magic):
            rest += source.read(len(magic))
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
