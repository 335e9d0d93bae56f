"""Layouts that cannot run are refused by name before any process group starts, and what the refusal proposes runs."""

import copy
import dataclasses
import functools
import re
from typing import Any, NamedTuple

import pytest
import torch.distributed as dist
import yaml

from mega_scale.config import RunConfig, parse
from mega_scale.model import MegalodonConfig
from mega_scale.parallel import Placement
from mega_scale.parallel.mesh import check_sequence_parallel, check_tensor_parallel
from mega_scale.process import StopSignals
from mega_scale.training.trainer import Trainer

# Runs on 8 ranks in every layout that the cases propose.
SOUND = """data.source=text data.path={folder}/text.txt data.validation_fraction=0 run_dir={folder}/run
    train.global_batch_size=24 train.micro_batch_size=1 train.eval_every=0 train.sample_every=0 model.vocab_size=264"""
ZERO = "parallel.ds_config.zero_optimization"


class Bad(NamedTuple):
    """A layout, what its refusal says, and the changes that it proposes; a key alone is one to remove."""

    words: str
    says: str
    fixes: list[str]
    ranks: int = 8
    local: int = 8


CASES = [
    # Sizes of axes
    Bad("parallel.dp_replicate=0", "parallel.dp_replicate=0", ["parallel.dp_replicate=1"]),
    Bad("parallel.dp_replicate=-1", "parallel.dp_replicate=-1", ["parallel.dp_replicate=1"]),
    Bad("parallel.sp=0", "parallel.sp=0", ["parallel.sp=1"]),
    Bad("parallel.tp=-2", "parallel.tp=-2", ["parallel.tp=1"]),
    Bad("parallel.dp_shard=0", "parallel.dp_shard=0", ["parallel.dp_shard=-1"]),
    Bad("parallel.dp_shard=-3", "parallel.dp_shard=-3", ["parallel.dp_shard=-1"]),
    # Axes and ranks
    Bad("parallel.tp=3", "parallel.tp=2 or 4", ["parallel.tp=2", "parallel.tp=4"]),
    Bad("parallel.sp=16", "parallel.sp=4 or 8", ["parallel.sp=4", "parallel.sp=8"]),
    Bad(
        "parallel.dp_replicate=5",
        "parallel.dp_replicate=4 or 8",
        ["parallel.dp_replicate=4", "parallel.dp_replicate=8"],
    ),
    Bad("parallel.sp=2 parallel.tp=8", "= 16 does not divide", ["parallel.sp=1", "parallel.tp=2", "parallel.tp=4"]),
    Bad("parallel.dp_replicate=2 parallel.sp=3", "parallel.sp=2 or 4", ["parallel.sp=2", "parallel.sp=4"]),
    Bad("parallel.dp_replicate=3 parallel.sp=3", "= 9 does not divide", ["ranks=9"]),
    Bad("parallel.dp_shard=4", "= 4 is not the number of processes, 8", ["parallel.dp_shard=8", "ranks=4"]),
    Bad(
        "parallel.dp_shard=8 parallel.tp=2", "= 16 is not", ["parallel.dp_shard=4", "parallel.dp_shard=-1", "ranks=16"]
    ),
    Bad("parallel.dp_shard=2 parallel.tp=3", "parallel.tp=2 or 4", ["parallel.dp_shard=-1 parallel.tp=4"]),
    Bad("parallel.dp_replicate=2 parallel.dp_shard=2", "parallel.dp_replicate=2", ["parallel.dp_shard=4", "ranks=4"]),
    Bad("parallel.tp=2", "parallel.tp=2 = 2 does not divide", ["parallel.tp=1", "ranks=2"], 1, 1),
    # Hosts
    Bad("parallel.tp=4", "2 ranks of this host", ["parallel.tp=2"], 8, 2),
    Bad("parallel.tp=4", "6 ranks of this host", ["parallel.tp=2"], 12, 6),
    Bad("parallel.tp=2 parallel.dp_shard=2", "of this host", ["parallel.tp=1 parallel.dp_shard=-1"], 4, 1),
    # Widths
    Bad("parallel.tp=4 model.hidden_size=130", "model.hidden_size=130", ["model.hidden_size=128", "parallel.tp=2"]),
    Bad("parallel.tp=8 model.intermediate_size=10", "=8 or 16", ["model.intermediate_size=8", "parallel.tp=2"]),
    Bad("parallel.tp=2 model.nffn_hidden_size=5", "=4 or 6", ["model.nffn_hidden_size=4", "parallel.tp=1"]),
    # Models
    Bad(
        "parallel.tp=2 model.add_cross_attention=true", "add_cross_attention=True", ["model.add_cross_attention=false"]
    ),
    Bad(
        "parallel.sp=2 model.add_cross_attention=true", "add_cross_attention=True", ["model.add_cross_attention=false"]
    ),
    Bad("parallel.tp=2 model.normalization_type=batchnorm", "'batchnorm'", ["model.normalization_type=layernorm"]),
    Bad(
        "parallel.sp=2 model.normalization_type=syncbatchnorm", "'syncbatchnorm'", ["model.normalization_type=rmsnorm"]
    ),
    Bad("parallel.sp=2 model.truncation=8", "model.truncation=8", ["model.truncation=null", "parallel.sp=1"]),
    # Lengths
    Bad(
        "parallel.sp=2 model.use_chunking=false",
        "model.use_chunking=False",
        ["model.use_chunking=true model.chunk_size=256", "parallel.sp=1"],
    ),
    Bad("parallel.sp=4 data.sequence_length=128", "too short", ["data.sequence_length=256", "model.chunk_size=32"]),
    Bad(
        "parallel.sp=8 data.sequence_length=100 model.chunk_size=16",
        "data.sequence_length=100",
        ["data.sequence_length=128", "model.chunk_size=13"],
    ),
    Bad("data.sequence_length=100", "does not divide data.sequence_length=100", ["data.sequence_length=128"]),
    # Rows
    Bad(
        "parallel.tp=2 train.global_batch_size=18",
        "4 data-parallel ranks",
        ["train.global_batch_size=16", "train.global_batch_size=20"],
    ),
    Bad(
        "parallel.sp=2 parallel.tp=2 train.global_batch_size=22 train.micro_batch_size=3",
        "2 data-parallel ranks",
        ["train.global_batch_size=24", "train.micro_batch_size=1", "train.micro_batch_size=11"],
    ),
    # DeepSpeed
    Bad("parallel.dp_replicate=2 parallel.zero_stage=0", "parallel.zero_stage=0", ["parallel.zero_stage=3"]),
    Bad("parallel.dp_replicate=2 parallel.zero_stage=1", "=1", ["parallel.zero_stage=3", "parallel.engine=fsdp"]),
    Bad("parallel.dp_replicate=2 parallel.zero_stage=2", "=2", ["parallel.zero_stage=3", "parallel.engine=fsdp"]),
    *(
        Bad(
            f"parallel.dp_replicate=2 {ZERO}.{key}",
            "parallel.dp_replicate=2",
            [f"{ZERO}.{name}", "parallel.dp_replicate=1"],
        )
        for key in ("offload_optimizer.device=cpu", "offload_param.device=cpu", "cpu_offload=true")
        for name in [re.split(r"[.=]", key)[0]]
    ),
    Bad(f"parallel.tp=2 {ZERO}.zero_quantized_gradients=true", "parallel.tp=2", [f"{ZERO}.zero_quantized_gradients"]),
    *(
        Bad(f"parallel.ds_config.{key}", owner, [f"parallel.ds_config.{re.split('=|.autotp', key)[0]}"])
        for key, owner in {
            "sequence_parallel_size=2": "parallel.sp",
            "data_parallel_size=4": "parallel.dp_shard",
            "tensor_parallel.autotp_size=2": "parallel.tp",
            "zero_optimization.mics_shard_size=2": "parallel.dp_replicate",
            "zero_optimization.zero_hpz_partition_size=2": "parallel.dp_replicate",
        }.items()
    ),
]


