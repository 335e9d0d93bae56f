"""Checkpoint folders: complete and proven or not there, found by run, pruned after a new one is proven."""

import contextlib
import errno
import json
import os
import time
import types
from pathlib import Path

import pytest
import torch

from mega_scale.checkpoint import saver
from mega_scale.checkpoint.folder import (
    CheckpointConfig,
    CheckpointError,
    checkpoints,
    find_checkpoint,
    read_key,
    read_state,
    strays,
    verify,
)
from mega_scale.checkpoint.saver import Saver
from mega_scale.checkpoint.state import load_checkpoint
from mega_scale.parallel.shard import EngineState, LocalTensor, Shard, Sharding
from mega_scale.parallel.world import ALONE

KEY = b"a secret of twenty-four "


class OneRank:
    """A world of one process, without a process group."""

    rank, size, local_rank, device = 0, 1, 0, torch.device("cpu")

    class at:
        tp = 0

    def axis(self, name):
        return ALONE

    def barrier(self):
        pass

    def all_agree(self, flag):
        return flag

    def sum(self, value):
        return value

    def first(self, value):
        return json.loads(json.dumps(value))

    def gather(self, value):
        return json.loads(json.dumps([value]))

    def broadcast(self, value):
        return json.loads(json.dumps(value))


class TinyEngine:
    """An engine of one parameter."""

    def __init__(self, value):
        self.tensors = {
            kind: torch.full((6,), float(value) + i) for i, kind in enumerate(("weight", "exp_avg", "exp_avg_sq"))
        }
        self.steps = torch.tensor(float(value))
        self.told = None

    def state(self):
        local = LocalTensor(torch.Size([2, 3]), Shard((0, 0), (2, 3)), 0, self.tensors, 1, 0)
        table = {"layer.weight": Sharding("layer.weight")}
        return EngineState(table, {}, 1, 0, {"layer.weight": local}, [self.steps], {})

    def loaded(self, step):
        self.told = step


DESCRIBED = {"config.yaml": b"run_dir: here\n", "model/config.json": b"{}"}


def trainer(step):
    return {"step": step, "tokens": 100 * step, "data": {}, "layout": {}}


def make_saver(run_dir, engine=None, key=None, **settings):
    return Saver(run_dir, engine or TinyEngine(1), OneRank(), DESCRIBED, CheckpointConfig(**settings), key)


def save(run_dir, step, value=1.0, key=None, **settings):
    made = make_saver(run_dir, TinyEngine(value), key, asynchronous=False, **settings)
    (ended,) = made.save(step, trainer(step))
    assert ended.problem == ""
    return ended.folder


def names(run_dir):
    return [folder.name for folder in checkpoints(run_dir)]


@pytest.mark.parametrize("key", [None, KEY])
def test_what_was_saved_comes_back_with_its_random_state(tmp_path, key):
    torch.manual_seed(5)
    torch.rand(3)
    folder = save(tmp_path, 7, 4.5, key)
    following = torch.rand(4)
    engine = TinyEngine(0)
    torch.manual_seed(0)
    assert find_checkpoint(tmp_path, key, world=OneRank()) == (folder, [])
    assert load_checkpoint(folder, engine, OneRank()) == trainer(7)
    assert engine.tensors["weight"].tolist() == [4.5] * 6 and engine.tensors["exp_avg_sq"].tolist() == [6.5] * 6
    assert engine.steps == 4 and engine.told == 7
    assert torch.equal(torch.rand(4), following)
    assert verify(folder, key).step == 7


def test_newest_is_found_and_unfinished_ones_are_not(tmp_path):
    for step in (5, 20, 100):
        save(tmp_path, step)
    unfinished = tmp_path / "checkpoints" / "step-00000300.unfinished"
    unfinished.mkdir()
    (unfinished / "trainer.json").write_text("{}")
    assert names(tmp_path) == ["step-00000005", "step-00000020", "step-00000100"]
    assert find_checkpoint(tmp_path) == (tmp_path / "checkpoints" / "step-00000100", [])
    assert find_checkpoint(tmp_path / "checkpoints" / "step-00000005")[0].name == "step-00000005"
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000100\n"


def test_the_newest_is_the_last_one_written_even_by_a_run_that_went_back(tmp_path):
    for step in (100, 200, 300, 150):
        save(tmp_path, step)
    assert checkpoints(tmp_path)[-1].name == "step-00000150"
    assert find_checkpoint(tmp_path, world=OneRank())[0].name == "step-00000150"


