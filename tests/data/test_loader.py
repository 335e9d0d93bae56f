"""The rows of a step do not depend on ranks, micro-batches, interruptions or the processes that read ahead."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import psutil
import pytest
import torch
from stores import store_of

from mega_scale.data.loader import Loader, ReadAhead, validation_batches
from mega_scale.data.packing import PackedDataset

L = 8
ROWS = 37  # no multiple of any batch size below


def dataset(rows: int = ROWS, extra: int = 0, first: int = 0) -> PackedDataset:
    """Rows that can be told by their first token: row i starts with first + i * L."""
    tokens = np.arange(first, first + rows * L + 1 + extra, dtype="<u4")
    return PackedDataset(store_of(tokens), L)


def loader(data: PackedDataset | None = None, micro: int = 12, rank: int = 0, world: int = 1, **keys) -> Loader:
    keys = {"global_batch_size": 12, "seed": 1, "shuffle": True} | keys
    return Loader(data or dataset(), micro_batch_size=micro, rank=rank, world_size=world, **keys)


def global_rows(step: int, micro: int, world: int, **keys) -> list[int]:
    """First tokens of a step's rows, micro-batch by micro-batch, rank by rank."""
    ranks = [loader(micro=micro, rank=rank, world=world, **keys).batches(step) for rank in range(world)]
    assert all(batch["input_ids"].shape == (micro, L) for batches in ranks for batch in batches)
    return [
        token
        for one_micro_batch_of_all in zip(*ranks, strict=True)
        for batch in one_micro_batch_of_all
        for token in batch["input_ids"][:, 0].tolist()
    ]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("micro", "world"), [(1, 1), (4, 1), (6, 2), (2, 2), (3, 4), (1, 4), (1, 12)])
def test_global_batch_is_the_same_however_it_is_split(micro, world, shuffle):
    for step in (0, 2, 3, 7, 1000):
        assert global_rows(step, micro, world, shuffle=shuffle) == global_rows(step, 12, 1, shuffle=shuffle)


def test_labels_are_the_next_tokens():
    for batch in loader(micro=3).batches(5) + loader(micro=1).batches(5):
        for name in ("input_ids", "shift_labels"):
            assert batch[name].dtype == torch.int64 and batch[name].is_contiguous()
        labels = batch["input_ids"] + 1
        batch["input_ids"].zero_()  # which must not change the labels
        assert torch.equal(batch["shift_labels"], labels)


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_has_every_row_once_and_follows_the_last_without_a_gap(shuffle):
    run = [row for step in range(ROWS) for row in global_rows(step, 12, 1, shuffle=shuffle)]  # 12 epochs
    epochs = [run[i : i + ROWS] for i in range(0, len(run), ROWS)]
    assert all(sorted(epoch) == [i * L for i in range(ROWS)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == (12 if shuffle else 1)
    if not shuffle:
        assert epochs[0] == sorted(epochs[0])


def test_seed_chooses_the_order():
    assert global_rows(0, 12, 1, seed=1) == global_rows(0, 12, 1, seed=1) != global_rows(0, 12, 1, seed=2)


def test_resumed_loader_continues_with_the_same_rows():
    whole = loader(micro=3, rank=1, world=2)
    expected = [whole.batches(step) for step in range(10)]
    resumed = loader(micro=3, rank=1, world=2)
    resumed.check(json.loads(json.dumps(whole.state_dict(6))))
    for step in (6, 7, 8, 9):
        for one, other in zip(expected[step], resumed.batches(step), strict=True):
            assert torch.equal(one["input_ids"], other["input_ids"])


def test_state_says_where_the_run_is():
    state = loader().state_dict(7)
    assert (state["step"], state["rows"]) == (7, 84)
    assert state["sources"] == {"text": {"rows": 84, "epochs": 84 / ROWS, "tokens": 84 * L}}
    assert state["fingerprint"] == dataset().fingerprint
    # Ranks and micro-batches are free to change.
    loader(micro=2, rank=3, world=6).check(state)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda: loader(global_batch_size=24), ["train.global_batch_size=24", "12"]),
        (lambda: loader(seed=9), ["data.seed=9", "1"]),
        (lambda: loader(shuffle=False), ["data.shuffle=False", "True"]),
        (lambda: loader(dataset(first=1)), ["fingerprint", "init_from"]),
        (lambda: loader(dataset(rows=36)), ["fingerprint"]),
        (lambda: loader(PackedDataset(store_of(np.arange(ROWS * L + 1)), 4)), ["data.sequence_length=4", "8"]),
    ],
)
def test_resuming_otherwise_is_refused(other, named):
    with pytest.raises(ValueError) as refusal:
        other().check(loader().state_dict(3))
    for words in named:
        assert words in str(refusal.value)


def test_seed_does_not_matter_unshuffled():
    loader(shuffle=False, seed=4).check(loader(shuffle=False, seed=5).state_dict(1))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: loader(micro=5), "train.global_batch_size=12 is not a multiple of 1 ranks x train.micro_batch_size=5"),
        (lambda: loader(micro=4, world=2), "use a multiple of 8"),
        (lambda: loader(micro=0), "train.micro_batch_size=0"),
        (lambda: loader(rank=2, world=2), "rank 2 is not one of 2 ranks"),
        (lambda: loader(global_batch_size=0), "train.global_batch_size=0"),
        (lambda: loader(dataset(rows=11)), "train.global_batch_size=12 .* 11 rows of data.sequence_length=8"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, named):
    with pytest.raises(ValueError, match=named):
        make()


