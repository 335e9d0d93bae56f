"""Real runs that keep documents apart and change their length; real runs on files of every bad kind."""

import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from launching import LAUNCHERS, TINY, metrics, pretrain, start

pytestmark = [pytest.mark.launch, pytest.mark.slow]


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Short documents, several of which share a sequence of 64 tokens, and a few long ones."""
    path, draw = tmp_path_factory.mktemp("documents") / "text.jsonl", random.Random(0)
    sizes = [draw.choice([3, 9, 15, 16, 17, 31, 40, 63, 64, 65, 200]) for _ in range(1500)]
    lines = [json.dumps({"text": "".join(draw.choice("abc de\n") for _ in range(size))}) for size in sizes]
    path.write_text("\n".join(lines))
    return path


PACKED = [
    "data.packing=reset", "data.packing_order=best_fit", "data.length_schedule=[[0, 32], [3, 64]]",
    "train.steps=6", "checkpoint.every=3", "train.eval_every=6", "data.validation_fraction=0.2",
]  # fmt: skip
RUNS = {
    "two forked": ["parallel.engine=fsdp", "parallel.sp=2"],
    "deepspeed": ["parallel.engine=deepspeed", "parallel.tp=2", "model.vocab_size=260", "data.workers=1"],
}


@pytest.mark.parametrize("launcher", RUNS)
def test_documents_kept_apart_at_two_lengths_train_validate_and_resume_as_in_one_process(launcher, documents, tmp_path):
    keys = ["data.source=json", f"data.path={documents}", *PACKED, "model.dropout_prob=0", "model.vocab_size=260"]
    one = ["parallel.engine=fsdp", "train.micro_batch_size=2"]
    output = pretrain("forked", tmp_path / "one", *keys, *one)
    assert "length 32" in output and "length 64" in output and "padding" in output
    pretrain(launcher, tmp_path / "two", *keys, *RUNS[launcher])
    resumed = f"--resume={tmp_path / 'two/checkpoints/step-00000003'}"
    pretrain("two forked", tmp_path / "again", *keys, *RUNS[launcher], resumed)
    expected = metrics(tmp_path / "one")
    for step, row in metrics(tmp_path / "two").items():
        assert row["loss"] == pytest.approx(expected[step]["loss"], rel=1e-5)
        assert row["sequence_length"] == (32 if step <= 3 else 64)
        for name in ("tokens", "padding", "tokens/text"):
            assert row[name] == expected[step][name]
        # Eight sequences of 64 tokens a step, whatever they are cut to; ends of documents have no label.
        assert 0.85 * 512 * step < row["tokens"] < 512 * step
    for step in (4, 5, 6):
        assert metrics(tmp_path / "again")[step]["loss"] == metrics(tmp_path / "two")[step]["loss"]
    validation = [metrics(tmp_path / run, "validation")[6] for run in ("one", "two")]
    assert validation[0]["tokens"] == validation[1]["tokens"] > 0
    assert validation[0]["loss"] == pytest.approx(validation[1]["loss"], rel=1e-5)


@pytest.fixture(scope="module")
def corrupt(tmp_path_factory):
    """Two thousand rows in two files of either kind: one gz file is cut off, one page of 10 rows corrupt."""
    folder, draw = tmp_path_factory.mktemp("corrupt"), random.Random(1)
    texts = [f"row {i} {draw.randbytes(40).hex()}" for i in range(2000)]
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[:1990])))
    packed = gzip.compress(b"".join(lines[1900:]), mtime=0)
    (folder / "b.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    settings = {"compression": "none", "use_dictionary": False, "write_page_checksum": True, "row_group_size": 10}
    pq.write_table(pa.table({"text": texts}), folder / "c.parquet", **settings)
    content = bytearray((folder / "c.parquet").read_bytes())
    content[content.index(texts[1005].encode()) + 9] ^= 1  # not the first or last, which statistics repeat
    (folder / "c.parquet").write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("source", "files", "cause", "count", "named", "share"),
    [
        ("json", "*.jsonl.gz", "truncated_file", 1, "b.jsonl.gz, line ", 0.6),
        ("parquet", "c.parquet", "corrupt", 10, "c.parquet, line 1001: ", 0.01),
    ],
)
def test_a_run_on_a_broken_file_finishes_and_counts_or_stops_and_names_it(
    source, files, cause, count, named, share, corrupt, tmp_path
):
    keys = [f"data.source={source}", f"data.path={corrupt / files}", "data.validation_fraction=0", "train.steps=3"]
    keys += ["parallel.engine=fsdp", "data.packing=reset"]
    output = pretrain("forked", tmp_path, *keys, f"data.max_bad_share={share}")
    assert metrics(tmp_path)[3][f"bad_rows/{cause}"] == count
    assert f"bad rows {count}" in output and f": {count} {cause}" in output
    code, output = start(
        LAUNCHERS["forked"], [*TINY, f"run_dir={tmp_path}", *keys, "data.max_bad_share=0.0001", "--overwrite"]
    )
    assert code != 0 and f"{corrupt}/{named}" in output and "data.max_bad_share=0.0001" in output