def test_a_background_save_is_complete_when_it_is_polled_and_sees_nothing_of_later_steps(tmp_path):
    engine = TinyEngine(3)
    made = make_saver(tmp_path, engine)
    assert made.poll() == [] and made.save(1, trainer(1)) == []
    made.wait_copied()
    engine.tensors["weight"].fill_(-1)  # training goes on
    engine.steps.fill_(4)
    while not (ended := made.poll()):
        time.sleep(0.01)
    assert [saved.folder for saved in ended] == [tmp_path / "checkpoints" / "step-00000001"]
    assert ended[0].bytes == verify(ended[0].folder).bytes > 0
    other = TinyEngine(0)
    load_checkpoint(ended[0].folder, other, OneRank())
    assert other.tensors["weight"].tolist() == [3.0] * 6 and other.steps == 3
    assert made.finish() == []


def test_a_second_save_waits_for_the_first(tmp_path, monkeypatch):
    write = saver.write_tensors

    def slowly(path, tensors, update):
        time.sleep(0.2)
        return write(path, tensors, update)

    monkeypatch.setattr(saver, "write_tensors", slowly)
    made = make_saver(tmp_path)
    assert made.save(1, trainer(1)) == [] and made.poll() == []
    assert [saved.step for saved in made.save(2, trainer(2))] == [1]
    assert [saved.step for saved in made.finish()] == [2]
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_write_that_fails_is_reported_and_leaves_older_checkpoints_alone(tmp_path, monkeypatch, asynchronous):
    save(tmp_path, 5)

    def fail(path, tensors, update):
        raise OSError(28, os.strerror(28), str(path))

    made = make_saver(tmp_path, asynchronous=asynchronous, keep=1)
    with monkeypatch.context() as patched:
        patched.setattr(saver, "write_tensors", fail)
        (ended,) = made.save(10, trainer(10)) + made.finish()
    assert ended.folder is None and "rank 0: No space left on device" in ended.problem
    assert (
        names(tmp_path) == ["step-00000005"] and find_checkpoint(tmp_path, world=OneRank())[0].name == "step-00000005"
    )
    assert not list((tmp_path / "checkpoints").glob("*.unfinished"))
    (ended,) = made.save(15, trainer(15)) + made.finish()
    assert ended.folder is not None and names(tmp_path) == ["step-00000015"]


def test_what_does_not_read_back_is_no_checkpoint(tmp_path, monkeypatch):
    write = saver.write_tensors

    def lose(path, tensors, update):
        size = write(path, tensors, update)
        path.write_bytes(bytes(size))
        return size

    monkeypatch.setattr(saver, "write_tensors", lose)
    (ended,) = make_saver(tmp_path, asynchronous=False).save(10, trainer(10))
    assert "does not read back as it was written" in ended.problem and names(tmp_path) == []


def test_a_disk_without_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    class Full:
        free = 1000

    monkeypatch.setattr(saver.shutil, "disk_usage", lambda path: Full)
    (ended,) = make_saver(tmp_path).save(10, trainer(10))
    assert "1,000 are free" in ended.problem and "make room" in ended.problem
    assert not list((tmp_path / "checkpoints").iterdir())


def test_only_the_newest_and_every_nth_are_kept(tmp_path):
    for step in range(1, 9):
        save(tmp_path, step, keep=2, keep_every=3)
    assert names(tmp_path) == [f"step-0000000{step}" for step in (3, 6, 7, 8)]


def test_a_run_killed_while_it_deleted_a_checkpoint_leaves_no_damaged_one(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step)
    # What a kill in the middle of a deletion leaves: some of the files.
    monkeypatch.setattr(saver.shutil, "rmtree", lambda folder, **_: (folder / "trainer.json").unlink(missing_ok=True))
    save(tmp_path, 3, keep=2)
    monkeypatch.undo()
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    for folder in checkpoints(tmp_path):
        verify(folder)
    make_saver(tmp_path)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3  # and the pointer


def test_a_step_saved_again_replaces_the_earlier_one(tmp_path):
    save(tmp_path, 3, 1)
    folder = save(tmp_path, 3, 2)
    engine = TinyEngine(0)
    load_checkpoint(folder, engine, OneRank())
    assert engine.tensors["weight"][0] == 2
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000003"]


def test_a_run_killed_while_it_replaced_a_checkpoint_gets_it_back(tmp_path, monkeypatch):
    def fail(path, target):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    folder = save(tmp_path, 3)
    folder.rename(folder.with_name(folder.name + ".replaced"))
    (folder.parent / "step-00000004.unfinished").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", fail)  # as on a disk that is out of order: it waits for the next run
        make_saver(tmp_path)
    assert names(tmp_path) == []
    make_saver(tmp_path)
    assert names(tmp_path) == ["step-00000003"] and verify(folder).step == 3
    assert not list(folder.parent.glob("*.unfinished"))


