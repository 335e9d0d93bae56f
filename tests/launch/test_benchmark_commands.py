"""The benchmarks' commands measure what they say, on tiny models, and refuse to report what is wrong."""

import json
from contextlib import nullcontext

import pytest
import torch

from launch.benchmark import data, decode, harness, memory, step
from launch.benchmark.__main__ import main
from mega_scale.data.tokens import open_part, read_manifest

STEP = ["--hidden", "32", "--layers", "1", "--shared", "8", "--values", "24", "--states", "2", "--chunk", "16"]
STEP += ["--vocabulary", "64", "--repeats", "1"]
DECODE = ["--chunk", "8", "--hidden", "64", "--layers", "3", "--shared", "6", "--values", "10", "--states", "4"]
DECODE += ["--contexts", "64", "32", "--peer-context", "32", "--repeats", "2", "--activation", "laplace"]
MEMORY = ["--hidden", "8", "--layers", "1", "--shared", "4", "--values", "8", "--states", "2", "--vocabulary", "300"]
MEMORY += ["--chunk", "64"]


@pytest.fixture
def run(tmp_path, capsys):
    """Runs a command in this process; returns its figures and what it printed."""

    def run(*arguments):
        file = tmp_path / "out.json"
        main([*arguments, "--json", str(file)])
        return json.loads(file.read_text()), capsys.readouterr().out

    return run


def test_ema_compares_our_forms(run):
    sizes = ["--batch", "1", "--length", "65", "--hidden", "4", "--states", "3", "--repeats", "3", "--warmup", "1"]
    report, output = run("ema", *sizes)
    complex_forms = ["native, complex", "blocked, complex"]
    assert [row["name"] for row in report["rows"]] == ["native", "blocked", "fft", *complex_forms]
    for row in report["rows"]:
        assert len(row["times"]) == 3 and row["error"] < 1e-4 and row["extra_memory"] >= 0
    assert "| native |" in output


@pytest.mark.slow
def test_step_times_ours_beside_a_peer(run):
    report, output = run("step", *STEP, "--lengths", "32", "--megalodon")
    assert [row["kind"] for row in report["rows"]] == ["ours", step.MEGALODON, "llama"]
    assert all(row["median"] > 0 and row["megabytes"] > 0 for row in report["rows"])
    ours, megalodon, llama = report["rows"]
    # As many parameters as ours, so that the comparison is fair.
    for other in (megalodon, llama):
        assert other["parameters"] == pytest.approx(ours["parameters"], rel=0.05)
    assert megalodon["shares"]["torch.mm"] > 0 and megalodon["name"] in output
    assert ours["shares"]["torch.mm"] > 0 and "shares" not in llama
    assert f"transformers {llama['transformers']} Llama, sdpa" in output
    assert report["exponents"] == {}  # one length


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"segment": 32}, {"kind": "ours compiled"}, {"kind": "ours bf16"}])
def test_steps_in_segments_and_compiled_ones_are_the_same_step(tmp_path, change):
    sizes = {"vocabulary": 64, "hidden": 32, "layers": 2, "shared": 8, "values": 24, "states": 2, "chunk": 16}
    weights = str(tmp_path / "weights.safetensors")
    kind, segment = change.get("kind", "ours"), change.get("segment", 0)
    whole = step.our_training("ours", {**sizes, "segment": 0}, 64, weights).check(64)
    other = step.our_training(kind, {**sizes, "segment": segment}, 64, weights).check(64)
    tolerance = 0.02 if kind == "ours bf16" else 1e-5
    assert all(other[name] == pytest.approx(whole[name], rel=tolerance) for name in ("loss", "norm"))


@pytest.mark.slow
def test_decode_compares_contexts_and_a_llama(run, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)  # which takes a minute
    report, output = run("decode", *DECODE, "--megalodon", "--static")
    assert [row["name"] for row in report["rows"] if "static" in row["name"]] == [
        "mega_scale, static cache at 32", "mega_scale, Megalodon, static cache at 32",
    ]  # fmt: skip
    assert "Mega: " in output and "operators a token" in output
    report["rows"] = [row for row in report["rows"] if "static" not in row["name"]]
    names = [row["name"] for row in report["rows"]]
    assert names[:2] == ["mega_scale at 32", "mega_scale at 64"] and names[4].startswith("Llama, sdpa (transformers 5")
    assert names[2:4] == ["mega_scale, Megalodon at 32", "mega_scale, Megalodon at 64"]
    assert all(len(row["times"]) == 2 and row["error"] < 1e-4 for row in report["rows"])
    assert report["cache_bytes"] == 3 * (4 * 64 * 4 + 4 * 8 * (6 + 10))
    assert report["rows"][0]["ratio"] == 1 and report["slowest_over_fastest_context"] >= 1
    for row in report["rows"][2:]:
        assert row["parameters"] == pytest.approx(report["rows"][0]["parameters"], rel=0.05)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("cache_bytes", lambda config, element_size: 1, "bytes after 28 tokens, expected 1"),
        ("_CHECKED", 0, "is not reported"),
    ],
)
def test_decode_refuses_a_cache_that_grows_and_wrong_logits(monkeypatch, name, value, message):
    monkeypatch.setattr(decode, name, value)
    if name == "_CHECKED":
        monkeypatch.setattr(decode.Decoding, "error", lambda self, steps: float("nan"))
        monkeypatch.setattr(harness, "worker", lambda *_, **__: nullcontext(fake_peer))
    with pytest.raises(ValueError, match=message):
        main(["decode", *DECODE])


