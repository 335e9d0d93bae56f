"""What ranks really send, recorded at PyTorch's dispatcher, against formulas."""

from typing import Any

import layout_study
import pytest
import torch
from layout_study import LAYOUTS, VARIANTS
from ranks import run_ranks

from mega_scale.parallel import ParallelConfig, Place, World
from mega_scale.parallel.mesh import MeshShape
from mega_scale.parallel.meter import Meter, Sent

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

LAYERS = 2
ROWS = 2
LENGTHS = (1024, 65536)  # tokens per rank
MEGALODON = [("fsdp-3", "megalodon-plain"), ("zero-3", "megalodon-dropout-recomputed")]
# Engine, variant, and what is recomputed how: nothing, or every block and its policy and tokens of a segment.
CHANNELS = [
    ("fsdp-3", "plain", {}),
    ("zero-3", "plain", {}),
    ("zero-3", "megalodon-plain", {}),
    ("zero-3", "recomputed", {}),
    ("fsdp-3", "megalodon-dropout-recomputed", {}),
    ("fsdp-3", "recomputed", {"activation_checkpoint_policy": "save_matmuls"}),
    ("fsdp-3", "recomputed", {"activation_checkpoint_segment": 32}),
    ("fsdp-3", "megalodon-dropout-recomputed", {"activation_checkpoint_segment": 32}),
]


def train_once(
    world: World, engine: str, variant: str, tokens: int, documents: bool = False, **recomputation: Any
) -> tuple[list[Sent], list[Sent]]:
    """What goes over the axis that shares rows, or else channels, in one forward and one backward pass."""
    made = layout_study.make_engine(world, engine, *VARIANTS[variant], **recomputation)
    made.module.train()
    inputs = torch.arange(tokens).repeat(ROWS, 1) % 60
    starts = inputs % 7 == 0 if documents else None
    with Meter(events=False) as forward:
        loss = made.forward(inputs, inputs + 1, inputs.numel(), Place(), starts)
    with Meter(events=False) as backward:
        made.backward(loss, last=True)
    made.step(1e-3)
    made.close()
    group = world.axes["sp" if world.shape.sp > 1 else "tp"].group
    return forward.over(group), backward.over(group)


def accumulate(world: World, engine: str) -> tuple[list[int], float]:
    """How many sums of gradients go between copies in each of three micro-batches, and the norm of the gradient."""
    made = layout_study.make_engine(world, engine)
    made.module.train()
    calls = []
    for i in range(3):
        inputs = (torch.arange(2 * 61).view(ROWS, 61) + 7 * i + 100 * world.shape.dp_rank(world.rank)) % 60
        with Meter(events=False) as recorder:
            made.backward(made.forward(inputs, inputs + 1, 12 * 61, Place()), last=i == 2)
        sent = recorder.over(world.axes["dp_replicate"].group) if world.shape.dp_replicate > 1 else []
        calls.append(len([call for call in sent if call.operation == "allreduce_"]))
    norm = made.step(1e-3)
    made.close()
    return calls, norm


def collectives(world: World, dtype: str) -> list[int]:
    """How many collectives a forward, a backward and a step take under FSDP."""
    made = layout_study.make_engine(world, "fsdp-3", dtype=dtype)
    made.module.train()
    inputs = torch.arange(61).repeat(ROWS, 1) % 60
    counts = []
    with Meter(events=False) as recorder:
        loss = made.forward(inputs, inputs + 1, inputs.numel(), Place())
        counts.append(len(recorder.sent))
        made.backward(loss, last=True)
        counts.append(len(recorder.sent))
        made.step(1e-3)
        counts.append(len(recorder.sent))
    made.close()
    return counts


def kept(world: World, tokens: int) -> int:
    """Bytes that the first block, recomputed, keeps after the forward pass, its output among them."""
    made = layout_study.make_engine(world, "fsdp-3", *VARIANTS["recomputed"])
    made.module.train()
    inputs = torch.arange(tokens).repeat(ROWS, 1) % 60
    with Meter(made.module, events=False) as meter:
        loss = made.forward(inputs, inputs + 1, inputs.numel(), Place())
        found = sum(bytes for (_, module), bytes in meter.live.items() if ".layers.0." in module)
    made.backward(loss, last=True)
    made.close()
    return found


