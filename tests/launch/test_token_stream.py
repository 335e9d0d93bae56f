"""Three resumes in a row, with other ranks, meshes and engines: the tokens and losses of the uninterrupted run."""

import json
from itertools import pairwise

import pytest
import token_stream
from launching import ROOT, study

pytestmark = [pytest.mark.launch, pytest.mark.slow]


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    code, output = study(ROOT / "tests/support/token_stream.py", [str(folder)], timeout=600)
    assert code == 0, output[-6000:]
    return json.loads((folder / "findings.json").read_text())


def test_the_uninterrupted_run_reads_every_step_once(findings):
    [ids] = findings["whole"]["ids"]
    assert [step for step, _ in ids] == list(range(1, token_stream.STEPS + 1))
    rows = [json.dumps(row) for _, rows in ids for row in rows]
    assert len(rows) == token_stream.STEPS * token_stream.GLOBAL_BATCH == len(set(rows))
    assert all(len(row[0]) == len(row[1]) == token_stream.LENGTH for _, rows in ids for row in rows)


@pytest.mark.parametrize("name", token_stream.RUNS)
def test_three_resumes_in_a_row_read_the_stream_of_the_uninterrupted_run(findings, name):
    whole, run = findings["whole"], findings[name]
    legs = token_stream.RUNS[name]
    begins = run["from_step"]
    assert begins[0] == 0 and len(begins) == len(legs) == 4
    for leg, begin in zip(legs, begins[1:], strict=False):
        assert begin == (leg.cut - 1) // token_stream.EVERY * token_stream.EVERY
    # What counts of a leg is what lies before the checkpoint from which the next one went on.
    stream = []
    for (begin, end), ids in zip(pairwise([*begins, token_stream.STEPS]), run["ids"], strict=True):
        assert [step for step, _ in ids] == list(range(begin + 1, begin + 1 + len(ids)))
        stream += [entry for entry in ids if entry[0] <= end]
    assert stream == whole["ids"][0]
    # What a leg read beyond it was lost with the leg, and is read again as it was.
    lost = [entry for ids in run["ids"] for entry in ids]
    assert len(lost) > token_stream.STEPS and all(entry == stream[entry[0] - 1] for entry in lost)


@pytest.mark.parametrize("name", token_stream.RUNS)
def test_losses_are_those_of_the_uninterrupted_run(findings, name):
    want, got = findings["whole"]["losses"], findings[name]["losses"]
    assert list(got) == list(want) and len(got) == token_stream.STEPS
    for step, loss in want.items():
        assert got[step] == pytest.approx(loss, rel=1e-6), step
