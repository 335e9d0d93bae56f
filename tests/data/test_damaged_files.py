"""What could not be read is counted in bytes; everything before a damage is read; unusual files are read, or named."""

import bz2
import gzip
import io
import json
import lzma
import random
import shutil
import subprocess
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import feather

from mega_scale.data import DataConfig, load_datasets, load_tokenizer, load_whole
from mega_scale.data.prepare import Preparation, run
from mega_scale.data.sources import load_corpus, load_documents, open_source
from mega_scale.data.tokenizer import train_bpe
from mega_scale.data.tokens import read_manifest

MARK = b"\xef\xbb\xbf"
DRAW = random.Random(0)
TEXTS = [f"{i} {DRAW.randbytes(60).hex()} ünïcode" for i in range(2000)]


def lines_of(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def zst(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


def lz4(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "lz4") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACK = {"gz": gzip.compress, "zst": zst, "bz2": bz2.compress, "xz": lzma.compress, "lz4": lz4}


def config_of(folder: Path, source: str, **keys) -> DataConfig:
    keys = {"validation_fraction": 0.0, "sequence_length": 16, "path": [str(folder / "*.*")]} | keys
    return DataConfig(source, cache_dir=str(folder / "cache"), **keys)


def read(folder: Path, source: str = "json", **keys):
    """Documents of a folder's files, and what was counted."""
    documents = load_documents(config_of(folder, source, **keys))
    return list(documents), documents.tally


def cut_gz(path: Path, content: list[str]) -> None:
    packed = gzip.compress(lines_of(content), mtime=0)
    path.with_suffix(".jsonl.gz").write_bytes(packed[: len(packed) // 10])


def cut_lines(path: Path, content: list[str]) -> None:
    whole = lines_of(content)
    path.with_suffix(".jsonl").write_bytes(whole[: len(whole) // 10 + 5].rstrip(b'\n}"'))


def without_ends(path: Path, content: list[str]) -> None:
    path.with_suffix(".jsonl").write_bytes(lines_of(content).replace(b"\n", b" "))


def zeros(path: Path, content: list[str]) -> None:
    path.with_suffix(".jsonl.gz").write_bytes(bytes(len(lines_of(content))))


def cut_list(path: Path, content: list[str]) -> None:
    whole = json.dumps([{"text": text} for text in content])
    path.with_suffix(".json").write_text(whole[: len(whole) // 10])


def nothing(path: Path, content: list[str]) -> None:
    path.with_suffix(".jsonl.zst").write_bytes(b"")


def other_encoding(path: Path, content: list[str]) -> None:
    path.with_suffix(".jsonl").write_text(lines_of(content).decode(), encoding="utf-16")


LOSSES = [cut_gz, cut_lines, without_ends, zeros, cut_list, nothing, other_encoding]


@pytest.mark.parametrize("lose", LOSSES, ids=lambda lose: lose.__name__)
def test_one_file_of_three_that_is_lost_is_too_much_however_few_rows_it_seems_to_be(lose, tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.jsonl.gz").write_bytes(gzip.compress(lines_of(TEXTS[1000 * i : 1000 * i + 1000])))
    lose(tmp_path / "2", TEXTS[:1000])
    with pytest.raises(ValueError, match=r"[\d,]+ of [\d,]+ bytes cannot be used .*2\.json.*data.max_bad_share"):
        read(tmp_path)
    found, tally = read(tmp_path, max_bad_share=1.0)
    assert found[:2000] == TEXTS and sum(tally.lost.values()) > tally.bytes // 10
    assert sum(tally.by_cause().values()) == 1


def test_loss_is_counted_alike_by_streams_and_in_prepared_data_of_many_processes(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.jsonl.gz").write_bytes(gzip.compress(lines_of(TEXTS[1000 * i : 1000 * i + 1000])))
    cut_gz(tmp_path / "2", TEXTS[:1000])
    _, tally = read(tmp_path, max_bad_share=1.0)
    tokenizer = load_tokenizer("byte")
    stream, _ = load_datasets(config_of(tmp_path, "json", max_bad_share=1.0, streaming=True, shuffle=False), tokenizer)
    stream.rows(np.array([10**5]))
    assert stream.tally.lost == tally.lost
    with pytest.raises(ValueError, match="bytes cannot be used"):
        load_datasets(config_of(tmp_path, "json", streaming=True, shuffle=False), tokenizer)[0].rows(np.array([10**5]))
    preparation = Preparation(
        tmp_path / "made", config_of(tmp_path, "json", path=[str(tmp_path / "*.gz")]), tokenizer, shard_bytes=50_000
    )
    assert len(preparation.shards) > 1
    with pytest.raises(ValueError, match="bytes cannot be used"):
        list(run(preparation, 2))
    for number in preparation.missing():
        preparation.make(number)
    with pytest.raises(ValueError, match="bytes cannot be used"):
        preparation.finish()
    config = config_of(tmp_path, "json", path=[str(tmp_path / "*.gz")], max_bad_share=1.0)
    Preparation(tmp_path / "made", config, tokenizer, shard_bytes=50_000).finish()
    manifest = read_manifest(tmp_path / "made").tally
    assert (manifest.lost, manifest.bytes) == (tally.lost, tally.bytes)
    assert f"{sum(tally.lost.values()):,} bytes lost" in manifest.lines()[0]
    # Manifests that were written before bytes were counted still load.
    written = json.loads((tmp_path / "made/manifest.json").read_text())
    del written["rows"]["lost"], written["rows"]["bytes"]
    (tmp_path / "made/manifest.json").write_text(json.dumps(written))
    assert read_manifest(tmp_path / "made").tally.bad == tally.bad


@pytest.mark.parametrize("kind", PACK)
def test_unusual_compression_is_read(kind, tmp_path):
    pack, half = PACK[kind], lines_of(TEXTS[:1000])
    rest = lines_of(TEXTS[1000:])
    contents = {
        "members": pack(half) + pack(rest),
        "empty ones among them": pack(b"") + pack(half) + pack(b"") + pack(rest) + pack(b""),
        "named as nothing": pack(half + rest),
    }
    if kind == "gz":
        contents["zeros behind it"] = pack(half) + bytes(100) + pack(rest) + bytes(1000)
    if kind == "zst":
        skipped = b"\x55\x2a\x4d\x18\x05\0\0\0hello"
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:  # its header does not tell the size
            stream.write(half + rest)
        contents["a frame to skip"] = skipped + pack(half) + skipped + pack(rest)
        contents["no size"] = sink.getvalue().to_pybytes()
    for name, content in contents.items():
        for suffix in ("jsonl", f"jsonl.{kind}", "jsonl.gz"):
            path = tmp_path / f"a.{suffix}"
            path.write_bytes(content)
            found, tally = read(tmp_path, path=[str(path)])
            assert found == TEXTS and not tally.bad, (name, suffix)
    (tmp_path / "plain.jsonl.gz").write_bytes(half)
    assert read(tmp_path, path=[str(tmp_path / "plain.jsonl.gz")])[0] == TEXTS[:1000]
    (tmp_path / "none.jsonl").write_bytes(pack(b""))
    assert read(tmp_path, path=[str(tmp_path / "none.jsonl")])[1].rows == 0


def test_what_is_no_compression_that_is_read_is_named(tmp_path):
    for name, content in {"a.jsonl.br": b"xx", "b.jsonl": b"PK\3\4 and more"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"unreadable.*it is a (br|zip) file, which is not read as text: use .zst"):
            read(tmp_path, path=[str(tmp_path / name)])
    (tmp_path / "BZh91.txt").write_text("BZh91 is a text")
    assert read(tmp_path, "text", path=[str(tmp_path / "BZh91.txt")])[0] == ["BZh91 is a text"]
    if shutil.which("zstd"):
        command = ["zstd", "-q", "-c", "--ultra", "--long=31"]
        wide = subprocess.run(command, input=lines_of(TEXTS), capture_output=True, check=True)
        (tmp_path / "wide.jsonl.zst").write_bytes(wide.stdout)
        with pytest.raises(ValueError, match="smaller window"):
            read(tmp_path, path=[str(tmp_path / "wide.jsonl.zst")])


def archive(mode: str) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as tar:
        for name in "ab":
            member = tarfile.TarInfo(f"{name}.jsonl")
            member.size = len(lines_of(TEXTS))
            tar.addfile(member, io.BytesIO(lines_of(TEXTS)))
    return content.getvalue()


def stored_zip() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as packed:
        packed.writestr("a.jsonl", lines_of(TEXTS))
    return content.getvalue()


def as_parquet(write=pq.write_table) -> bytes:
    content = io.BytesIO()
    write(pa.table({"text": TEXTS}), content)
    return content.getvalue()


FOREIGN = {
    "gz in gz": (gzip.compress(gzip.compress(lines_of(TEXTS))), "a gz file within gz: compress it only once"),
    "xz in gz": (gzip.compress(lzma.compress(lines_of(TEXTS))), "a xz file within gz: compress it only once"),
    "gz in zst": (zst(gzip.compress(lines_of(TEXTS))), "a gz file within zst: compress it only once"),
    "bz2 in xz": (lzma.compress(bz2.compress(lines_of(TEXTS))), "a bz2 file within xz: compress it only once"),
    "stored zip in gz": (gzip.compress(stored_zip()), "a zip file within gz: use .zst or .gz alone"),
    "tar": (archive("w"), "a tar file, which is not read as text: unpack it"),
    "tar.gz": (archive("w:gz"), "a tar file within gz: unpack it"),
    "lzma": (lzma.compress(lines_of(TEXTS), format=lzma.FORMAT_ALONE), "a lzma file, which is not read as text"),
    "Z": (b"\x1f\x9d" + bytes(90), "a Z file, which is not read as text: use .zst or .gz"),
    "parquet": (as_parquet(), "a parquet file, which is not read as text: set data.source=parquet"),
    "arrow": (as_parquet(feather.write_feather), "a arrow file, which is not read as text: set data.source=arrow"),
}


@pytest.mark.parametrize("source", ["json", "text"])
@pytest.mark.parametrize("name", FOREIGN)
def test_files_within_files_and_other_formats_are_named(name, source, tmp_path):
    content, named = FOREIGN[name]
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=rf"([\d,]+) of \1 bytes.*1 unreadable.*it is {named}"):
        read(tmp_path, source, path=[str(tmp_path / "a")])


@pytest.mark.parametrize("source", ["parquet", "arrow"])
def test_columnar_files_of_another_format_are_named(source, tmp_path):
    other = as_parquet() if source == "arrow" else as_parquet(feather.write_feather)
    for content, kind in ((gzip.compress(other), "gz"), (other, "parquet" if source == "arrow" else "arrow")):
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(ValueError, match=rf"([\d,]+) of \1 bytes.*1 unreadable.*it is a {kind} file"):
            read(tmp_path, source, path=[str(tmp_path / "a")])


def test_a_column_name_that_no_encoding_has_can_be_printed(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"\\ud800": 1}\n')
    with pytest.raises(ValueError, match=r"only \\ud800") as refusal:
        read(tmp_path)
    str(refusal.value).encode()


def test_a_range_of_a_file_that_is_gone_is_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines_of(TEXTS))
    source = open_source(config_of(tmp_path, "json"))
    *_, last = source.ranges(10_000)
    (tmp_path / "a.jsonl").unlink()
    [row] = source.read(last)
    assert (row.cause, row.lost) == ("unreadable", last.size)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gz", "zst", "xz"])
@pytest.mark.parametrize("damage", ["cut", "flip", "garbage"])
def test_every_good_row_before_a_damage_is_read(kind, damage, tmp_path):
    packed = bytearray(PACK[kind](lines_of(TEXTS)))
    if damage == "cut":
        del packed[-3000:]
    elif damage == "flip":
        packed[-3000:] = packed[-3000:][::-1]
    else:
        packed += b"garbage"
    path = tmp_path / f"a.jsonl.{kind}"
    path.write_bytes(packed)
    found, tally = read(tmp_path, path=[str(path)], max_bad_share=1.0)
    if kind == "zst":  # as much as the decompressor itself makes of it, a byte at a time
        stream, content = pa.CompressedInputStream(pa.BufferReader(bytes(packed)), "zstd"), b""
        try:
            while byte := stream.read(1):
                content += byte
        except OSError:
            pass
    else:
        decoder, content = zlib.decompressobj(31) if kind == "gz" else lzma.LZMADecompressor(), b""
        try:
            for i in range(len(packed)):
                content += decoder.decompress(packed[i : i + 1])
        except (zlib.error, lzma.LZMAError, EOFError):
            pass
    lines = set(lines_of(TEXTS).split(b"\n"))
    whole = [line for line in content.split(b"\n")[:-1] if line in lines]
    assert len(found) >= len(whole) > (800 if kind == "zst" else 1900) or damage == "garbage"
    assert found[: len(whole)] == TEXTS[: len(whole)]
    assert sum(tally.by_cause().values()) >= 1
    lost = tally.lost.get(str(path), 0)
    if damage == "garbage":
        assert found == TEXTS and lost <= len("garbage")
    elif damage == "cut":
        assert lost == len(packed)
    else:
        assert 0 < lost <= len(packed)


def test_a_gz_that_lacks_only_its_checksum_has_lost_nothing(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    for missing in (5, 8):
        path.write_bytes(gzip.compress(lines_of(TEXTS))[:-missing])
        found, tally = read(tmp_path)
        assert found == TEXTS and tally.by_cause() == {"truncated_file": 1} and not tally.lost
    path.write_bytes(gzip.compress(b"ein text")[:-8])
    assert read(tmp_path, "text", max_bad_share=0.5)[0] == ["ein text"]
    content = bytearray(gzip.compress(lines_of(TEXTS)))
    content[-6] ^= 1  # of the checksum: whatever stands before may be wrong
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"([\d,]+) of \1 bytes.*data check"):
        read(tmp_path)


def test_rows_of_a_json_list_before_its_damage_are_read(tmp_path):
    rows = [json.dumps({"text": text}) for text in TEXTS[:50]]
    contents = {
        "cut": "[" + ",\n".join(rows)[:-20],
        "broken": "[" + ", ".join([*rows[:30], "{broken}", *rows[31:]]) + "]",
        "joined": "[" + ",".join(rows[:20]) + "] [" + ",".join(rows[20:]) + "]",
    }
    for name, (content, count) in zip(contents, zip(contents.values(), (49, 30, 20), strict=True), strict=True):
        (tmp_path / "a.json").write_text(content)
        found, tally = read(tmp_path, max_bad_share=1.0)
        assert found == TEXTS[:count], name
        assert 0.3 < tally.lost[str(tmp_path / "a.json")] / len(content.encode()) <= 1, name


def test_a_file_that_cannot_be_opened_or_became_shorter_is_counted_and_one_that_grows_is_read_to_its_old_end(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.jsonl").write_bytes(lines_of(TEXTS[500 * i : 500 * i + 500]))
    documents = load_documents(config_of(tmp_path, "json", max_bad_share=1.0))
    sizes = [(tmp_path / f"{i}.jsonl").stat().st_size for i in range(4)]
    (tmp_path / "0.jsonl").unlink()
    (tmp_path / "1.jsonl").write_bytes(lines_of(TEXTS[500:600]))
    with (tmp_path / "2.jsonl").open("ab") as file:
        file.write(b'{"text": "appended"}\n')
    (tmp_path / "3.jsonl").unlink()
    (tmp_path / "3.jsonl").mkdir()
    assert list(documents) == TEXTS[500:600] + TEXTS[1000:1500]
    assert documents.tally.by_cause() == {"truncated_file": 1, "unreadable": 2}
    lost = [documents.tally.lost.get(str(tmp_path / f"{i}.jsonl"), 0) for i in range(4)]
    assert lost == [sizes[0], sizes[1] - len(lines_of(TEXTS[500:600])), 0, sizes[3]]
    assert "Is a directory" in documents.tally.last
    for source in ("text", "parquet", "arrow"):
        gone = load_documents(config_of(tmp_path, source, path=[str(tmp_path / "2.jsonl")]))
        (tmp_path / "2.jsonl").rename(tmp_path / "elsewhere")
        with pytest.raises(ValueError, match=r"bytes cannot be used|rows cannot be used.*No such file"):
            list(gone)
        (tmp_path / "elsewhere").rename(tmp_path / "2.jsonl")


def test_globs_name_folders_and_links_to_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines_of(TEXTS))
    (tmp_path / "b.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"b.jsonl is a folder"):
        config_of(tmp_path, "json", path=[str(tmp_path / "*.jsonl")]).validate()
    (tmp_path / "b.jsonl").rmdir()
    (tmp_path / "c.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"c.jsonl is a link to nothing"):
        config_of(tmp_path, "json", path=[str(tmp_path / "*.jsonl")]).validate()


def test_text_that_changes_between_hashing_and_tokenising_is_not_stored(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before " * 10)
    documents = load_documents(config_of(tmp_path, "text"))
    digest = documents.digest

    def then_change() -> str:
        found = digest()
        path.write_text("after it " * 8)
        return found

    documents.digest = then_change  # type: ignore[method-assign]
    from mega_scale.data.tokens import tokenise  # noqa: PLC0415

    with pytest.raises(ValueError, match=r"changed while it was read|became shorter"):
        tokenise(documents, load_tokenizer("byte"), DataConfig(cache_dir=str(tmp_path / "cache")), "name")


@pytest.mark.parametrize("kind", ["", "gz", "zst"])
@pytest.mark.parametrize("source", ["lines", "list", "joined", "text"])
def test_a_byte_order_mark_belongs_to_no_document(source, kind, tmp_path):
    pack = PACK.get(kind, bytes)
    texts = TEXTS[:20]
    if source == "text":
        parts = [MARK + texts[0].encode()]
        texts = texts[:1]
    elif source == "list":
        parts = [MARK + json.dumps([{"text": text} for text in texts]).encode()]
    else:
        parts = [MARK + lines_of(texts[:10]).replace(b"\n", b"\r\n"), (MARK if source == "joined" else b"")]
        parts[1] += lines_of(texts[10:])
    path = tmp_path / ("a.txt" if source == "text" else "a.jsonl")
    path = path.with_name(f"{path.name}.{kind}") if kind else path
    path.write_bytes(b"".join(pack(part) for part in parts))
    keys = {"source": "text" if source == "text" else "json", "path": [str(path)]}
    found, tally = read(tmp_path, **keys)
    assert found == texts and not tally.bad
    separate = config_of(tmp_path, **keys, validation_path=[str(path)])
    assert list(load_corpus(separate).validation or []) == texts
    assert load_whole(config_of(tmp_path, **keys), load_tokenizer("byte")).bytes == sum(len(t.encode()) for t in texts)
    assert not any("ï»¿" in token for token in train_bpe(load_documents(separate), 259 + 40).get_vocab())


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("source", ["text", "json"])
def test_other_encodings_are_named(source, encoding, tmp_path):
    content = "\ufeff" * (encoding == "utf-16-be") + (TEXTS[0] if source == "text" else lines_of(TEXTS[:9]).decode())
    (tmp_path / "a.txt").write_bytes(content.encode(encoding))
    with pytest.raises(ValueError, match=rf"a.txt, line 1: the file is {encoding[:6].upper()} by"):
        read(tmp_path, source)
    (tmp_path / "a.txt").write_bytes("no mark, latin letters".encode("utf-16-le"))
    with pytest.raises(ValueError, match=r"NUL bytes" if source == "text" else "not JSON"):
        read(tmp_path, source)


def write_table(path: Path, source: str, table: pa.Table) -> None:
    if source == "parquet":
        pq.write_table(table, path, row_group_size=50)
        return
    new = pa.ipc.new_stream if source == "stream" else pa.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=50)


@pytest.mark.parametrize("source", ["parquet", "file", "stream"])
def test_columns_are_found_or_named(source, tmp_path):
    path = tmp_path / "a.x"
    kind = "parquet" if source == "parquet" else "arrow"
    texts = pa.array(TEXTS[:120])
    twice = pa.Table.from_arrays([texts, texts, pa.array(range(120))], names=["text", "text", "number"])
    write_table(path, source, twice)
    with pytest.raises(
        ValueError, match=r"missing_column.*2 columns have the name data.text_column='text', of text, text"
    ):
        read(tmp_path, kind)
    other = pa.Table.from_arrays([texts, texts.slice(0), pa.array(range(120))], names=["number", "body", "number"])
    write_table(path, source, other)
    assert read(tmp_path, kind, text_column="body")[0] == TEXTS[:120]
    with pytest.raises(ValueError, match=r"no column data.text_column='Body', only number, body, number"):
        read(tmp_path, kind, text_column="Body")
    nested = pa.table({"a": pa.array([{"b": {"c": text}, "n": 1} for text in TEXTS[:120]]), "a.dot": texts})
    write_table(path, source, nested)
    for column in ("a.b.c", "a.dot"):
        assert read(tmp_path, kind, text_column=column)[0] == TEXTS[:120], column
    for column in ("a.b.d", "a.b.c.d", "b"):
        with pytest.raises(ValueError, match=rf"no column data.text_column='{column}', only a, a.dot"):
            read(tmp_path, kind, text_column=column)
    with pytest.raises(ValueError, match=r"data.text_column='a' holds dict, not text"):
        read(tmp_path, kind, text_column="a")


@pytest.mark.parametrize("source", ["parquet", "file", "stream"])
@pytest.mark.parametrize(
    "cast",
    [pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
def test_text_columns_of_every_type_are_read(source, cast, tmp_path):
    texts = [*TEXTS[:60], None, *TEXTS[60:100]]
    table = pa.table({"text": pa.array(texts).cast(pa.string()).cast(cast), "n": list(range(101))})
    write_table(tmp_path / "a.x", source, table)
    found, tally = read(tmp_path, "parquet" if source == "parquet" else "arrow", max_bad_share=0.1)
    assert found == TEXTS[:100] and tally.by_cause() == {"empty": 1}


@pytest.mark.parametrize("source", ["parquet", "file", "stream"])
def test_lists_of_text_and_columns_of_nothing_are_no_text(source, tmp_path):
    rows = pa.table({"text": pa.array([[text] for text in TEXTS[:60]]), "none": pa.nulls(60)})
    write_table(tmp_path / "a.x", source, rows)
    for column, cause in (("text", "not_text"), ("none", "empty")):
        found, tally = read(
            tmp_path, "parquet" if source == "parquet" else "arrow", text_column=column, max_bad_share=1.0
        )
        assert not found and tally.by_cause() == {cause: 60}


def test_nested_columns_of_json(tmp_path):
    rows = [{"a": {"b": TEXTS[0]}}, {"a.b": TEXTS[1]}, {"a": {"c": 1}}, {"a": "no object"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found, tally = read(tmp_path, text_column="a.b", max_bad_share=0.9)
    assert found == TEXTS[:2] and tally.by_cause() == {"missing_column": 2}


def test_rows_of_a_parquet_group_before_its_corrupt_page_are_read(tmp_path):
    settings = {"compression": "none", "use_dictionary": False, "write_page_checksum": True, "data_page_size": 2000}
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=1000, write_batch_size=10, **settings)
    content = bytearray(path.read_bytes())
    bad = next(text for text in TEXTS[480:] if content.count(text.encode()) == 1)  # which no statistics repeat
    content[content.index(bad.encode())] ^= 1
    path.write_bytes(content)
    found, tally = read(tmp_path, "parquet", max_bad_share=0.9)
    first = 1000 - tally.by_cause()["corrupt"]
    assert 400 < first <= TEXTS.index(bad) and found == TEXTS[:first] + TEXTS[1000:]
    assert tally.rows == 2000 and f"line {first + 1}: " in tally.last
    assert tally.lost[str(path)] == path.stat().st_size * (1000 - first) // 2000
    path.write_bytes(content[: len(content) // 10])
    with pytest.raises(ValueError, match=r"([\d,]+) of \1 bytes.*1 truncated_file"):
        read(tmp_path, "parquet")


def test_arrow_files_keep_the_batches_around_a_corrupt_one_and_before_a_cut(tmp_path):
    path = tmp_path / "a.arrow"
    write_table(path, "file", pa.table({"text": TEXTS[:500]}))
    whole = path.read_bytes()
    with pa.memory_map(str(path)) as mapped:
        count = pa.ipc.open_file(mapped).num_record_batches
    content = bytearray(whole)
    place = content.rindex(b"\xff\xff\xff\xff", 0, content.index(TEXTS[101].encode()))
    content[place : place + 8] = b"\xff\xff\xff\xff\xff\xff\xff\x7f"  # the message's length
    path.write_bytes(content)
    found, tally = read(tmp_path, "arrow", max_bad_share=0.5)
    assert found == TEXTS[:100] + TEXTS[150:500] and tally.by_cause() == {"corrupt": 1}
    assert tally.lost[str(path)] == len(whole) // count
    for kind in ("file", "stream"):
        write_table(path, kind, pa.table({"text": TEXTS[:500]}))
        packed = path.read_bytes()
        path.write_bytes(packed[: packed.index(TEXTS[330].encode())])
        found, tally = read(tmp_path, "arrow", max_bad_share=1.0)
        assert found == TEXTS[:300] and tally.by_cause() == {"truncated_file": 1}
        assert tally.lost[str(path)] == path.stat().st_size


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("bad", [rb'{"text": "\ud800"}', b'{"te', b'{"text": "\xff"}', b'{"text": [1]}'])
def test_one_bad_row_of_a_hub_data_set_costs_one_row(bad, streaming, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train-0.jsonl").write_bytes(lines_of(TEXTS[:200]) + bad + b"\n" + lines_of(TEXTS[200:400]))
    keys = {"hub_name": str(folder), "path": None, "streaming": streaming}
    found, tally = read(tmp_path, "hub", **keys)
    assert found == TEXTS[:400] and tally.rows == 401
    assert f"{folder / 'train-0.jsonl'}, line 201: " in tally.last
    with pytest.raises(ValueError, match=r"1 of 401 rows.*line 201: "):
        read(tmp_path, "hub", **keys, max_bad_share=0.001)
    with pytest.raises(ValueError, match=r"data.hub_split='nowhere'.*cannot be loaded: \w+: "):
        read(tmp_path, "hub", **keys, hub_split="nowhere")