def study() -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    # With two copies, no group of an axis is the group of all ranks.
    with World.start(ParallelConfig(timeout_s=300)) as ranks:
        sequence, tensor = (
            layout_study.lay_out(ranks, MeshShape(2, 1, 2, 1)),
            layout_study.lay_out(ranks, LAYOUTS["dp2-tp2"]),
        )
        for engine in ("fsdp-3", "zero-3"):
            for variant in ("plain", "recomputed"):
                found["sp", engine, variant, 61] = train_once(sequence, engine, variant, 2 * 61)
        for engine, variant in MEGALODON:
            found["sp", engine, variant, 61] = train_once(sequence, engine, variant, 2 * 61)
        for number, (engine, variant, how) in enumerate(CHANNELS):
            found["tp", number] = train_once(tensor, engine, variant, 61, **how)
        found["kept"] = kept(tensor, 64)
        found["documents"] = train_once(sequence, "fsdp-3", "megalodon-plain", 2 * 61, documents=True)
        both = layout_study.lay_out(ranks, LAYOUTS["sp2-tp2"])
        found["sp and tp"] = train_once(both, "fsdp-3", "megalodon-plain", 2 * 61)
        found["formats"] = {dtype: collectives(ranks, dtype) for dtype in ("fp32", "bf16")}
        copies = layout_study.lay_out(ranks, MeshShape(2, 1, 2, 1)), layout_study.lay_out(ranks, MeshShape(1, 2, 2, 1))
        for engine in ("fsdp-3", "fsdp-2", "fsdp-1"):
            found["copies", engine] = [accumulate(world, engine) for world in copies]
        for tokens in LENGTHS:
            found["sp", "fsdp-3", "plain", tokens] = train_once(sequence, "fsdp-3", "plain", 2 * tokens)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(study, 4, tmp_path_factory.mktemp("communication"), timeout_s=400)


@pytest.mark.parametrize("variant", ["plain", "recomputed"])
@pytest.mark.parametrize("engine", ["fsdp-3", "zero-3"])
def test_sequence_parallel_sends_end_states_only(ranks, engine, variant):
    """4 B N D bytes a layer, forward and backward, and nothing more where activations are recomputed."""
    config = layout_study.config()
    state = 4 * ROWS * config.ema_projection_size * config.hidden_size
    for rank in ranks:
        for calls in rank["sp", engine, variant, 61]:
            assert [call.operation for call in calls] == ["_allgather_base_"] * LAYERS
            assert [call.bytes for call in calls] == [state] * LAYERS


def test_sequence_parallel_sends_the_same_at_any_length(ranks):
    short, long = (ranks[0]["sp", "fsdp-3", "plain", tokens] for tokens in LENGTHS)
    assert [[call.bytes for call in calls] for calls in short] == [[call.bytes for call in calls] for calls in long]
    assert sum(call.bytes for call in long[0]) == LAYERS * 4 * ROWS * 3 * 24  # N = 3, D = 24


def megalodon_bytes(tensor_parallel: int = 1) -> tuple[int, int]:
    """Of the moments and of the states of a layer: 8 B G / T and 8 B N D."""
    config = layout_study.config(**layout_study.MEGALODON)
    states = config.ema_projection_size * config.hidden_size
    return 8 * ROWS * config.timestep_norm_groups // tensor_parallel, 8 * ROWS * states


@pytest.mark.parametrize(("engine", "variant"), MEGALODON)
def test_megalodon_sends_moments_and_states(ranks, engine, variant):
    """Moments, then states of each layer, the last norm's moments; back the same, and nothing for recomputation."""
    moments, states = megalodon_bytes()
    for rank in ranks:
        for calls in (rank["sp", engine, variant, 61][0], rank["sp", engine, variant, 61][1][::-1]):
            assert [call.operation for call in calls] == ["_allgather_base_"] * (2 * LAYERS + 1)
            assert [call.bytes for call in calls] == [moments, states] * LAYERS + [moments]


def test_megalodon_sends_a_count_a_row_more_where_documents_begin(ranks):
    moments, states = megalodon_bytes()
    for rank in ranks:
        forward, backward = rank["documents"]
        norm = moments + 4 * ROWS
        assert [call.bytes for call in forward] == [norm, ROWS, states] * LAYERS + [norm]  # and a byte a row
        assert [call.bytes for call in backward] == [moments] + [states, moments] * LAYERS