@pytest.fixture(autouse=True)
def no_process_group(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: pytest.fail("a process group was started"))
    yield
    assert not dist.is_initialized()


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> RunConfig:
    folder = tmp_path_factory.mktemp("layouts")
    (folder / "text.txt").write_text("a few words, " * 2000)
    return parse(SOUND.format(folder=folder).split())


def changed(config: RunConfig, words: list[str]) -> RunConfig:
    """A copy with some KEY=VALUE set, later ones over earlier ones."""
    config = copy.deepcopy(config)
    for word in words:
        key, _, value = word.partition("=")
        *sections, last = key.split(".")
        place: Any = config
        for name in sections:
            place = place.setdefault(name, {}) if isinstance(place, dict) else getattr(place, name)
        put = place.__setitem__ if isinstance(place, dict) else functools.partial(setattr, place)
        put(last, yaml.safe_load(value))
    return config


def attempt(config: RunConfig, ranks: int, local: int) -> Trainer:
    """Prepare the last rank."""
    config.validate(ranks, local)
    return Trainer(config, Placement(ranks - 1, ranks, local - 1, local), StopSignals())


def named(change: str, message: str) -> bool:
    """Whether a refusal proposes a change: its key, and its value somewhere after it."""
    key, _, value = change.partition("=")
    if key == "ranks":
        return re.search(rf"start (\d+ or )?{value} processes", message) is not None
    if not value:
        return key in message and "remove" in message
    return re.search(rf"{re.escape(key)}\b.*(?<![\w.-]){re.escape(value)}(?!\w)", message) is not None


