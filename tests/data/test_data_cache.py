"""Tokens in the cache are whole or not there, and may be written by several processes at once."""

import json
import subprocess
import sys

import numpy as np
import pytest

from mega_scale.data import cache
from mega_scale.data.cache import cache_folder, fingerprint, open_tokens, write_tokens

PIECES = [(np.arange(5, dtype="<u2"), 7), (np.array([60_000], dtype="<u2"), 1)]


def test_what_is_written_is_what_is_opened(tmp_path):
    assert open_tokens(tmp_path, "key") is None
    written = write_tokens(tmp_path, "key", PIECES, "<u2")
    opened = open_tokens(tmp_path, "key")
    assert written is not None and opened is not None
    for stored in (written, opened):
        assert stored.tokens.tolist() == [0, 1, 2, 3, 4, 60_000]
        assert stored.tokens.dtype == np.uint16 and isinstance(stored.tokens, np.memmap)
        assert stored.bytes == 8
        assert stored.fingerprint == fingerprint(np.array([0, 1, 2, 3, 4, 60_000], dtype="<u2"))
    assert not list(tmp_path.glob("unfinished-*"))


def test_fingerprint_depends_on_every_token_and_their_type():
    tokens = np.arange(100, dtype="<u2")
    other = tokens.copy()
    other[50] += 1
    assert (
        len({fingerprint(tokens), fingerprint(other), fingerprint(tokens[:-1]), fingerprint(tokens.astype("<u4"))}) == 4
    )


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "no tokens", "no json", "other json"])
def test_damaged_tokens_are_not_opened_and_can_be_written_again(damage, tmp_path):
    write_tokens(tmp_path, "key", PIECES, "<u2")
    (file,) = tmp_path.glob("*.tokens")
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
        (tmp_path / "key.json").write_text("{" if damage == "no json" else json.dumps(["a list"]))
    assert open_tokens(tmp_path, "key") is None
    write_tokens(tmp_path, "key", PIECES, "<u2")
    assert open_tokens(tmp_path, "key") is not None


def test_no_tokens_are_not_stored(tmp_path):
    assert write_tokens(tmp_path, "key", [], "<u2") is None
    assert open_tokens(tmp_path, "key") is None


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


@pytest.mark.distributed
def test_several_processes_may_write_at_once(tmp_path):
    script = f"""
import runpy
import numpy as np
from pathlib import Path
cache = runpy.run_path({cache.__file__!r})
open_tokens, write_tokens = cache["open_tokens"], cache["write_tokens"]
folder = Path({str(tmp_path)!r})
for round in range(100):
    pieces = [(np.arange(1000, dtype="<u2") + i, 1) for i in range(20)]
    stored = write_tokens(folder, f"key{{round % 3}}", pieces, "<u2")
    assert stored.bytes == 20 and len(stored.tokens) == 20_000 and stored.tokens[-1] == 1018
    assert open_tokens(folder, f"key{{round % 3}}").fingerprint == stored.fingerprint
"""
    writers = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(3)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json"] * 3 + [".tokens"]
