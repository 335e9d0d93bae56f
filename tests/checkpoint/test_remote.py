"""Runs in an object store, on a server of this machine that refuses requests, cuts uploads and lists late."""

import json
import shutil

import object_store
import pytest
import s3fs
from commands import exit_code
from launching import ROOT, TINY, pretrain, study

import mega_scale.object_store
from launch import checkpoint as tool
from launch import prepare
from mega_scale.checkpoint import folder as store
from mega_scale.checkpoint.remote import RemoteRun, StoreLock, split_url
from mega_scale.checkpoint.saver import flush_and_hash
from mega_scale.config import parse
from mega_scale.data import load_datasets
from mega_scale.data.tokenizer import load_tokenizer
from mega_scale.files import LockedError, is_url
from mega_scale.object_store import ObjectStore, copy_folder
from mega_scale.settings import to_yaml


@pytest.fixture(scope="module")
def server():
    with object_store.served() as running:
        yield running


@pytest.fixture(autouse=True)
def account(server, monkeypatch):
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(mega_scale.object_store, "_PAUSE_S", 0.01)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    yield
    server.fault, server.cut, server.late = lambda *_: None, lambda *_: False, False


def write(run, step, text="x" * 1000, serial=None):
    """A checkpoint as small as can be, in this host's folder."""
    folder = store.folder_of(run.folder, step)
    for name in ("state/part-00000.safetensors", "random/rank-00000.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + name)
    facts = {
        "step": step,
        "tokens": 8 * step,
        "data": {},
        "layout": {"engine": "fsdp", "zero_stage": 3, "world_size": 1},
    }
    (folder / store.TRAINER).write_text(json.dumps(facts))
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    files = {name: flush_and_hash(folder / name, None) for name in names if name != store.MANIFEST}
    store.write_manifest(folder, store.Manifest(step, serial or step, files), None)
    return folder, files


def send(run, step, **how):
    folder, files = write(run, step, **how)
    run.upload(folder, folder.name, files)
    run.complete(folder)
    return folder


def names(run):
    return list(run.checkpoints())


def test_what_is_a_url():
    assert is_url("s3://b/x") and is_url("GS://b/x") and is_url("hf://datasets/a/b/run")
    assert not any(map(is_url, (None, "", "runs/debug", "file:///x", "s3:/b/x", "./s3://b", "https://h/x", "s3:///")))
    assert split_url("s3://b/run/checkpoints/step-00000012/") == ("s3://b/run", "step-00000012")
    assert split_url("s3://b/run/") == ("s3://b/run/", None)


@pytest.mark.parametrize(
    ("url", "package"), [("gs://b/x", "gcsfs"), ("abfs://b/x", "adlfs"), ("nowhere://b/x", "nowhere")]
)
def test_a_store_whose_package_is_missing_is_named_in_one_line(url, package, tmp_path):
    with pytest.raises(ValueError, match=rf"run_dir='{url}' needs .*{package}"):
        RemoteRun(url, tmp_path)


def test_a_checkpoint_comes_back_as_it_was_on_an_empty_disk(tmp_path):
    run = RemoteRun("s3://bucket/back", tmp_path / "one")
    folders = [send(run, step, text=f"{step}" * 500) for step in (5, 10)]
    again = RemoteRun("s3://bucket/back/", tmp_path / "two")
    lines = []
    again.prepare(lines.append, resumes=True)
    assert [path.name for path in store.checkpoints(again.folder)] == ["step-00000010"] and not lines
    for name in store.verify(again.folder / "checkpoints/step-00000010").files:
        assert (again.folder / "checkpoints/step-00000010" / name).read_bytes() == (folders[1] / name).read_bytes()
    assert store.find_checkpoint(again.fetch(lines.append, step="step-00000005"))[1] == []


def test_what_fails_for_a_moment_is_tried_again_and_what_fails_for_long_is_said(server, tmp_path):
    run, failed = RemoteRun("s3://bucket/moment", tmp_path), []
    server.fault = lambda method, path: None if failed.append(path) or len(failed) % 4 else 503  # every fourth request
    send(run, 1)
    assert len(failed) > 6 and names(run) == ["step-00000001"]
    server.fault = lambda method, path: 503 if method == "PUT" else None
    folder, files = write(run, 2)
    with pytest.raises(OSError, match="s3://bucket/moment does not answer"):
        run.upload(folder, folder.name, files)
    server.fault = lambda *_: None
    assert names(run) == ["step-00000001"]


def test_an_upload_that_is_cut_is_none(server, tmp_path):
    run, cuts = RemoteRun("s3://bucket/cut", tmp_path), []
    server.cut = lambda method, path: (
        path.endswith("part-00000.safetensors") and len(cuts) < 2 and not cuts.append(path)
    )
    send(run, 1)
    assert len(cuts) == 2
    server.cut = lambda method, path: path.endswith(store.MANIFEST)
    with pytest.raises(OSError, match="does not answer"):
        send(run, 2)
    server.cut = lambda *_: False
    assert names(run) == ["step-00000001"] and run.verify("step-00000001").step == 1


def test_a_late_listing_hides_nothing(server, tmp_path):
    run = RemoteRun("s3://bucket/late", tmp_path / "one")
    send(run, 1)
    assert names(run) == ["step-00000001"]
    server.late = True
    send(run, 2)
    lines, again = [], RemoteRun("s3://bucket/late", tmp_path / "two")
    again.prepare(lines.append, resumes=True)
    assert [path.name for path in store.checkpoints(again.folder)] == ["step-00000002"] and not lines


def test_the_newest_that_is_damaged_or_gone_is_named_before_an_older_one_is_taken(tmp_path):
    run = RemoteRun("s3://bucket/damaged", tmp_path / "one")
    for step in (1, 2, 3):
        send(run, step)
    run.objects.write("checkpoints/step-00000003/state/part-00000.safetensors", b"y" * 1028)
    lines, again = [], RemoteRun("s3://bucket/damaged", tmp_path / "two")
    again.prepare(lines.append, resumes=True)
    assert [path.name for path in store.checkpoints(again.folder)] == ["step-00000002"]
    assert len(lines) == 1 and "step-00000003" in lines[0] and "does not hold what was written" in lines[0]
    with pytest.raises(ValueError, match="step-00000003 cannot be used"):
        again.fetch(lines.append, step="step-00000003")
    with pytest.raises(ValueError, match="step-00000003 cannot be used"):
        RemoteRun("s3://bucket/damaged", tmp_path / "three").fetch(lines.append, older=False)
    run.objects.delete(f"checkpoints/step-00000003/{name}" for name in ("manifest.json", "trainer.json"))
    lines.clear()
    RemoteRun("s3://bucket/damaged", tmp_path / "four").prepare(lines.append, resumes=True)
    assert "step-00000003" in lines[0] and "manifest.json is missing" in lines[0]


def test_this_host_gives_way_to_a_store_that_went_on_without_it(tmp_path):
    here, there = (RemoteRun("s3://bucket/two", tmp_path / name) for name in ("one", "two"))
    send(here, 1)
    write(here, 2, text="of this host alone")
    lines = []
    here.prepare(lines.append, resumes=True)  # nobody went on: it is the newest
    assert [path.name for path in store.checkpoints(here.folder)][-1] == "step-00000002" and "newer than all" in lines[
        0
    ]
    there.prepare(lines.append, resumes=True)
    send(there, 2)
    send(there, 3)
    here.prepare(lines.append, resumes=True)
    assert [path.name for path in store.checkpoints(here.folder)] == ["step-00000003"] and len(lines) == 1
    there.clear()
    here.prepare(lines.append, resumes=True)  # somebody has deleted the run
    assert not store.checkpoints(here.folder)


def test_one_job_at_a_time_has_a_run(tmp_path):
    objects, lost = ObjectStore("s3://bucket/lock"), []
    first = StoreLock(objects, lost.append, beat_s=0.05, stale_s=0.5)
    assert first.attempt()
    with pytest.raises(LockedError, match="in use by another job"):
        StoreLock(objects, lost.append).attempt()  # this machine knows that it lives
    foreign = json.loads(objects.read(store.LOCK)) | {"machine": "another", "token": "other"}
    # Again, should a beat of the owner come between.
    object_store.wait_for(lambda: objects.write(store.LOCK, json.dumps(foreign).encode()) or bool(lost))
    objects.write(store.LOCK, json.dumps(foreign).encode())
    assert "another job has taken s3://bucket/lock" in lost[0]
    second = StoreLock(objects, lost.append, beat_s=0.05, stale_s=0.3)
    assert not second.attempt()  # it is not known yet whether it lives
    object_store.wait_for(second.attempt)  # it did not
    second.release()
    assert objects.read(store.LOCK) is None
    dead = foreign | {"machine": json.loads(second._text())["machine"], "started": "0"}
    objects.write(store.LOCK, json.dumps(dead).encode())
    third = StoreLock(objects, lost.append)
    assert third.attempt()  # a dead process of this machine
    third.release()


def test_tools_list_verify_and_prune_a_store_as_a_disk(tmp_path, capsys):
    run = RemoteRun("s3://bucket/tools", tmp_path)
    for step in (1, 2, 3, 4):
        send(run, step)
    run.objects.write("checkpoints/step-00000003/state/part-00000.safetensors", b"y" * 1028)
    assert exit_code(tool.main, "list", run.url) == 0  # which reads no state
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines] == [f"{run.url}/checkpoints/step-{n:08d}" for n in (1, 2, 3, 4)]
    run.objects.write("checkpoints/step-00000002/state/part-00000.safetensors", b"y")
    assert exit_code(tool.main, "list", run.url) == 1
    assert "DAMAGED" in capsys.readouterr().out.splitlines()[1]
    assert exit_code(tool.main, "verify", run.url) == 1
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "valid",
        "DAMAGED",
        "DAMAGED",
        "valid",
    ]
    assert exit_code(tool.main, "verify", f"{run.url}/checkpoints/step-00000004") == 0
    assert exit_code(tool.main, "prune", run.url, "--keep", "1", "--dry-run") == 0 and len(names(run)) == 4
    assert exit_code(tool.main, "prune", run.url, "--keep", "1", "--damaged") == 0
    assert names(run) == ["step-00000004"]
    assert list(run.objects.names("checkpoints/step-00000001")) == []


