"""A plan holds and sends what real ranks do; two depths give a third."""

from dataclasses import asdict

import planned_study
import pytest
from planned_study import CASES, SIZES
from ranks import run_ranks

from mega_scale.config import parse
from mega_scale.parallel import ParallelConfig
from mega_scale.parallel.devices import Device
from mega_scale.parallel.meter import Event
from mega_scale.parallel.roofline import hidden_seconds, seconds
from mega_scale.planner.times import crowding, step_time
from mega_scale.planner.trace import PARTS, Cluster, follow, prepare, rehearse

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SOME = {
    name: CASES[name]
    for name in (
        "fsdp dp2, two micro-batches",
        "fsdp tp2, products kept",
        "fsdp sp2, megalodon",
        "fsdp dp2, documents",
        "zero-3 dp2",
        "zero-2 sp2",
        "fsdp dp2, muon",
        "zero-3 dp2, muon",
    )
}  # all of them: campaigns/planned_memory.py
BESIDE = ("fsdp tp2, products kept", "fsdp tp2, megalodon, recomputed")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    beside = {name: CASES[name] for name in BESIDE}
    return run_ranks(planned_study.both, 2, tmp_path_factory.mktemp("planned"), SOME, beside, timeout_s=400)


@pytest.mark.parametrize("case", SOME)
def test_a_plan_is_what_a_real_rank_does(ranks, case):
    real, planned = ranks[1][case], asdict(planned_study.planned(CASES[case], 1))
    assert planned["peak"] == pytest.approx(real["peak"], rel=0.01)
    # Where the optimizer's step is not the highest place, it is told too.
    assert planned["places"]["optimizer"] == pytest.approx(real["places"]["optimizer"], rel=0.01)
    assert planned["written"] == real["written"]
    for what in ("calls", "sent"):
        # DeepSpeed compares the order of parameters between ranks once a run, by broadcasts.
        found = {
            part: {key: value for key, value in table.items() if "broadcast" not in key}
            for part, table in real[what].items()
        }
        assert planned[what] == found, what
    if case == "zero-2 sp2":  # whose bucket has the size of the model
        assert planned["peak"] < 16 * 2**20


@pytest.mark.parametrize(
    "words",
    [
        "parallel.sp=2 parallel.tp=2 train.dtype=bf16 model.num_hidden_layers=7",
        # The peak is in a block that is neither the first nor the last.
        "parallel.activation_checkpoint=1 train.micro_batch_size=1 data.sequence_length=64 model.num_hidden_layers=5",
        # In the last of 14 rounds, this rank computes no matrix.
        "optimizer.name=muon parallel.tp=2 data.sequence_length=64 model.num_hidden_layers=7",
    ],
)
def test_two_depths_give_any_other(words):
    words = f"parallel.engine=fsdp {words}"
    cluster = Cluster(1, 4, Device.named("h100"))
    config, model = prepare(parse([*SIZES.replace("parallel.device=cpu", "").split(), *words.split()]), cluster)
    found, full = rehearse(config, model, cluster, 3), follow(config, model, cluster, 3)
    assert found.peak == pytest.approx(full.peak, rel=1e-3) and found.written == full.written
    assert found.places["optimizer"] == pytest.approx(full.places["optimizer"], rel=1e-3)
    for what in ("calls", "sent", "kernels", "flops"):
        for part, table in getattr(full, what).items():
            # A kernel of an optimizer takes dozens of tensors, and a launch of few is one too.
            near = 1e-2 if (what, part) == ("kernels", "optimizer") else 1e-3
            assert getattr(found, what)[part] == pytest.approx(table, rel=near), (what, part)


@pytest.mark.parametrize("case", BESIDE)
def test_a_plan_of_products_with_collectives_is_what_a_real_rank_does(ranks, case, monkeypatch):
    """The same memory and collectives, of which part of the time passes beside products, and those only."""
    real, waiting = ranks[1][case, True], planned_study.planned(CASES[case], 1)
    assert not any(waiting.hidden.values()) and not waiting.workspace
    monkeypatch.setattr(ParallelConfig, "overlap_problem", lambda self: None)  # as on GPUs
    planned = planned_study.planned(CASES[case], 1)
    assert planned.peak == pytest.approx(real["peak"], rel=0.01)
    assert (planned.calls, planned.sent) == (real["calls"], real["sent"])
    assert sum(map(sum, (p.values() for p in planned.calls.values()))) == sum(
        map(sum, (p.values() for p in waiting.calls.values()))
    )
    # Half of the gradient of the stream that a block puts in to be summed, twice, at two ranks.
    assert planned.workspace == 4 * 256 * 64
    config, model, cluster = planned_study.as_planned(planned_study.run_of(CASES[case]))
    exposed, all_ = (step_time(trace, config, model, cluster).exposed for trace in (planned, waiting))
    accumulated = config.engine_config(2).accumulation
    turns = crowding(cluster)
    hidden = [sum(planned.hidden[part].values()) for part in PARTS]
    assert all_ - exposed == pytest.approx(turns * (hidden[0] + (accumulated - 1) * hidden[1]), rel=1e-6)
    assert 0 < hidden[0] < all_ and not hidden[2]


def test_no_more_is_hidden_than_travels_nor_than_is_computed_beside_it():
    device = Device.named("h100")
    product = Event("symm_mem::fused_all_gather_matmul", 0, 0, 10**12, 9, "bfloat16", "layers.0", "forward")
    took = seconds(product, device)
    assert hidden_seconds(product, 10 * took, 4, device) == pytest.approx(0.75 * took)
    assert hidden_seconds(product, 0.1 * took, 4, device) == pytest.approx(0.1 * took)
