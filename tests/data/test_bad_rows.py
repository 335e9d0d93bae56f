"""Rows that cannot be used are skipped, counted exactly by cause and file, and too many of them end the run."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mega_scale.data import DataConfig, Loader, load_datasets, load_tokenizer
from mega_scale.data.prepare import Preparation, run
from mega_scale.data.readers import BadRow, FileSource, TextColumn
from mega_scale.data.sources import Tally, load_documents
from mega_scale.data.tokens import read_manifest

ROWS = 1000
LONGEST = 2000
GOOD = [f"row {i}: ünïcode 😀 {'x' * (i % 90)}" for i in range(ROWS)]
BAD_LINES = {
    "not_utf8": b'{"text": "\xff\xfe"}',
    "missing_column": b'{"body": "text"}',
    "not_text": b'{"text": 5}',
    "empty": b'{"text": ""}',
    "too_long": b'{"text": "' + b"y" * 40_000 + b'"}',
    "broken_json": b'{"text": "half',
}


def line_of(text: str) -> bytes:
    return json.dumps({"text": text, "number": 1}).encode()


def write_jsonl(path: Path, bad: dict[int, bytes]) -> list[str]:
    """Write 1,000 rows, some of them bad; the good ones."""
    path.write_bytes(b"\n".join(bad.get(i, line_of(text)) for i, text in enumerate(GOOD)) + b"\n")
    return [text for i, text in enumerate(GOOD) if i not in bad]


def config_of(path: Path, source: str = "json", **keys) -> DataConfig:
    keys = {"validation_fraction": 0.0, "max_document_bytes": LONGEST, "sequence_length": 64} | keys
    return DataConfig(source, [str(path)], cache_dir=str(path.parent / "cache"), **keys)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("cause", BAD_LINES)
def test_one_percent_of_each_kind_is_skipped_and_counted(cause, streaming, tmp_path):
    path = tmp_path / "a.jsonl"
    good = write_jsonl(path, dict.fromkeys(range(50, ROWS, 100), BAD_LINES[cause]))
    documents = load_documents(config_of(path, streaming=streaming))
    assert list(documents) == good and len(good) == ROWS - 10
    assert documents.tally.to_json()["bad"] == {str(path): {cause: 10}}
    assert documents.tally.rows == ROWS
    assert documents.tally.last.startswith(f"{path}, line 951: ")
    # One more is one too many, and is named.
    write_jsonl(path, dict.fromkeys([*range(50, ROWS, 100), 960], BAD_LINES[cause]))
    with pytest.raises(ValueError, match=rf"11 of \d+ rows .*11 {cause}.*data.max_bad_share=0.01.*a.jsonl, line 961"):
        list(load_documents(config_of(path, streaming=streaming)))
    assert len(list(load_documents(config_of(path, max_bad_share=0.011)))) == ROWS - 11


@pytest.mark.parametrize("size", [500, 7_000, 10**9])
def test_pieces_of_a_file_have_every_line_once_and_count_lines_from_its_start(size, tmp_path):
    path = tmp_path / "a.jsonl"
    bad = {(i * 37 + 3) % ROWS: content for i, content in enumerate([*BAD_LINES.values()] * 3)}
    good = write_jsonl(path, bad)
    source = FileSource([str(path)], "json", TextColumn("text", LONGEST))
    pieces = source.ranges(size)
    assert len(pieces) == -(-path.stat().st_size // size)
    rows = [row for piece in pieces for row in source.read(piece)]
    assert [row for row in rows if isinstance(row, str)] == good
    assert [row.line for row in rows if isinstance(row, BadRow)] == sorted(i + 1 for i in bad)


@pytest.mark.parametrize("kind", ["file", "stream", "parquet"])
def test_columns_of_arrow_and_parquet_have_bad_rows_too(kind, tmp_path):
    values = [text.encode() for text in GOOD]
    for i, bad in ((3, b"\xff"), (500, b""), (700, None), (999, b"y" * (LONGEST + 1))):
        values[i] = bad
    # A column of bytes becomes one of text without a look at them, as a careless writer would.
    table = pa.table({"text": pa.array(values).view(pa.string()), "number": list(range(ROWS))})
    path = tmp_path / "a"
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=300)
    else:
        new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=300)
    source = "parquet" if kind == "parquet" else "arrow"
    documents = load_documents(config_of(path, source))
    assert list(documents) == [text for i, text in enumerate(GOOD) if i not in (3, 500, 700, 999)]
    assert documents.tally.to_json()["bad"] == {str(path): {"empty": 2, "not_utf8": 1, "too_long": 1}}
    numbers = FileSource([str(path)], source, TextColumn("number", LONGEST))
    pieces = numbers.ranges(3000)
    assert len(pieces) == (1 if kind == "stream" else 4)
    rows = [row for piece in pieces for row in numbers.read(piece)]
    assert [row.line for row in rows] == list(range(1, ROWS + 1)) and {row.cause for row in rows} == {"not_text"}
    missing = load_documents(config_of(path, source, text_column="body", max_bad_share=1.0))
    assert list(missing) == [] and missing.tally.by_cause() == {"missing_column": ROWS}
    assert "text, number" in missing.tally.last


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.gz", "a.jsonl.zst"])
def test_file_of_something_else_is_one_bad_row(name, tmp_path):
    (tmp_path / name).write_bytes(b"no such file " * 9)
    source = {"parquet": "parquet", "arrow": "arrow"}.get(name.partition(".")[2], "json")
    documents = load_documents(config_of(tmp_path / name, source, max_bad_share=1.0))
    assert list(documents) == [] and documents.tally.rows == 1


def test_text_files(tmp_path):
    contents = {"0.txt": b"good\r\nline\rend", "1.txt": b"bad\nline \xff", "2.txt": b"", "3.txt": b"y" * (LONGEST + 1)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "4.txt.gz").write_bytes(gzip.compress("ünïcode".encode()))
    documents = load_documents(config_of(tmp_path / "*.txt*", "text", max_bad_share=0.6))
    assert list(documents) == ["good\nline\nend", "ünïcode"]
    causes = {Path(file).name: causes for file, causes in documents.tally.bad.items()}
    assert causes == {"1.txt": {"not_utf8": 1}, "2.txt": {"empty": 1}, "3.txt": {"too_long": 1}}


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "\\ud800"}\n[1, 2]\n{"text": "good"}\n')
    documents = load_documents(config_of(path, max_bad_share=0.9))
    assert list(documents) == ["good"] and documents.tally.by_cause() == {"broken_json": 1, "not_utf8": 1}


def test_counts_reach_the_manifest_and_the_report(tmp_path):
    path = tmp_path / "a.jsonl"
    bad = dict(zip(range(100, 700, 100), BAD_LINES.values(), strict=True))
    write_jsonl(path, bad)
    config = config_of(path)
    tokenizer = load_tokenizer("byte")
    expected = dict.fromkeys(sorted(BAD_LINES), 1)
    preparation = Preparation(tmp_path / "made", config, tokenizer, shard_bytes=20_000)
    assert len(list(run(preparation, 2))) == len(preparation.shards) > 3
    preparation.finish()
    assert read_manifest(tmp_path / "made").tally.to_json()["bad"] == {str(path): expected}
    prepared = DataConfig("prepared", [str(tmp_path / "made")], validation_fraction=0.0, sequence_length=64)
    for settings in (config, prepared):
        train, _ = load_datasets(settings, tokenizer)
        assert train.tally.lines() == [f"left out of {path}: " + ", ".join(f"1 {cause}" for cause in expected)]
        report = Loader(train, global_batch_size=4, micro_batch_size=4, rank=0, world_size=1).report(3)
        assert {key: value for key, value in report.items() if "bad" in key} == {
            f"bad_rows/{cause}": 1 for cause in expected
        }
    config.max_bad_share = 0.005
    strict = Preparation(tmp_path / "strict", config, tokenizer, shard_bytes=20_000)
    with pytest.raises(ValueError, match=r"6 of \d+ rows.*a.jsonl, line \d+"):
        list(run(strict, 1))


@pytest.mark.parametrize(("share", "bad", "of"), [(0.29, 29, 100), (0.07, 7, 100), (0.57, 57, 100)])
def test_a_share_that_is_just_allowed_is_allowed(share, bad, of):
    rows, cut = Tally(rows=of - bad), Tally(rows=of, bytes=of)
    rows.add(BadRow("empty", "no text", rows=bad))
    cut.add(BadRow("corrupt", "cut", rows=0, lost=bad))
    for tally in (rows, cut):
        tally.check(share, ended=True)
    rows.rows -= 1
    cut.add(BadRow("corrupt", "cut", rows=0, lost=1))
    for tally in (rows, cut):
        with pytest.raises(ValueError, match="cannot be used"):
            tally.check(share, ended=True)
