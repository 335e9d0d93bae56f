"""Real runs on bad rows, on prepared data and on mixtures: what they report, and where they stop."""

import json

import pytest
from launching import LAUNCHERS, TINY, metrics, pretrain, start

pytestmark = [pytest.mark.launch, pytest.mark.slow]

BAD = {
    "not_utf8": b'{"text": "\xff"}', "missing_column": b'{"body": "text"}', "not_text": b'{"text": [1]}',
    "empty": b'{"text": ""}', "too_long": b'{"text": "' + b"y" * 5000 + b'"}', "broken_json": b'{"text": "half',
}  # fmt: skip


@pytest.fixture(scope="module")
def bad_file(tmp_path_factory):
    """1,000 rows, ten of them bad for each cause."""
    path = tmp_path_factory.mktemp("bad") / "text.jsonl"
    bad = {100 * i + k: content for k, content in enumerate(BAD.values()) for i in range(10)}
    rows = [bad.get(i, json.dumps({"text": f"row {i} {'some words ' * 5}"}).encode()) for i in range(1000)]
    path.write_bytes(b"\n".join(rows) + b"\n")
    return path


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_with_bad_rows_finishes_and_counts_them(streaming, bad_file, tmp_path):
    keys = ["data.source=json", f"data.path={bad_file}", "data.max_document_bytes=600", "data.max_bad_share=0.06"]
    keys += [f"data.streaming={str(streaming).lower()}", "data.validation_fraction=0", "data.workers=1"]
    steps = 120 if streaming else 3  # a stream has been read to its end by then
    output = pretrain("forked", tmp_path, *keys, f"train.steps={steps}", "parallel.engine=fsdp")
    last = metrics(tmp_path)[steps]
    assert {name: last[f"bad_rows/{name}"] for name in BAD} == dict.fromkeys(BAD, 10)
    assert "bad rows 60" in output and "loader_wait" in last and last["tokens/text"] > 0
    if not streaming:
        assert f"left out of {bad_file}: " in output
    code, output = start(
        LAUNCHERS["forked"], [*TINY, f"run_dir={tmp_path}", *keys, "data.max_bad_share=0.05", "--overwrite"]
    )
    assert code != 0 and f"{bad_file}, line 803: " in output and "data.max_bad_share=0.05" in output


def test_prepared_mixture_trains_resumes_and_is_reported_by_source(text_file, bad_file, tmp_path):
    for name, file in (("code", text_file), ("rows", bad_file)):
        keys = ["data.source=json", f"data.path={file}", "data.validation_fraction=0.2", "data.max_bad_share=0.1"]
        code, output = start(["forked", "launch/prepare.py"], [str(tmp_path / name), "--processes", "1", *keys])
        assert code == 0 and json.loads(output.splitlines()[-2 if name == "rows" else -1])["train"]["tokens"], output
    code, output = start(["forked", "launch/prepare.py"], [str(tmp_path / "code"), "--verify"])
    assert code == 0 and "train-00000 is good" in output
    mixture = [
        word
        for name, weight in (("code", 3), ("rows", 1))
        for word in (
            f"data.mixture.{name}.source=prepared",
            f"data.mixture.{name}.path={tmp_path / name}",
            f"data.mixture.{name}.weight={weight}",
        )
    ]
    keys = [*mixture, "parallel.engine=fsdp", "train.steps=6", "checkpoint.every=3", "train.eval_batches=1"]
    pretrain("forked", tmp_path / "run", *keys)
    whole = metrics(tmp_path / "run")
    assert whole[6]["tokens/code"] == pytest.approx(3 * whole[6]["tokens/rows"], rel=0.1)
    resumed = f"--resume={tmp_path / 'run/checkpoints/step-00000003'}"
    pretrain("forked", tmp_path / "again", *keys, resumed)
    for step in (4, 5, 6):
        assert metrics(tmp_path / "again")[step]["loss"] == whole[step]["loss"]
