"""Processes that want the tokens of the same text at the same time have one of them made by one process."""

import os
import signal
import time
from pathlib import Path

import pytest

from mega_scale.data import DataConfig, load_datasets, load_tokenizer
from mega_scale.data.sources import Documents
from mega_scale.data.tokens import tokenise
from mega_scale.files import FileLock

TEXTS = [f"document {i} " * 9 for i in range(50)]


def forked(act) -> int:
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = act()
        finally:
            os._exit(code)
    return pid


def code_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def slow_documents(folder: Path, end: str = "") -> Documents:
    """Texts that say when they are begun, and go on once they may."""

    def read(order):
        with (folder / "begun").open("a") as file:
            file.write("1")
        wait_for(folder / "go")
        if end:
            raise ValueError(end)
        return iter(TEXTS)

    return Documents(read)


def test_of_two_processes_one_reads_and_tokenises_and_both_have_the_same_tokens(tmp_path):
    tokenizer = load_tokenizer("byte")

    def work() -> int:
        said: list[str] = []
        store = tokenise(slow_documents(tmp_path), tokenizer, tmp_path / "cache", name="name", log=said.append)
        (tmp_path / f"{os.getpid()}").write_text(store.fingerprint + "".join(said))
        return len(said)

    first = forked(work)
    wait_for(tmp_path / "begun")
    others = [forked(work) for _ in range(2)]
    time.sleep(0.5)
    (tmp_path / "go").touch()
    assert [code_of(pid) for pid in (first, *others)] == [0, 1, 1]
    assert (tmp_path / "begun").read_text() == "11"  # one hashed them, and tokenised them
    one, *rest = [(tmp_path / str(pid)).read_text() for pid in (first, *others)]
    assert all(text.startswith(one) and f"process {first}" in text for text in rest)
    assert not list((tmp_path / "cache").glob("*.lock"))


def test_what_one_process_is_refused_all_are_refused(tmp_path):
    tokenizer = load_tokenizer("byte")

    def work() -> int:
        try:
            tokenise(slow_documents(tmp_path, "too bad"), tokenizer, tmp_path / "cache", name="name")
        except ValueError as error:
            return 2 if str(error) == "too bad" else 3
        return 0

    first = forked(work)
    wait_for(tmp_path / "begun")
    second = forked(work)
    time.sleep(0.5)
    (tmp_path / "go").touch()
    assert [code_of(first), code_of(second)] == [2, 2]
    assert (tmp_path / "begun").read_text() == "1"


def test_a_process_that_dies_is_taken_over(tmp_path):
    tokenizer = load_tokenizer("byte")

    def work() -> int:
        store = tokenise(slow_documents(tmp_path), tokenizer, tmp_path / "cache", name="name")
        return int(store.documents != len(TEXTS))

    first = forked(work)
    wait_for(tmp_path / "begun")
    second = forked(work)
    time.sleep(0.5)
    os.kill(first, signal.SIGKILL)
    (tmp_path / "go").touch()
    assert [code_of(first), code_of(second)] == [-signal.SIGKILL, 0]


def test_a_run_that_starts_alone_reads_its_text_anew(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("some words " * 50)
    state = os.stat(file)
    keys = {"path": [str(file)], "cache_dir": str(tmp_path / "cache"), "validation_fraction": 0.0}
    config = DataConfig("text", **keys, sequence_length=16)
    first, _ = load_datasets(config, load_tokenizer("byte"))
    file.write_text("other word " * 50)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    second, _ = load_datasets(config, load_tokenizer("byte"))
    assert first.fingerprint != second.fingerprint


def test_a_second_preparation_of_a_folder_is_refused_while_the_first_runs(tmp_path, capsys):
    from launch.prepare import main  # noqa: PLC0415

    (tmp_path / "a.txt").write_text("some words " * 50)
    arguments = [str(tmp_path / "made"), "--processes", "1", "data.source=text", f"data.path={tmp_path / 'a.txt'}"]
    arguments.append("data.validation_fraction=0")
    main(arguments)
    assert not (tmp_path / "made/prepare.lock").exists()
    with FileLock(tmp_path / "made/prepare.lock"), pytest.raises(SystemExit) as refused:
        main(arguments)
    assert refused.value.code == 2 and f"process {os.getpid()}" in capsys.readouterr().err