def test_the_sound_layout_runs(sound):
    assert attempt(sound, 8, 8).config.parallel.mesh(8) == (1, 8, 1, 1)


def test_there_are_thirty_cases():
    assert len({(case.words, case.local) for case in CASES}) >= 30


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.words} on {case.ranks}".replace("parallel.", ""))
def test_refused_before_any_process_group_with_a_remedy_that_works(case, sound):
    words = case.words.split()
    with pytest.raises(ValueError) as refusal:
        attempt(changed(sound, words), case.ranks, case.local)
    message = str(refusal.value)
    assert case.says in message and "\n" not in message
    for fix in case.fixes:
        changes = fix.split()
        assert all(named(change, message) for change in changes), (fix, message)
        removed = tuple(change for change in changes if "=" not in change)
        ranks = next((int(change[6:]) for change in changes if change.startswith("ranks=")), None)
        kept = [word for word in words if not (removed and word.startswith(removed))]
        kept += [change for change in changes if "=" in change and not change.startswith("ranks=")]
        attempt(changed(sound, kept), ranks or case.ranks, ranks or case.local)


# The functions alone: a run refuses some of these earlier, as no decoder can have them.


def section(**changes: Any) -> Any:
    return dataclasses.replace(RunConfig().model, hidden_size=64, use_chunking=True, chunk_size=8, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"normalization_type": "batchnorm"}, ["model.normalization_type='batchnorm'", "layernorm"]),
        ({"normalization_type": "syncbatchnorm"}, ["model.normalization_type='syncbatchnorm'", "rmsnorm"]),
        ({"bidirectional": True}, ["model.bidirectional=True", "model.bidirectional=false"]),
        ({"add_cross_attention": True}, ["model.add_cross_attention=True", "model.add_cross_attention=false"]),
        ({"intermediate_size": 255}, ["model.intermediate_size=255", "model.intermediate_size=254 or 256"]),
    ],
)
def test_tensor_parallel_refuses(changes, words):
    with pytest.raises(ValueError) as refusal:
        check_tensor_parallel(section(**changes), 2)
    assert all(word in str(refusal.value) for word in ["parallel.tp=2", "parallel.tp=1", *words]), refusal.value
    check_tensor_parallel(section(**changes), 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"normalization_type": "batchnorm"}, ["model.normalization_type='batchnorm'", "layernorm"]),
        ({"add_cross_attention": True}, ["model.add_cross_attention=True", "model.add_cross_attention=false"]),
        ({"truncation": 4}, ["model.truncation=4", "model.truncation=null"]),
    ],
)
def test_sequence_parallel_refuses(changes, words):
    with pytest.raises(ValueError) as refusal:
        check_sequence_parallel(section(**changes), 64, 2)
    assert all(word in str(refusal.value) for word in ["parallel.sp=2", "parallel.sp=1", *words]), refusal.value
    check_sequence_parallel(section(**changes), 64, 1)


