"""Tokens in the cache are whole or not there, and of processes that want the same ones, one makes them."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from mega_scale.data import DataConfig, load_datasets, load_tokenizer
from mega_scale.data.config import cache_folder
from mega_scale.data.sources import Documents
from mega_scale.data.tokenizer import Encoded
from mega_scale.data.tokens import open_tokens, tokenise, write_tokens
from mega_scale.files import FileLock

PIECES = [
    Encoded(np.arange(5, dtype="<u2"), np.array([2, 5]), np.array([3, 7])),
    Encoded(np.array([60_000], dtype="<u2"), np.array([1]), np.array([1])),
]


def test_what_is_written_is_what_is_opened(tmp_path):
    assert open_tokens(tmp_path, "key") is None
    written = write_tokens(tmp_path, "key", PIECES, "<u2")
    opened = open_tokens(tmp_path, "key")
    assert opened is not None and opened.fingerprint == written.fingerprint
    for stored in (written, opened):
        found = np.zeros(6, np.int64)
        stored.read(0, 6, found)
        assert found.tolist() == [0, 1, 2, 3, 4, 60_000]
        assert stored.bounds(0, 3).tolist() == [0, 2, 5, 6]
        assert (stored.tokens, stored.documents, stored.bytes) == (6, 3, 8)
    assert not list(tmp_path.glob("unfinished-*"))


def test_fingerprint_depends_on_every_token_and_on_where_documents_end(tmp_path):
    def fingerprint(tokens: list[int], ends: list[int], dtype: str = "<u2") -> str:
        piece = Encoded(np.array(tokens), np.array(ends), np.array(ends))
        return write_tokens(tmp_path, str((tokens, ends, dtype)), [piece], dtype).fingerprint

    first = fingerprint([1, 2, 3, 4], [2, 4])
    others = [fingerprint([1, 2, 9, 4], [2, 4]), fingerprint([1, 2, 3, 4], [3, 4]), fingerprint([1, 2, 3], [3])]
    assert len({first, *others, fingerprint([1, 2, 3, 4], [2, 4], "<u4")}) == 5


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "no tokens", "no json", "other json"])
def test_damaged_tokens_are_not_opened_and_can_be_written_again(damage, tmp_path):
    write_tokens(tmp_path, "key", PIECES, "<u2")
    (file,) = tmp_path.glob("key/*.tokens")
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[3] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-3])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "no tokens":
        file.unlink()
    else:
        (tmp_path / "key/manifest.json").write_text("{" if damage == "no json" else json.dumps(["a list"]))
    assert open_tokens(tmp_path, "key") is None
    write_tokens(tmp_path, "key", PIECES, "<u2")
    assert open_tokens(tmp_path, "key") is not None


def test_no_documents_are_stored_like_any(tmp_path):
    for stored in (write_tokens(tmp_path, "key", [], "<u2"), open_tokens(tmp_path, "key")):
        assert stored is not None and (stored.tokens, stored.documents, stored.bytes) == (0, 0, 0)


def test_interrupted_writing_leaves_nothing(tmp_path):
    def pieces():
        yield PIECES[0]
        raise ValueError("unreadable text")

    with pytest.raises(ValueError, match="unreadable text"):
        write_tokens(tmp_path, "key", pieces(), "<u2")
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written.*data.cache_dir"):
        write_tokens(tmp_path / "file" / "cache", "key", PIECES, "<u2")


def test_folder_is_the_users_unless_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / ".cache" / "mega_scale"
    assert cache_folder("~/mine") == tmp_path / "mine"


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


def test_several_processes_may_write_at_once(tmp_path):
    def work() -> int:
        for i in range(9):
            pieces = [Encoded(np.arange(1000, dtype="<u2") + i, np.array([1000]), np.array([1])) for i in range(20)]
            stored = write_tokens(tmp_path, f"key{i % 3}", pieces, "<u2")
            assert stored.bytes == 20 and stored.tokens == 20_000
            opened = open_tokens(tmp_path, f"key{i % 3}")
            assert opened is not None and opened.fingerprint == stored.fingerprint
        return 0

    assert [code_of(pid) for pid in [forked(work) for _ in range(3)]] == [0, 0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key0", "key1", "key2"]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def cached_in(folder: Path) -> DataConfig:
    return DataConfig(cache_dir=str(folder / "cache"))


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
        store = tokenise(slow_documents(tmp_path), tokenizer, cached_in(tmp_path), "name", log=said.append)
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
            tokenise(slow_documents(tmp_path, "too bad"), tokenizer, cached_in(tmp_path), "name")
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
        store = tokenise(slow_documents(tmp_path), tokenizer, cached_in(tmp_path), "name")
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


def test_a_second_preparation_of_a_folder_is_refused_while_the_first_runs(tmp_path):
    from launch.prepare import main  # noqa: PLC0415

    (tmp_path / "a.txt").write_text("some words " * 50)
    arguments = [str(tmp_path / "made"), "--processes", "1", "data.source=text", f"data.path={tmp_path / 'a.txt'}"]
    arguments.append("data.validation_fraction=0")
    main(arguments)
    assert not (tmp_path / "made/prepare.lock").exists()
    with FileLock(tmp_path / "made/prepare.lock"), pytest.raises(ValueError, match=f"process {os.getpid()}"):
        main(arguments)