def test_a_damaged_one_is_passed_over_with_a_line_but_refused_when_it_was_named(tmp_path):
    older, newer = save(tmp_path, 3), save(tmp_path, 6)
    part = newer / "state" / "part-00000.safetensors"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    found, lines = find_checkpoint(tmp_path, world=OneRank())
    assert found == older and len(lines) == 1 and "part-00000.safetensors does not hold what was written" in lines[0]
    with pytest.raises(CheckpointError, match="step-00000006 is no valid checkpoint"):
        find_checkpoint(newer, world=OneRank())
    with pytest.raises(CheckpointError, match="step-00000006"):
        verify(newer)
    older.joinpath("trainer.json").unlink()
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints .* is valid.*trainer\.json is missing"):
        find_checkpoint(tmp_path, world=OneRank())
    with pytest.raises(CheckpointError, match=r"trainer\.json is missing; resume from .*step-00000006"):
        find_checkpoint(older)


def test_a_signature_is_required_where_there_is_a_key_and_a_key_where_there_is_a_signature(tmp_path):
    signed, plain = save(tmp_path / "signed", 1, key=KEY), save(tmp_path / "plain", 1)
    with pytest.raises(CheckpointError, match=r"it is signed: set checkpoint\.key_file"):
        verify(signed)
    with pytest.raises(CheckpointError, match="it is not signed with a secret"):
        verify(plain, KEY)
    with pytest.raises(CheckpointError, match="signed with another secret"):
        verify(signed, KEY + b"x")
    short = tmp_path / "key"
    short.write_bytes(b"short\n")
    with pytest.raises(ValueError, match=r"checkpoint\.key_file=.* holds 5 bytes"):
        read_key(str(short))
    with pytest.raises(ValueError, match="cannot be read"):
        read_key(str(tmp_path / "none"))


def test_another_model_is_refused_before_anything_changes(tmp_path):
    folder = save(tmp_path, 3, 9)
    engine = TinyEngine(1)
    engine.tensors = {kind: tensor[:4] for kind, tensor in engine.tensors.items()}
    engine.state = lambda: EngineState(
        {"layer.weight": Sharding("layer.weight")},
        {},
        1,
        0,
        {"layer.weight": LocalTensor(torch.Size([2, 2]), Shard((0, 0), (2, 2)), 0, engine.tensors, 1, 0)},
        [engine.steps],
        {},
    )
    with pytest.raises(ValueError, match=r"layer\.weight is \(2, 3\) there and \(2, 2\) here"):
        load_checkpoint(folder, engine, OneRank())
    assert engine.tensors["weight"].tolist() == [1.0] * 4


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"manifest\.json"):
        find_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="neither a checkpoint"):
        find_checkpoint(tmp_path, world=OneRank())
    (tmp_path / "trainer.json").write_text("{broken")
    with pytest.raises(ValueError, match="cannot be read"):
        read_state(tmp_path)


def test_a_pointer_that_is_stale_or_missing_is_told(tmp_path):
    folder = save(tmp_path, 3)
    pointer = tmp_path / "checkpoints" / "latest"
    pointer.write_text("step-00000001\n")
    found, lines = find_checkpoint(tmp_path)
    assert found == folder and r"holds 'step-00000001\n', step-00000003 is the newest" in lines[0]
    pointer.unlink()
    assert "is missing" in find_checkpoint(tmp_path)[1][0]


def test_a_pointer_that_cannot_be_written_is_reported_and_the_checkpoint_counts(tmp_path, monkeypatch):
    def fail(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(saver, "replace_text", fail)
    (ended,) = make_saver(tmp_path, asynchronous=False).save(10, trainer(10))
    assert ended.folder is not None and ended.problem == "latest still names another: No space left on device"
    assert find_checkpoint(tmp_path)[0] == ended.folder and verify(ended.folder).step == 10


def test_a_new_checkpoint_is_never_deleted_for_a_damaged_one_that_seems_newer(tmp_path):
    save(tmp_path, 3)
    damaged = save(tmp_path, 6)
    (damaged / "manifest.json").write_text("{")
    folder = save(tmp_path, 5, keep=1)  # continued from step 3
    assert names(tmp_path) == ["step-00000005"] and verify(folder).step == 5


def test_a_run_that_went_on_beside_a_damaged_checkpoint_resumes_from_its_own(tmp_path):
    save(tmp_path, 3)
    damaged = save(tmp_path, 6)
    (damaged / "manifest.json").write_text("{")
    assert checkpoints(tmp_path)[-1] == damaged
    save(tmp_path, 5)
    assert find_checkpoint(tmp_path, world=OneRank())[0].name == "step-00000005"


@pytest.mark.parametrize("name", ["manifest.json", "trainer.json", "state/part-00000.safetensors"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path, name):
    folder = save(tmp_path, 3)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=name):
        find_checkpoint(tmp_path, world=OneRank())
    with pytest.raises(CheckpointError, match=name):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("target", ["/dev/zero", "/etc", "."])
def test_links_beside_files_are_not_followed_and_those_in_place_of_files_refused(tmp_path, target):
    folder = save(tmp_path, 3)
    (folder / "state" / "more").symlink_to(target)
    assert strays(folder, verify(folder)) == ["state/more"]
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").symlink_to(target)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        verify(folder)


def test_a_folder_that_is_only_linked_is_refused(tmp_path):
    folder = save(tmp_path, 3)
    (folder / "state").rename(tmp_path / "elsewhere")
    (folder / "state").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="state is a link"):
        verify(folder)


