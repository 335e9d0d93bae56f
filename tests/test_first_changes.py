"""One key of the default run changed, as new users do: it runs, or it is refused with a remedy that works."""

import pytest

from mega_scale.config import parse


def check(tmp_path, *words):
    parse([f"run_dir={tmp_path / 'run'}", *words]).validate(2)


@pytest.mark.parametrize(
    "change",
    [
        "train.steps=1", "train.steps=6", "train.steps=1000000", "train.eval_every=1000", "train.sample_every=1000",
        "train.eval_every=0", "train.log_every=1000", "checkpoint.every=1000", "train.micro_batch_size=1",
        "train.global_batch_size=32", "train.dtype=bf16", "data.sequence_length=1024", "model.chunk_size=128",
        "model.hidden_size=100", "model.num_hidden_layers=1", "model.use_chunking=false", "optimizer.lr=1e-3",
        "parallel.engine=fsdp", "parallel.zero_stage=0", "parallel.sp=2", "parallel.tp=2", "data.workers=2",
        "schedule.warmup_steps=0.1", "schedule.warmup_steps=10", "schedule.decay=constant",
    ],
)  # fmt: skip
def test_it_runs(tmp_path, change):
    check(tmp_path, change)


@pytest.mark.parametrize(
    ("change", "says", "remedy"),
    [
        ("optimizer.lr=1e-5", "schedule.min_lr=1e-06", ["schedule.min_lr=1e-06"]),
        ("schedule.min_lr=0.01", "schedule.min_lr=0.0004", []),
        ("schedule.warmup_steps=500", "schedule.warmup_steps=0.1", []),
        ("schedule.warmup_steps=2.5", "a whole number of steps", ["schedule.warmup_steps=2"]),
        ("train.global_batch_size=3", "global_batch_size of 16", ["train.global_batch_size=16"]),
        ("train.global_batch_size=8", "micro_batch_size of 1 or 2 or 4", ["train.micro_batch_size=4"]),
        ("train.micro_batch_size=16", "global_batch_size of 32", ["train.global_batch_size=32"]),
        ("data.sequence_length=100", "chunk_size of 50 or 100", ["model.chunk_size=50"]),
        ("data.sequence_length=1000", "sequence_length of 960 or 1024", ["data.sequence_length=1024"]),
        ("model.chunk_size=1024", "sequence_length of 1024", ["data.sequence_length=1024"]),
        ("data.path={text}", "set data.source", ["data.source=text"]),
        ("data.source=text", "data.path", ["data.path={text}"]),
        ("data.validation_fraction=0", "train.eval_every=0", ["train.eval_every=0"]),
        ("data.packing_order=best_fit", "data.packing=reset", ["data.packing=reset"]),
        ("parallel.dp_shard=1", "parallel.dp_shard=2", ["parallel.dp_shard=2"]),
        ("model.truncation=64", "sample_every=0", ["train.sample_every=0"]),
    ],
)
def test_it_is_refused_with_a_remedy_that_works(tmp_path, change, says, remedy):
    text = tmp_path / "text.txt"
    text.write_text("some text")
    change, *remedy = (word.format(text=text) for word in (change, *remedy))
    with pytest.raises(ValueError) as refusal:
        check(tmp_path, change)
    assert says in str(refusal.value)
    check(tmp_path, change, *(remedy or [says]))
