"""One job at a time has a run folder: whoever else asks is told who has it, and the dead have nothing."""

import json
import os
import signal
import time

import pytest

from mega_scale.files import FileLock, LockedError

QUICK = {"beat_s": 0.05, "stale_s": 0.4}


def at_once(count, act):
    """Fork processes that act at the same moment; returns the exit codes that they chose."""
    start = time.monotonic() + 0.05
    pids = []
    for _ in range(count):
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                while time.monotonic() < start:
                    pass
                code = act()
            finally:
                os._exit(code)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def leave_behind(folder, **changes):
    """The lock of a process that is dead, perhaps on another machine."""
    pid = os.fork()
    if pid == 0:
        FileLock(folder / "run.lock").attempt()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    path = folder / "run.lock"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def win(folder, others):
    """Take the lock, and hold it until so many others were refused; 0: had it, 1: was refused."""
    lock, refused = FileLock(folder / "run.lock", **QUICK), folder.with_name(f"{folder.name}-refused")
    try:
        while not lock.attempt():
            time.sleep(0.02)
    except LockedError:
        with refused.open("a") as file:
            file.write("1")
        return 1
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and (not refused.exists() or refused.stat().st_size < others):
        time.sleep(0.02)
    return 0


def test_a_second_job_is_told_who_has_the_folder_since_when_and_how_to_break_it(tmp_path):
    with FileLock(tmp_path / "run.lock"):
        with pytest.raises(LockedError) as refused:
            FileLock(tmp_path / "run.lock").attempt()
        message = str(refused.value)
        for part in (str(os.getpid()), os.uname().nodename, "since 20", f"delete {tmp_path / 'run.lock'}"):
            assert part in message
    assert not list(tmp_path.iterdir())
    with FileLock(tmp_path / "run.lock"):
        pass


@pytest.mark.parametrize("left", [{}, None, {"host": "elsewhere", "machine": "other"}, "", "[1]", '{"pid": "x"}'])
def test_of_many_jobs_at_once_exactly_one_has_a_folder_that_is_free_or_a_dead_ones(tmp_path, left):
    for round_ in range(4):
        folder = tmp_path / str(round_)
        folder.mkdir()
        if isinstance(left, dict):
            leave_behind(folder, **left)
        elif left is not None:
            (folder / "run.lock").write_text(left)
        codes = at_once(6, lambda folder=folder: win(folder, 5))
        assert sorted(codes) == [0, 1, 1, 1, 1, 1]
        assert [path.name for path in folder.iterdir()] == ["run.lock"]


def test_a_killed_owner_on_this_machine_is_known_at_once_though_its_number_is_used_again(tmp_path):
    path = leave_behind(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pid": os.getpid()}))
    began = time.monotonic()
    assert FileLock(tmp_path / "run.lock").attempt()
    assert time.monotonic() - began < 1


def test_a_zombie_holds_nothing(tmp_path):
    pid = os.fork()
    if pid == 0:
        FileLock(tmp_path / "run.lock").attempt()
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert FileLock(tmp_path / "run.lock").attempt()
    os.waitpid(pid, 0)


def test_an_owner_elsewhere_lives_while_it_touches_the_lock_whatever_its_clock_says(tmp_path):
    path = leave_behind(tmp_path, host="elsewhere", machine="other")
    os.utime(path, (0, 0))
    lock = FileLock(tmp_path / "run.lock", beat_s=5, stale_s=30)
    assert not lock.attempt() and not lock.attempt()
    os.utime(path, (5, 5))
    with pytest.raises(LockedError, match="host elsewhere"):
        lock.attempt()


def test_an_owner_elsewhere_that_no_longer_touches_the_lock_is_succeeded(tmp_path):
    leave_behind(tmp_path, host="elsewhere", machine="other")
    lock = FileLock(tmp_path / "run.lock", **QUICK)
    began = time.monotonic()
    while not lock.attempt():
        time.sleep(0.01)
    assert 0.4 < time.monotonic() - began < 3
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_job_killed_while_it_took_over_is_succeeded_too(tmp_path):
    path = leave_behind(tmp_path)
    dead = json.loads(path.read_text())
    (tmp_path / f"run.lock.after-{dead['token']}").write_text(json.dumps(dead | {"token": "half"}))
    with FileLock(tmp_path / "run.lock"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["dangling", "circular", "link to a file", "pipe"])
def test_what_is_no_file_is_replaced_like_a_lock_that_says_nothing(tmp_path, what):
    path, other = tmp_path / "run.lock", tmp_path / "other"
    other.write_text("of somebody")
    if what == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"dangling": "nowhere", "circular": "run.lock"}.get(what, "other"))
    lock = FileLock(path, **QUICK)
    assert not lock.attempt()
    time.sleep(0.5)
    assert lock.attempt() and path.is_file() and not path.is_symlink() and other.read_text() == "of somebody"
    lock.release()
    assert not path.exists()


def test_a_folder_of_that_name_is_an_error_and_no_endless_wait(tmp_path):
    (tmp_path / "run.lock").mkdir()
    with pytest.raises(OSError):
        FileLock(tmp_path / "run.lock").attempt()


def test_a_lock_that_a_living_job_lost_is_told_to_it_and_not_released_by_it(tmp_path):
    told = []
    lock = FileLock(tmp_path / "run.lock", told.append, **QUICK)
    lock.attempt()
    path = tmp_path / "run.lock"
    path.unlink()  # broken by hand; nobody else came
    time.sleep(0.3)
    assert json.loads(path.read_text())["pid"] == os.getpid() and not told
    path.write_text(json.dumps(json.loads(path.read_text()) | {"token": "another", "host": "elsewhere"}))
    deadline = time.monotonic() + 5
    while not told and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "another job has taken" in told[0] and "elsewhere" in told[0]
    lock.release()
    assert path.exists()


def test_a_living_owner_keeps_touching_it(tmp_path):
    with FileLock(tmp_path / "run.lock", beat_s=0.02):
        before = (tmp_path / "run.lock").stat().st_mtime_ns
        time.sleep(0.3)
        assert (tmp_path / "run.lock").stat().st_mtime_ns > before


def test_it_works_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    folder = tmp_path / "run"
    folder.mkdir()
    codes = at_once(4, lambda: win(folder, 3))
    assert sorted(codes) == [0, 1, 1, 1]
