"""`launch/benchmark roofline`: steps of whole models on GPUs that are not there."""

import gzip
import json

import pytest

from launch.benchmark import roofline
from launch.benchmark.__main__ import main
from mega_scale.config import RunConfig
from mega_scale.parallel.devices import Device
from mega_scale.parallel.roofline import PARTS, fused, table, total
from mega_scale.settings import resolve

# Of one block at 32,768 tokens of 2,048 channels, both passes, without recomputation: launches, eager and compiled;
# bytes, compiled; and bytes a token that are kept for the backward pass.
BOUNDS = {"megalodon-1.3b": (500, 180, 40e9, 130e3), "mega-1.3b": (500, 180, 40e9, 130e3)}


@pytest.mark.slow
@pytest.mark.parametrize(("config", "drops"), [("megalodon-1.3b", 0), ("mega-1.3b", 0), ("mega-1.3b", 0.1)])
def test_a_block_stays_below_its_bounds(config, drops):
    """What a third block adds to two, with the forms of an H100; no more where attention drops weights."""
    gpu = Device.named("h100")

    def followed(compiles):
        keys = {"parallel.activation_checkpoint": "0", "train.global_batch_size": "1", "train.compile": compiles}
        keys["model.attention_probs_dropout_prob"] = str(drops)
        run = resolve(RunConfig, [f"configs/{config}.yaml"], [*keys.items()])[0]
        return [roofline.follow(run, gpu.capability, 1, layers) for layers in (2, 3)]

    def added(found, form):
        two, three = (total(table(form(meter.events), gpu)) for meter, _ in found)
        return three + two.times(-1)

    eager, compiled, size, kept = BOUNDS[config]
    graphs = followed("true")
    block, plain = added(graphs, fused), added(followed("false"), list)
    assert plain.kernels <= eager and block.kernels <= compiled and block.bytes <= size
    assert block.flops == added(graphs, list).flops == plain.flops and 0.014 < block.seconds < 0.028
    few, more = (sum(own.values()) for _, own in graphs)
    assert 0 < (more - few) / 32768 <= kept


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gpu", "h1000"], "gpu='h1000' is unknown: choose one of h100, h200, a100, b200"),
        (["gpu.memori=1"], r"gpu\.memori is unknown"),
        (["gpu.memory=fast"], r"gpu\.memory='fast' is no number"),
        (["model.hidden_sise=8"], "hidden_sise"),
        (["model.vocab_size=null"], r"model\.vocab_size is not set"),
        (["--measured", "README.md"], "is no trace of torch.profiler"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_followed(words, says):
    with pytest.raises(ValueError, match=says):
        main(["roofline", *words])


def test_times_of_a_profile_stand_beside(tmp_path, capsys):
    kernels = [("nvjet_tst_192x192", 2000), ("ema_outputs_kernel", 300), ("triton_poi_fused_silu", 50), ("adam", 7)]
    events = [{"cat": "kernel", "name": name, "dur": took} for name, took in kernels] * 2
    events += [{"cat": "user_annotation", "name": f"ProfilerStep#{i}", "dur": 1} for i in (3, 4)]
    trace, file = tmp_path / "trace.json.gz", tmp_path / "found.json"
    trace.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    sizes = ["model.hidden_size=64", "model.num_hidden_layers=3", "model.vocab_size=64", "model.intermediate_size=64",
             "model.nffn_hidden_size=64", "model.shared_representation_size=32", "model.chunk_size=64",
             "model.timestep_norm_groups=4", "data.sequence_length=128"]  # fmt: skip
    common = ["roofline", "--gpu", "h200", "--json", str(file), *sizes, "train.global_batch_size=2"]
    main([*common, "--measured", str(trace), "gpu.kernel=1e-6"])
    found = json.loads(file.read_text())
    parts = [each for each in found["rows"] if each["part"] != "all"]
    assert [each["part"] for each in parts] == list(PARTS)
    for column in ("kernels", "bytes", "flops", "seconds"):
        assert sum(each[column] for each in parts) == pytest.approx(found["rows"][-1][column])
    measured = {each["part"]: each["measured"] for each in found["rows"]}
    assert measured["products"] == 2.0 and measured["average"] == 0.3 and measured["all"] == pytest.approx(2.357)
    printed = capsys.readouterr().out
    assert "measured, ms" in printed and "kernel 1e-06" in printed and "since d1596f7" in printed
    assert found["gpu"]["kernel"] == 1e-6 and found["tokens"] == 256 and "host" in found["bound"]
