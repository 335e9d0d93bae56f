"""What lies in a run folder is gone on with, replaced on request, or left as it is; and so it is after a kill."""

import os
import shutil
import signal

import pytest

from mega_scale import files
from mega_scale.checkpoint.folder import Manifest, checkpoints, find_checkpoint, write_manifest
from mega_scale.checkpoint.run_folder import RunFolder, check_run_folder, resume_path
from mega_scale.files import hash_file


def checkpoint(run_dir, step, serial):
    folder = run_dir / f"checkpoints/step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "trainer.json").write_text("{}")
    write_manifest(folder, Manifest(step, serial, {"trainer.json": hash_file(folder / "trainer.json", None)}), None)
    return folder


@pytest.fixture
def run_dir(tmp_path):
    """A run, and files of its user's beside those that it wrote."""
    folder = tmp_path / "run"
    checkpoint(folder, 10, 1)
    checkpoint(folder, 20, 2)
    (folder / "checkpoints/latest").write_text("step-00000020\n")
    (folder / "metrics.jsonl").write_text('{"step": 20}\n')
    (folder / "tensorboard").mkdir()
    (folder / "tensorboard/events.out.tfevents.1").write_text("points")
    for name in ("notes.txt", "checkpoints/notes.txt", "tensorboard/plot.png", "my-checkpoints/step-00000001"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    return folder


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("left", ["checkpoints", "metrics.jsonl", "all"])
@pytest.mark.parametrize("resume", [None, "{other}/checkpoints/step-00000010", "{other}"])
def test_a_run_that_the_new_one_does_not_go_on_with_is_refused(run_dir, tmp_path, left, resume):
    other = tmp_path / "other"
    shutil.copytree(run_dir, other)
    for name in {"checkpoints", "metrics.jsonl"} - {left} if left != "all" else ():
        path = run_dir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError, match=r"run_dir='.*run' holds a run already: .*--resume.*--overwrite"):
        check_run_folder(run_dir, resume and resume.format(other=other), overwrite=False)


@pytest.mark.parametrize("resume", ["latest", "auto", "{run}", "{run}/checkpoints/step-00000010", "{run}/../run"])
def test_going_on_with_it_is_not_and_going_on_with_what_is_overwritten_is(run_dir, resume):
    resume = resume.format(run=run_dir)
    check_run_folder(run_dir, resume, overwrite=False)
    with pytest.raises(ValueError, match="delete what it goes on from"):
        check_run_folder(run_dir, resume, overwrite=True)


@pytest.mark.parametrize("left", [[], ["config.yaml", "status.json", "notes.txt"], ["metrics.jsonl"]])
def test_a_folder_in_which_nothing_was_done_is_free(tmp_path, left):
    for name in left:
        (tmp_path / name).touch()
    for resume in (None, "auto", "/elsewhere"):
        check_run_folder(tmp_path, resume, overwrite=False)
        assert resume_path(tmp_path, "auto") is None


def killed(act):
    pid = os.fork()
    if pid == 0:
        try:
            act()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)


def overwrite(run_dir, begin=True, deletions=None):
    """Overwrite a run, as a job that ends after so many deletions; none: all."""
    folder = RunFolder(run_dir, None, True, print)
    assert folder.attempt(afresh=True)
    original, left = files.shutil.rmtree, [deletions]

    def rmtree(path, **_):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] = None if left[0] is None else left[0] - 1
        original(path)

    files.shutil.rmtree = rmtree
    if begin:
        folder.begin(None, None)


def test_overwriting_deletes_what_the_run_wrote_and_nothing_else(run_dir):
    killed(lambda: overwrite(run_dir))
    left = content(run_dir)
    del left["run.lock"]
    assert set(left.values()) == {b"mine"} and len(left) == 4


def test_overwriting_through_links_deletes_the_links_only(run_dir, tmp_path):
    shutil.move(run_dir / "checkpoints", tmp_path / "disk")
    (run_dir / "checkpoints").symlink_to(tmp_path / "disk")
    kept = tmp_path / "kept"
    shutil.move(tmp_path / "disk/step-00000010", kept)
    (tmp_path / "disk/step-00000010").symlink_to(kept)
    killed(lambda: overwrite(run_dir))
    assert (run_dir / "checkpoints").is_symlink() and not checkpoints(run_dir)
    assert find_checkpoint(kept)[0] == kept


@pytest.mark.parametrize("deletions", [None, 0, 1])
def test_a_kill_before_the_new_run_begins_never_leads_back_to_the_old_one(run_dir, deletions):
    """None: it had not begun, and so nothing of the old one is lost."""
    before = content(run_dir)
    killed(lambda: overwrite(run_dir, begin=deletions is not None, deletions=deletions))
    assert resume_path(run_dir, "auto") is None
    for resume, match in (("latest", r"start that run with --resume auto, or delete .*/overwriting"), (None, "holds")):
        with pytest.raises(ValueError, match=match):
            check_run_folder(run_dir, resume, overwrite=False)
    if deletions is None:
        after = content(run_dir)
        assert {name: after[name] for name in before} == before
    again = RunFolder(run_dir, "auto", False, print)
    assert again.attempt(afresh=True)
    again.begin(None, None)
    again.release()
    assert not checkpoints(run_dir) and not (run_dir / "metrics.jsonl").exists() and (run_dir / "notes.txt").exists()
    assert not (run_dir / "overwriting").exists()


@pytest.mark.parametrize("resume,words", [(None, "holds a run already"), ("auto", "start it again")])
def test_a_run_that_another_job_left_while_this_one_started_is_not_overwritten(run_dir, resume, words):
    with pytest.raises(ValueError, match=words):
        RunFolder(run_dir, resume, False, print).attempt(afresh=True)


def test_a_checkpoint_that_was_named_becomes_the_newest_so_that_a_kill_does_not_lead_to_a_later_one(run_dir):
    named = run_dir / "checkpoints/step-00000010"
    folder = RunFolder(run_dir, str(named), False, print)
    assert folder.attempt(afresh=False)
    folder.begin(named, None)
    folder.release()
    assert find_checkpoint(run_dir) == (named, [])
    assert [path.name for path in checkpoints(run_dir)] == ["step-00000020", "step-00000010"]
    before = content(run_dir)
    folder = RunFolder(run_dir, str(named), False, print)
    assert folder.attempt(afresh=False)
    folder.begin(named, None)  # it is already
    folder.release()
    assert content(run_dir) == before


def test_a_users_own_config_file_is_kept_under_another_name(tmp_path):
    for text in ("# mine", "a run's, that never began"):
        (tmp_path / "config.yaml").write_text(text)
        folder = RunFolder(tmp_path, "auto", False, print)
        assert folder.attempt(afresh=True)
        folder.begin(None, None)
        folder.release()
        assert (tmp_path / "config.yaml.before").read_text() == "# mine"
