"""Tokens in the cache are whole or not there, and may be written by several processes at once."""

import json
import subprocess
import sys

import numpy as np
import pytest

from mega_scale.data.config import cache_folder
from mega_scale.data.tokenizer import Encoded
from mega_scale.data.tokens import open_tokens, write_tokens

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
        assert stored.ends(0, 3).tolist() == [2, 5, 6]
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


@pytest.mark.distributed
def test_several_processes_may_write_at_once(tmp_path):
    script = f"""
from pathlib import Path
import numpy as np
from mega_scale.data.tokens import open_tokens, write_tokens
from mega_scale.data.tokenizer import Encoded
folder = Path({str(tmp_path)!r})
for round in range(20):
    pieces = [Encoded(np.arange(1000, dtype="<u2") + i, np.array([1000]), np.array([1])) for i in range(20)]
    stored = write_tokens(folder, f"key{{round % 3}}", pieces, "<u2")
    assert stored.bytes == 20 and stored.tokens == 20_000
    assert open_tokens(folder, f"key{{round % 3}}").fingerprint == stored.fingerprint
"""
    writers = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(3)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key0", "key1", "key2"]