@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("rows", [1, 5, 12, ROWS, 1000])
@pytest.mark.parametrize(("micro", "world"), [(1, 1), (4, 1), (4, 2), (3, 5)])
def test_validation_predicts_each_token_once_with_as_many_batches_on_every_rank(micro, world, rows, extra):
    data = dataset(extra=extra)
    ranks = [list(validation_batches(data, rows, micro, rank, world)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    inputs, labels = (
        torch.stack([batch[name] for step in zip(*ranks, strict=True) for batch in step]).flatten(0, 1)
        for name in ("input_ids", "shift_labels")
    )
    assert inputs.shape == labels.shape == (len(ranks[0]) * world * micro, L)
    assert inputs.min() >= 0 and inputs.dtype == labels.dtype == torch.int64
    counted = labels != -100
    assert labels[counted].tolist() == list(range(1, min(rows * L, ROWS * L + extra) + 1))
    assert torch.equal(labels[counted], inputs[counted] + 1)
    # No batch is there for nothing.
    assert any(counted.flatten(0, 1).view(len(ranks[0]), -1)[-1].tolist())


def test_text_shorter_than_a_row_makes_one_that_is_not_full():
    (batch,) = validation_batches(dataset(rows=0, extra=3), 1000, 2, 0, 1)
    assert batch["shift_labels"].tolist() == [[1, 2, 3, *[-100] * 5], [-100] * 8]
    assert batch["input_ids"][0, :4].tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="more text"):
        validation_batches(dataset(rows=0, extra=0), 1000, 2, 0, 1)


@pytest.fixture
def workers() -> Callable[[], list[psutil.Process]]:
    """Tells the processes that this one has started since the test began, and that live."""
    before = set(psutil.Process().children())

    def living() -> list[psutil.Process]:
        found = set(psutil.Process().children()) - before
        return [child for child in found if child.status() != psutil.STATUS_ZOMBIE]

    return living


def test_steps_come_in_order_and_any_step_can_be_next(workers):
    feed = ReadAhead(lambda step: (step, os.getpid()), workers=2, prefetch=2, pin_memory=False)
    found = [feed.take(step) for step in range(6)]
    assert [step for step, _ in found] == list(range(6))
    assert len({process for _, process in found}) == 2 and os.getpid() not in {process for _, process in found}
    assert feed.take(100)[0] == 100 and feed.take(3)[0] == 3 and feed.take(4)[0] == 4
    feed.close()
    assert not workers()


def test_batches_are_those_of_the_process_itself():
    dataset = PackedDataset(store_of(np.arange(1000)), 8)
    sizes = {"global_batch_size": 12, "micro_batch_size": 3, "rank": 1, "world_size": 2}
    plain, fed = Loader(dataset, **sizes), Loader(dataset, **sizes, workers=2)
    for step in (0, 1, 2, 7, 8, 1):
        for one, other in zip(plain.batches(step), fed.batches(step), strict=True):
            assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    fed.close()


def test_refusal_of_a_worker_is_the_runs():
    def read(step: int) -> int:
        if step == 3:
            raise ValueError("a.jsonl, line 7: broken")
        return step

    feed = ReadAhead(read, workers=2, prefetch=2, pin_memory=False)
    assert [feed.take(step) for step in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"^a.jsonl, line 7: broken$"):
        feed.take(3)


def test_error_of_a_worker_has_its_traceback():
    def read(step: int) -> int:
        raise KeyError("shard")

    with pytest.raises(KeyError, match=r"in read\n"):
        ReadAhead(read, workers=1, prefetch=2, pin_memory=False).take(0)


@pytest.mark.parametrize("how", ["killed", "exits"])
def test_worker_that_dies_is_an_error_and_no_hang(how, workers):
    def read(step: int) -> int:
        if step == 5:
            if how == "exits":
                os._exit(3)
            time.sleep(60)
        return step

    feed = ReadAhead(read, workers=1, prefetch=1, pin_memory=False)
    assert [feed.take(step) for step in range(5)] == list(range(5))
    if how == "killed":
        (worker,) = workers()
        threading.Timer(0.5, worker.send_signal, [signal.SIGKILL]).start()
    began = time.monotonic()
    words = r"before step 5 was read: DataLoader worker .*(killed by signal: Killed|exited unexpectedly|exit code 3)"
    with pytest.raises(RuntimeError, match=words):
        feed.take(5)
    assert time.monotonic() - began < 20 and not workers()


@pytest.mark.slow
def test_workers_leave_the_runs_signals_to_the_run():
    """A launcher, or Slurm, sends them to every process; the run itself still ends its workers at once."""
    script = """
import os, signal, time
from mega_scale.data.loader import ReadAhead
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: None)
feed = ReadAhead(lambda step: (time.sleep(0.2 if step < 8 else 600), os.getpid())[1], 2, 2, False)
workers = {feed.take(step) for step in range(2)}
for number in ("TERM", "USR1", "TERM"):
    os.system("".join(f"kill -{number} {worker};" for worker in workers))  # from another process
assert {feed.take(step) for step in range(2, 8)} == workers
began = time.monotonic()
feed.close()  # they are busy for ten minutes
assert time.monotonic() - began < 15
for worker in workers:
    assert not os.path.exists(f"/proc/{worker}"), worker
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