def test_prepared_data_is_read_from_a_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a line of text\n" * 400)
    assert exit_code(prepare.main, "made", "data.source=text", "data.path=text.txt", "data.tokenizer=byte") == 0
    objects, url = ObjectStore("s3://bucket/data/made"), "s3://bucket/data/made"
    for path in [path for path in (tmp_path / "made").rglob("*") if path.is_file()]:
        objects.write(path.relative_to(tmp_path / "made").as_posix(), path.read_bytes())
    how = [
        f"data.cache_dir={tmp_path}/disk",
        "data.tokenizer=byte",
        "data.validation_fraction=0",
        f"run_dir={tmp_path}/r",
    ]
    mixed = [f"data.mixture={{a: {{source: prepared, path: '{url}'}}}}"]
    for keys in (["data.source=prepared", f"data.path={url}"], mixed):
        config = parse([*TINY, *keys, *how])
        config.data.validate()
        dataset, _ = load_datasets(config.data, load_tokenizer("byte"), print)
        assert dataset.tokens == 6001 and url in to_yaml(config)
    with pytest.raises(SystemExit, match="2"):
        parse([*TINY, "data.source=prepared", "data.path=s3://bucket/nothing", f"data.cache_dir={tmp_path}/disk"])
    with pytest.raises(ValueError, match="nothing lies there"):
        copy_folder("s3://no-such-bucket-here/x", tmp_path, "data.path")