def test_the_thread_that_copies_takes_its_rank_s_gpu_first(monkeypatch):
    """A thread begins on the first GPU, in which leaving the stream would make a context of every rank of a host."""
    calls = []

    @contextlib.contextmanager
    def stream(which):
        calls.append("stream")
        yield

    staging = saver.Staging(torch.device("cpu"))
    staging.copy({"a": torch.zeros(64)})  # the buffer, which would be locked in memory
    staging._stream = types.SimpleNamespace(device=torch.device("cuda", 3), synchronize=lambda: calls.append("wait"))
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    assert torch.equal(staging.copy({"a": torch.ones(64)})["a"], torch.ones(64))
    assert calls == [torch.device("cuda", 3), "stream", "wait"]


def test_memory_beside_a_gpu_is_locked_as_it_is_needed_and_not_by_powers_of_two(monkeypatch):
    locked, asked = {}, []
    empty = torch.empty

    class Cudart:
        def cudaHostRegister(self, address, size, flags):
            locked[address] = size
            return self.answer

        def cudaHostUnregister(self, address):
            del locked[address]
            return 0

    def check(code):
        if code:
            raise RuntimeError("out of memory")

    cudart = Cudart()
    cudart.answer = 0
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "check_error", check)
    monkeypatch.setattr(torch, "empty", lambda size, **how: asked.append((size, how)) or empty(min(size, 64), **how))
    staging = saver.Staging(torch.device("cpu"))
    staging._stream = object()
    for size in (10_500_000_000, 3_000_000_001, 2**33 + 64):  # the largest so far is taken, and given back
        staging._allocate(size)
        assert list(locked.values()) == [size] and asked[-1] == (size, {"dtype": torch.uint8})
    cudart.answer = 2
    with pytest.warns(RuntimeWarning, match=r"11,000,000,000 bytes .* cannot be locked \(out of memory\)"):
        staging._allocate(11_000_000_000)
    locked.clear()
    cudart.answer = 0
    staging._allocate(12_000_000_000)
    assert list(locked.values()) == [12_000_000_000]


def test_the_room_for_a_copy_is_what_its_tensors_take():
    staging = saver.Staging(torch.device("cpu"))
    tensors = {str(number): torch.zeros(1000 + number, dtype=torch.bfloat16) for number in range(50)}
    staging.copy(tensors)
    needed = sum(tensor.nbytes for tensor in tensors.values())
    assert needed <= staging._buffer.nbytes <= needed + 64 * len(tensors)


def test_what_the_next_step_changes_is_not_in_an_asynchronous_checkpoint(tmp_path, monkeypatch):
    """The copy is made beside the next forward and backward pass; the optimizer waits for it."""
    engine, copy, copied = TinyEngine(2), saver.Staging.copy, []

    def slow(staging, tensors):
        time.sleep(0.3)
        copied.append(True)
        return copy(staging, tensors)

    monkeypatch.setattr(saver.Staging, "copy", slow)
    made = make_saver(tmp_path, engine)
    began = time.perf_counter()
    assert made.save(1, trainer(1)) == [] and not copied
    assert time.perf_counter() - began < 0.2
    made.wait_copied()
    assert copied
    for tensor in engine.tensors.values():
        tensor.fill_(99)
    engine.steps.fill_(99)
    (ended,) = made.finish()
    assert ended.stall_s >= 0.3
    loaded = TinyEngine(0)
    load_checkpoint(ended.folder, loaded, OneRank())
    assert loaded.tensors["weight"].tolist() == [2.0] * 6 and loaded.steps == 2


def test_a_copy_that_fails_is_a_checkpoint_that_could_not_be_written(tmp_path, monkeypatch):
    def fail(staging, tensors):
        raise MemoryError("no room for the copy")

    monkeypatch.setattr(saver.Staging, "copy", fail)
    made = make_saver(tmp_path)
    made.save(1, trainer(1))
    made.wait_copied()
    (ended,) = made.finish()
    assert ended.folder is None and "no room for the copy" in ended.problem and not checkpoints(tmp_path)