def fake_peer(method, *_):
    """Stands in for calls of a worker that decodes without an error."""
    return {"parameters": 1, "transformers": "0"} if method == "describe" else 0.0


@pytest.mark.launch
@pytest.mark.slow
def test_memory_of_two_ranks_is_half_of_one_and_they_compute_the_same(run):
    # 3,900 tokens fill 62 chunks but for some padding.
    report, output = run("memory", *MEMORY, "--lengths", "3900", "--sp", "1", "2")
    alone, shared = report["rows"]
    assert shared["error"] < 1e-5
    assert [alone["sp"], alone["tokens"], shared["sp"], shared["tokens"]] == [1, 3900, 2, 31 * 64]
    (one,), two = alone["ranks"], shared["ranks"]
    for rank in two:
        assert rank["norm"] == pytest.approx(one["norm"], rel=1e-5)
        assert one["saved"] / rank["saved"] == pytest.approx(2, rel=0.05)
    # A block keeps more than 16 times its input of 8 channels; logits, 3,900 x 300 numbers, are not kept.
    assert one["growth"] > one["saved"] > 4 * 3900 * 16 * 8
    assert one["saved"] < 4 * 3900 * 300
    assert "| 3,900 | 2 | 1,984 |" in output


@pytest.mark.parametrize("wrong", [{"loss": 5.0001}, {"norm": float("nan")}])
def test_memory_of_what_differs_from_one_process_is_not_reported(capsys, monkeypatch, wrong):
    def measure(args, length, sp):
        needs = {"loss": 5.0, "norm": 1.0, "saved": 1, "before": 1, "growth": 1, "seconds": 1.0}
        return [needs if sp == 1 else needs | wrong] * sp

    monkeypatch.setattr(memory, "measure", measure)
    with pytest.raises(ValueError, match=f"65536 tokens on 2 ranks is not reported: .*{next(iter(wrong))}"):
        main(["memory", "--sp", "2"])
    assert capsys.readouterr().out == ""


def test_memory_is_that_of_the_neediest_rank(run, monkeypatch):
    def measure(args, length, sp):
        one = {"loss": 5.0, "norm": 1.0, "saved": 3, "before": 0, "growth": 9, "seconds": 1.0}
        return [one, one | {"saved": 4, "growth": 2}][:sp]

    monkeypatch.setattr(memory, "measure", measure)
    report, _ = run("memory", "--lengths", "4096", "--sp", "2")
    shared = report["rows"][1]
    assert (shared["saved"], shared["growth"]) == (4, 9)


TINY = """
model: {hidden_size: 32, num_hidden_layers: 2, intermediate_size: 48, nffn_hidden_size: 40, use_chunking: true,
        shared_representation_size: 16, ema_projection_size: 4, chunk_size: 16, dropout_prob: 0.1}
"""


