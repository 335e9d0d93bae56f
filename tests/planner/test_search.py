"""The search's estimates on paper, against traces."""

import pytest

from mega_scale.config import parse
from mega_scale.parallel.devices import Device
from mega_scale.parallel.roofline import collective_seconds
from mega_scale.planner.search import calibrate
from mega_scale.planner.times import link_seconds
from mega_scale.planner.trace import Cluster, follow, prepare

pytestmark = pytest.mark.slow
RUN = """model.vocab_size=512 model.hidden_size=512 model.intermediate_size=1024 model.nffn_hidden_size=1024
    model.shared_representation_size=128 model.ema_projection_size=4 model.num_hidden_layers=8 model.chunk_size=1024
    data.sequence_length=2048 train.global_batch_size=4 train.eval_every=0 train.sample_every=0 train.dtype=bf16
    parallel.engine=fsdp train.micro_batch_size=1"""
CLUSTER = Cluster(1, 4, Device.named("h100", {"link_latency": 1e-9}))


@pytest.fixture(scope="module")
def paper():
    config, model = prepare(parse(RUN.split()), CLUSTER)
    return calibrate(config, model, CLUSTER)


@pytest.mark.parametrize(
    "words",
    [
        "parallel.tp=2",
        "parallel.tp=4 train.micro_batch_size=2",
        "parallel.tp=2 parallel.sp=2 parallel.activation_checkpoint=1",
    ],
)
def test_a_block_takes_what_it_sends_over_tp_by_a_trace(paper, words):
    """As much as eight gathers of the stream, and small collectives; recomputed blocks send nothing again.

    One of the small ones is of a block and not of its tokens, so that it counts less than on paper in a longer row.
    """
    config, model = prepare(parse([*RUN.split(), *words.split()]), CLUSTER)
    few, many = (follow(config, model, CLUSTER, 0, layers, 1, save=False) for layers in (3, 4))
    taken = [
        sum(taken for _, axis, taken in link_seconds(trace, "first", CLUSTER.device) if axis == "tp")
        for trace in (few, many)
    ]
    tp, tokens = config.parallel.tp, config.train.micro_batch_size * 2048 / config.parallel.sp
    gather = collective_seconds("_allgather_base_", tp, 1, 2 * 512 * tokens / tp, CLUSTER.device)
    assert paper.gathers * gather == pytest.approx(taken[1] - taken[0], rel=0.05)
    assert 8 <= paper.gathers < 8.5