def test_an_unused_feed_forward_need_not_divide():
    check_tensor_parallel(section(use_normalized_ffn=False, nffn_hidden_size=7), 4)


@pytest.mark.parametrize(
    ("changes", "tp", "says"),
    [
        ({}, 4, "model.timestep_norm_groups=6, use model.timestep_norm_groups=4 or 8, or parallel.tp=2"),
        ({"hidden_size": 50, "timestep_norm_groups": 2}, 4, "model.hidden_size=50, use model.hidden_size=48 or 52"),
        ({}, 3, "model.num_attention_heads=4 divides the other, use model.num_attention_heads=1, or parallel.tp=1"),
        ({"intermediate_size": 20, "num_attention_heads": 2}, 8, "model.intermediate_size=20"),
        ({"nffn_hidden_size": 25}, 2, "model.nffn_hidden_size=25, use model.nffn_hidden_size=24 or 26"),
    ],
)
def test_tensor_parallel_refuses_a_megalodon(changes, tp, says):
    sizes = {"hidden_size": 48, "intermediate_size": 48, "nffn_hidden_size": 48, "shared_representation_size": 16}
    config = MegalodonConfig(**sizes | {"num_attention_heads": 4, "timestep_norm_groups": 6} | changes)
    with pytest.raises(ValueError) as refusal:
        check_tensor_parallel(config, tp)
    assert f"parallel.tp={tp}" in str(refusal.value) and says in str(refusal.value)
    check_tensor_parallel(config, 1)
    check_sequence_parallel(config, 4 * config.chunk_size, 4)


def test_a_run_of_a_megalodon_is_refused_before_any_process_group(tmp_path):
    (tmp_path / "text.txt").write_text("a few words, " * 2000)
    model = "model.type=megalodon model.chunk_size=32 model.timestep_norm_groups=4"

    def run(more: str) -> None:
        attempt(parse(f"{SOUND.format(folder=tmp_path)} {model} {more}".split()), 8, 8)

    with pytest.raises(ValueError, match=r"parallel.tp=8 .*model.timestep_norm_groups=8 or 16, or parallel.tp=4"):
        run("parallel.tp=8")
    run("parallel.tp=4")
    run("parallel.tp=8 model.timestep_norm_groups=16")


@pytest.mark.parametrize(("heads", "tp"), [(1, 4), (2, 4), (4, 4), (4, 2), (6, 2), (6, 3), (1, 3)])
def test_ranks_share_heads_or_heads_share_ranks(heads, tp):
    sizes = {"hidden_size": 48, "intermediate_size": 48, "nffn_hidden_size": 48, "shared_representation_size": 24}
    check_tensor_parallel(MegalodonConfig(**sizes, num_attention_heads=heads, timestep_norm_groups=12), tp)


@pytest.mark.parametrize("sp", [2, 3, 4])
def test_every_rank_has_some_tokens_or_the_length_is_refused(sp):
    """Chunks of 8; ranks hold equal numbers of whole chunks, the last ones padded."""
    for length in range(1, 120):
        share = next(tokens for tokens in range(8, 200, 8) if tokens * sp >= length)
        starts_inside = length > (sp - 1) * share
        if starts_inside:
            check_sequence_parallel(section(), length, sp)
            continue
        with pytest.raises(ValueError, match=f"data.sequence_length={length} is too short") as refusal:
            check_sequence_parallel(section(), length, sp)
        longer = re.search(r"use data.sequence_length=(\d+)", str(refusal.value))
        assert longer is not None
        check_sequence_parallel(section(), int(longer[1]), sp)


@pytest.mark.parametrize("vocabulary", ["null", "261", "264"])
def test_ranks_need_not_divide_the_vocabulary(sound, vocabulary):
    prepared = attempt(changed(sound, ["parallel.tp=2", f"model.vocab_size={vocabulary}"]), 8, 8)
    assert prepared.model_config.vocab_size == (259 if vocabulary == "null" else int(vocabulary))