def test_ranks_of_tp_send_moments_of_their_groups_and_all_states(ranks):
    moments, states = megalodon_bytes(2)
    for rank in ranks:
        for calls in (rank["sp and tp"][0], rank["sp and tp"][1][::-1]):
            assert [call.bytes for call in calls] == [moments, states] * LAYERS + [moments]


def test_the_average_takes_one_collective_a_step_of_its_own(ranks):
    """In bf16 its parameters stay fp32, and so whole on every rank."""
    for rank in ranks:
        (forward, backward, step), (*same, more) = rank["formats"]["fp32"], rank["formats"]["bf16"]
        assert same == [forward, backward] and more == step + 1


@pytest.mark.parametrize("engine", ["fsdp-3", "fsdp-2", "fsdp-1"])
def test_copies_sum_their_gradients_once_a_step(ranks, engine):
    for rank in ranks:
        (calls, norm), (_, expected) = rank["copies", engine]
        assert calls[:2] == [0, 0] and calls[2] > 0
        assert norm == pytest.approx(expected, rel=1e-5)


def kinds_and_bytes(calls: list[Sent]) -> list[tuple[str, int]]:
    """Of each collective, and of the largest of its tensors, which is the whole one."""
    return [(call.operation, call.bytes * (2 if call.operation == "_allgather_base_" else 1)) for call in calls]


@pytest.mark.parametrize("number", range(len(CHANNELS)), ids=lambda number: "-".join(map(str, CHANNELS[number])))
def test_tensor_parallel_sends_four_large_tensors_each_way(ranks, number):
    """However blocks are recomputed: what was received is kept for that."""
    _, variant, how = CHANNELS[number]
    megalodon, width = "megalodon" in variant, 4 * ROWS * layout_study.config().hidden_size
    # Embedding and head are not cut into segments, and a dense layer comes before the head of a Mega.
    segments = [32, 29] if "activation_checkpoint_segment" in how else [61]
    gather, scatter = "_allgather_base_", "_reduce_scatter_base_"
    after = [gather] if megalodon else [gather, gather]
    expected = [(scatter, 61)] + [(kind, t) for t in segments for kind in [gather, scatter] * 2] * LAYERS
    expected += [(kind, 61) for kind in after]
    for rank in ranks:
        forward, backward = ([call for call in calls if call.bytes >= 29 * width // 2] for calls in rank["tp", number])
        assert kinds_and_bytes(forward) == [(kind, tokens * width) for kind, tokens in expected]
        turned = [({gather: scatter, scatter: gather}[kind], tokens * width) for kind, tokens in reversed(expected)]
        assert kinds_and_bytes(backward) == turned


def test_tensor_parallel_sends_little_else(ranks):
    """A statistic a token and norm, once; the gradients of an average's parameters, in one sum."""
    config = layout_study.config()
    average = 4 * (4 * config.ema_projection_size + 1) * config.hidden_size
    for rank in ranks:
        for number, (_, variant, how) in enumerate(CHANNELS):
            forward, backward = (
                [call for call in calls if call.bytes < 4 * ROWS * 29 * config.hidden_size // 2]
                for calls in rank["tp", number]
            )
            megalodon, segments = "megalodon" in variant, 2 if "activation_checkpoint_segment" in how else 1
            norms = (1 if megalodon else 2) * LAYERS
            # Layer norms: mean and squared distance of every token; back, two sums.
            gathers = [call.bytes for call in forward if call.operation == "_allgather_base_"]
            assert len(gathers) == norms * segments and sum(gathers) == norms * 8 * ROWS * 61
            assert "_allgather_base_" not in [call.operation for call in backward]
            sums = [call.bytes for call in backward if call.operation == "allreduce_"]
            assert sum(bytes in (8 * ROWS * 61, 8 * ROWS * 32, 8 * ROWS * 29) for bytes in sums) == norms * segments
            # A complex average has an angle a channel more.
            assert sums.count(average + (4 * config.hidden_size if megalodon else 0)) == LAYERS * segments


def test_a_recomputed_block_keeps_what_it_received(ranks):
    """In fp32, 8 D + 8 D / T bytes a token and 8 a layer norm; and its output, which is the next block's input."""
    channels = layout_study.config().hidden_size
    received = 8 * channels + 8 * channels // 2 + 2 * 8
    assert [rank["kept"] for rank in ranks] == [ROWS * 64 * (received + 4 * channels // 2)] * 4