@pytest.mark.launch
@pytest.mark.slow
def test_long_measures_the_memory_of_a_step_and_limits_it(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    recipe = ["long", "--config", str(tmp_path / "tiny.yaml"), "--json", str(tmp_path / "long.json")]
    with pytest.raises(ValueError, match=r"--limit-gb 0\.001 allows no more"):
        main([*recipe, "--length", "100", "--segment", "32", "--limit-gb", "0.001"])
    [found] = json.loads((tmp_path / "long.json").read_text())["rows"]
    assert 0 < found["before"] / 1e9 <= found["peak_gb"] < 4 and found["norm"] > 0
    with pytest.raises(ValueError, match=r"multiple of model\.chunk_size=16"):
        main([*recipe, "--segment", "24"])


@pytest.mark.slow
def test_loader_keeps_its_memory_and_speed_with_large_files(run):
    report, _ = run("loader", "--megabytes", "10", "5000", "--steps", "300")
    small, large = report["rows"]
    assert (small["megabytes"], large["megabytes"]) == (10, 5000)
    assert large["memory"] - small["memory"] < 50 * 2**20
    # In the same run; a loader that searched all documents at each step would be hundreds of times slower.
    assert large["tokens_per_second"] > small["tokens_per_second"] / 10


def test_sparse_data_is_what_prepared_data_is(tmp_path):
    data.write_sparse(tmp_path / "data", 1)
    store = open_part(tmp_path / "data", read_manifest(tmp_path / "data"), "train")
    assert store is not None and (tmp_path / "data/train-00000.tokens").stat().st_size == 10**6


@pytest.mark.slow
def test_prepare_is_compared(run):
    report, _ = run("prepare", "--megabytes", "2", "--shard-mb", "1", "--vocab-size", "300")
    assert report["bytes"] >= 2e6
    assert [len(row["times"]) for row in report["rows"]] == [1, 1]


def test_reset_measures_cost_in_turns(run):
    sizes = ["--batch", "2", "--length", "256", "--chunk", "32", "--hidden", "64", "--document", "20", "90"]
    report, output = run("reset", *sizes, "--repeats", "3", "--warmup", "1")
    assert {row["name"]: len(row["times"]) for row in report["rows"]} == {
        "concat": 3, "reset, 20 tokens": 3, "reset, 90 tokens": 3,
    }  # fmt: skip
    _, short, long = report["rows"]
    assert 0 < long["mixed"] < short["mixed"] <= 1
    assert "cost over concat" in output


def test_documents_have_the_mean_length_asked_for():
    starts = data.documents(8, 4096, 100, seed=0)
    assert starts.shape == (8, 4096) and starts.dtype == torch.bool
    assert 8 * 4096 / int(starts.sum()) == pytest.approx(100, rel=0.15)


_ROW = {"batch": 8, "median_ms": 1000.0, "peak_gb": 40.0, "flops_per_token": 9e9, "parameters": 1_380_000_000}


@pytest.fixture
def mfu(monkeypatch, run):
    """Runs the command with a worker that answers as it is told to, and a GPU of 800 TFLOP/s."""
    monkeypatch.setattr(harness, "gpu_name", lambda command: "a GPU")
    monkeypatch.setattr(step, "matmul_flops", lambda: 8e14)
    monkeypatch.setattr(step, "peak_flops", lambda device, dtype: 1e15)

    def train(*_):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    answers = []
    monkeypatch.setattr(harness, "worker", lambda *_, **__: nullcontext(train))
    arguments = ["mfu", "--peers", "--lengths", "4096", "131072", "--segment", "0", "0", "--recompute", "2", "1"]

    def measure(*given):
        answers[:] = given
        return run(*arguments)

    return measure


def test_mfu_is_model_operations_over_the_peak_and_lengths_without_memory_are_named(mfu):
    report, output = mfu(_ROW, {})
    # 32,768 tokens of 9 GFLOP in a second
    assert report["rows"][0]["mfu"] == pytest.approx(0.294912)
    assert report["rows"][0]["of_ceiling"] == pytest.approx(0.36864)
    assert "| 4,096 | 8 | ours | 1,380,000,000 |" in output and "out of memory" in output


def test_mfu_names_a_contender_that_fails(mfu):
    with pytest.raises(ValueError, match="ours at 131072 tokens ended with exit status 3: why"):
        mfu(_ROW, ValueError("ours at 131072 tokens ended with exit status 3: why"))


def test_mfu_has_as_many_values_as_lengths(monkeypatch):
    monkeypatch.setattr(harness, "gpu_name", lambda command: "a GPU")
    with pytest.raises(ValueError, match="--recompute has 1 values for 2 --lengths"):
        main(["mfu", "--lengths", "4096", "8192", "--recompute", "2"])


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.gpu
@needs_gpu
def test_bandwidth_is_a_share_of_a_copy(run):
    sizes = ["--length", "512", "--hidden", "64", "--dtypes", "fp32", "--impls", "blocked", "--repeats", "2"]
    report, output = run("bandwidth", *sizes)
    [row] = report["rows"]
    assert row["error"] < 1e-4 and row["forward_share"] > 0 and row["backward_share"] > 0
    assert report["copy_bytes_per_s"] > 0 and "| blocked | fp32 |" in output


@pytest.mark.gpu
@needs_gpu
def test_mfu_trains_on_a_gpu(run, tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY.replace("chunk_size", "vocab_size: 300, chunk_size"))
    layout = ["--lengths", "64", "--recompute", "2", "--segment", "0", "--tokens", "128", "--repeats", "1"]
    report, _ = run("mfu", "--config", str(tmp_path / "tiny.yaml"), *layout)
    ours, llama = report["rows"]
    assert ours["batch"] == llama["batch"] == 2 and ours["median_ms"] > 0 < llama["median_ms"]
    assert llama["parameters"] == pytest.approx(ours["parameters"], rel=0.05)