@pytest.mark.distributed
@pytest.mark.slow
def test_a_run_in_a_store_goes_on_bit_for_bit_on_an_empty_disk(server, tmp_path, capsys):
    whole, url, disk = tmp_path / "whole", "s3://bucket/runs/run", f"data.cache_dir={tmp_path}/disk"
    how = ("schedule.decay=constant", "schedule.warmup_steps=0", "checkpoint.every=2", "checkpoint.keep=2", disk)
    pretrain("two forked", whole, *how, "train.steps=4")
    output = pretrain("two forked", url, *how, "train.steps=2")
    assert f"saved {url}/checkpoints/step-00000002" in output
    shutil.rmtree(tmp_path / "disk")
    output = pretrain("two forked", url, *how, "train.steps=4", "--resume=auto")
    run = RemoteRun(url, tmp_path / "other")
    assert names(run) == ["step-00000004", "step-00000002"] and run.objects.read(store.LOCK) is None
    assert json.loads(run.objects.read("status.json") or b"")["state"] == "finished"
    rows = [json.loads(line) for line in (run.objects.read("metrics.jsonl") or b"").splitlines()]
    assert {row["step"] for row in rows if row["part"] == "train"} == {1, 2, 3, 4}
    found = run.fetch(lambda _: None)
    for name in ("state/part-00000.safetensors", "state/part-00001.safetensors", "random/rank-00001.safetensors"):
        assert (found / name).read_bytes() == (whole / "checkpoints/step-00000004" / name).read_bytes()
    shutil.rmtree(tmp_path / "disk")
    config = parse([*TINY, f"run_dir={url}", disk])
    with pytest.raises(ValueError, match="holds a run already"):
        config.validate(1)


@pytest.mark.distributed
@pytest.mark.slow
def test_jobs_that_are_killed_while_they_upload_leave_nothing_wrong():
    code, output = study(ROOT / "tests/campaigns/store_kills.py", ["--kills", "2"], timeout=300)
    assert code == 0 and " 0 problems" in output, output[-3000:]
