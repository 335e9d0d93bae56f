"""The `decode` sub-command of launch/benchmark.py: what it reports, and what it refuses to time."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--tokens", "100", "--window", "20", "--chunk", "8", "--batch", "2", "--hidden", "12", "--layers", "3"]
TINY += ["--shared", "6", "--values", "10", "--states", "4", "--repeats", "2", "--activation", "laplace"]


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("launched_benchmark_for_decode", ROOT / "launch/benchmark.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ours(benchmark):
    return sys.modules["launch.benchmark_decode"]


@pytest.mark.launch
def test_prints_and_writes_its_figures(tmp_path):
    command = [sys.executable, str(ROOT / "launch/benchmark.py"), "decode", *TINY, "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    expected = 3 * 2 * (4 * 12 * 4 + 4 * 8 * (6 + 10))
    assert report["held"] == [expected, expected] and report["formula"] == expected
    assert report["windows"] == [[8, 27], [80, 99]]
    assert [len(times) for times in report["milliseconds"]] == [16, 16]
    assert report["error"] < 1e-5 and report["checked"] > 30
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert rows[2].startswith("| 8 to 27 |") and rows[3].endswith(f"| {expected} |")
    assert "last window over first" in done.stdout and f"= {expected} bytes" in done.stdout


def measure(benchmark, *changes):
    return sys.modules["launch.benchmark_decode"].measure(benchmark.parser().parse_args(["decode", *TINY, *changes]))


def test_decoding_that_differs_from_the_full_forward_is_not_timed(benchmark, ours, monkeypatch):
    decode = ours.decode

    def forgetful(*arguments):
        decoded = decode(*arguments)
        logits = decoded.logits.clone()
        logits[:, 20:] += 0.01
        return decoded._replace(logits=logits)

    monkeypatch.setattr(ours, "decode", forgetful)
    with pytest.raises(ValueError, match=r"nothing is timed.*at position \d+"):
        measure(benchmark)


def test_a_cache_that_grows_is_refused(benchmark, ours, monkeypatch):
    monkeypatch.setattr(ours, "formula_bytes", lambda config, batch, element_size: 1)
    with pytest.raises(ValueError, match="bytes after 1 tokens, expected 1"):
        measure(benchmark)


def test_windows_must_not_overlap(benchmark):
    with pytest.raises(ValueError, match=r"--tokens 47.*pass --tokens 48"):
        measure(benchmark, "--tokens", "47")
    assert measure(benchmark, "--tokens", "48").windows == [(8, 27), (28, 47)]


def test_decoded_text_is_greedy_and_each_window_starts_where_it_should(benchmark, ours):
    model = ours.build_model(benchmark.parser().parse_args(["decode", *TINY]))
    decoded = ours.decode(model, 2, 50, [8, 30], torch.tensor([49]))
    with torch.no_grad():
        best = model(decoded.tokens, use_cache=False).logits.argmax(-1)
    assert torch.equal(decoded.tokens[:, 1:], best[:, :-1])
    for place, start in zip(decoded.places, (8, 30), strict=True):
        assert place.position == start == place.cache.get_seq_length()
        assert torch.equal(place.token[:, 0], decoded.tokens[:, start])
        reached, _ = ours.time_steps(model, place.copy(), 20)
        assert reached.position == start + 20 and place.cache.get_seq_length() == start
        if start + 20 < 50:
            assert torch.equal(reached.token[:, 0], decoded.tokens[:, start + 20])


@pytest.mark.launch
@pytest.mark.slow
def test_compares_contexts_and_a_llama(tmp_path):
    command = [sys.executable, str(ROOT / "launch/benchmark.py"), "decode", *TINY[4:], "--contexts", "64", "32"]
    command += ["--peer-context", "32", "--hidden", "64", "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    names = [row["name"] for row in report["contenders"]]
    assert names[:2] == ["mega_scale at 32", "mega_scale at 64"] and names[2].startswith("Llama, sdpa (transformers 5")
    assert all(row["error"] < 1e-4 and len(row["ms"]) == 2 for row in report["contenders"])
    assert list(report["times_as_fast_as"]) == names[2:] and report["slowest_over_fastest_context"] >= 1
    assert "times as fast as Llama" in done.stdout and done.stdout.count("mega_scale at") == 2


@pytest.mark.parametrize(
    "changes,message",
    [(["--contexts", "4", "32"], "must exceed 4"), (["--contexts", "64"], "--peer-context 32 is not among")],
)
def test_contexts_that_cannot_be_compared(benchmark, ours, changes, message):
    args = benchmark.parser().parse_args(["decode", *TINY, "--peer-context", "32", *changes])
    with pytest.raises(ValueError, match=message):
        ours.run_decode(args)


def test_a_contender_that_decodes_wrongly_is_not_timed(benchmark, ours, monkeypatch):
    against = sys.modules["launch.decode_against"]
    monkeypatch.setattr(against.OurStep, "error", lambda self: float("nan"))
    args = benchmark.parser().parse_args(["decode", *TINY, "--peer-context", "32", "--contexts", "32"])
    with pytest.raises(ValueError, match="mega_scale at 32 is not timed"):
        ours.run_decode(args)
