"""What file systems, desktops and people leave in a run folder, and links in place of its folders."""

import os
import shutil

import pytest
from test_checkpoint import DESCRIBED, OneRank, TinyEngine, make_saver, names, save, trainer

from mega_scale.checkpoint import saver
from mega_scale.checkpoint.folder import CheckpointConfig, find_checkpoint, prune, strays, verify
from mega_scale.checkpoint.saver import Saver
from mega_scale.checkpoint.state import convert, load_checkpoint

STRAYS = [
    ".nfs000000000a1b2c3d00000001", ".DS_Store", "notes.txt", "._trainer.json", "Thumbs.db", "state/desktop.ini",
    "model/.config.json.swp", "random/#rank-00000.safetensors#", "@eaDir/trainer.json/note", "model/added_tokens.json",
    "state/part-00001.safetensors", "random/rank-00007.safetensors", "model/tokenizer.py", "name with\nline",
]  # fmt: skip


def leave(folder, name):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x00 left here")
    return path


@pytest.mark.parametrize("name", STRAYS)
def test_a_stray_file_voids_nothing_and_is_named_in_one_line(tmp_path, name):
    save(tmp_path, 3)
    newest = save(tmp_path, 6, 2.0)
    leave(newest, name)
    verify(newest)
    found, lines = find_checkpoint(tmp_path, world=OneRank())
    assert found == newest
    assert len(lines) == 1 and repr(name.split("/")[0] if name.startswith("@") else name) in lines[0]
    assert find_checkpoint(tmp_path) == (newest, lines) and find_checkpoint(newest) == (newest, lines)
    engine = TinyEngine(0)
    load_checkpoint(newest, engine, OneRank())
    assert engine.tensors["weight"].tolist() == [2.0] * 6


def test_a_random_state_that_is_none_of_the_checkpoint_is_not_loaded(tmp_path):
    class LaterRank(OneRank):
        rank = 7

    folder = save(tmp_path, 3)
    leave(folder, "random/rank-00007.safetensors")
    load_checkpoint(folder, TinyEngine(0), LaterRank())


def test_many_strays_are_one_line_that_ends(tmp_path):
    folder = save(tmp_path, 3)
    for number in range(100):
        leave(folder, f"left-{number:03d}")
    (line,) = find_checkpoint(tmp_path)[1]
    assert "and 97 more" in line and len(line) < 300


def test_strays_beside_checkpoints_and_in_the_run_folder_void_nothing(tmp_path):
    newest = save(tmp_path, 3)
    for name in (
        "manifest.json",
        "trainer.json",
        "config.json",
        ".DS_Store",
        "checkpoints/.nfs01",
        "checkpoints/x.txt",
    ):
        leave(tmp_path, name)
    leave(tmp_path, "checkpoints/step-00000009")
    leave(tmp_path, "checkpoints/step-00000009 copy/manifest.json")
    assert find_checkpoint(tmp_path) == (newest, [])
    assert save(tmp_path, 9).is_dir() and names(tmp_path) == ["step-00000003", "step-00000009"]


def test_what_a_file_system_leaves_while_a_save_runs_is_none_of_the_checkpoint(tmp_path, monkeypatch):
    write = saver.write_tensors

    def write_meanwhile(path, *args):
        for name in (".DS_Store", "model/._config.json"):
            leave(path.parents[1], name)
        return write(path, *args)

    monkeypatch.setattr(saver, "write_tensors", write_meanwhile)
    config = CheckpointConfig(asynchronous=False)
    (ended,) = Saver(tmp_path, TinyEngine(1), OneRank(), DESCRIBED, config).save(3, trainer(3))
    assert {".DS_Store", "model/._config.json"} <= set(strays(ended.folder, verify(ended.folder)))


def test_conversion_leaves_strays_behind_and_names_the_newest(tmp_path):
    folder = save(tmp_path / "one", 3)
    leave(folder, "model/added_tokens.json")
    leave(folder, "@eaDir/x")
    made = convert(folder, tmp_path / "other", 1)
    assert strays(made, verify(made)) == [] and not (made / "@eaDir").exists()
    assert find_checkpoint(tmp_path / "other") == (made, [])


def test_retention_deletes_a_checkpoint_with_strays(tmp_path):
    leave(save(tmp_path, 3), "@eaDir/x")
    save(tmp_path, 6, keep=1)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step-00000006"]


def linked(folder, elsewhere):
    shutil.move(folder, elsewhere)
    folder.symlink_to(elsewhere)
    return elsewhere


def test_of_a_linked_checkpoint_retention_deletes_the_link_alone(tmp_path):
    archived = linked(save(tmp_path, 3), tmp_path / "archive")
    verify(tmp_path / "checkpoints" / "step-00000003")
    save(tmp_path, 6, keep=1)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step-00000006"]
    assert (archived / "manifest.json").is_file() and (archived / "state" / "part-00000.safetensors").is_file()


@pytest.mark.parametrize("dangling", [False, True])
def test_a_linked_checkpoint_that_is_written_anew_leaves_what_was_linked(tmp_path, dangling):
    archived = linked(save(tmp_path, 3), tmp_path / "archive")
    if dangling:
        archived.rename(tmp_path / "moved")
    folder = save(tmp_path, 3, 5.0)
    assert not folder.is_symlink() and verify(folder).step == 3
    assert ((tmp_path / "moved") if dangling else archived).joinpath("manifest.json").is_file()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step-00000003"]


def test_linked_checkpoints_folders_and_hard_links_are_kept_as_any_other(tmp_path):
    save(tmp_path, 3)
    elsewhere = linked(tmp_path / "checkpoints", tmp_path / "scratch")
    (tmp_path / "copy").mkdir()
    os.link(elsewhere / "step-00000003" / "trainer.json", tmp_path / "copy" / "trainer.json")
    save(tmp_path, 6, keep=1)
    assert sorted(os.listdir(elsewhere)) == ["latest", "step-00000006"]
    assert (tmp_path / "copy" / "trainer.json").read_text().startswith("{")


def test_what_a_killed_deletion_left_is_gone_after_the_next_save(tmp_path):
    made = make_saver(tmp_path, asynchronous=False, keep=2)
    made.save(3, trainer(3))
    kept = leave(tmp_path / "elsewhere", "kept").parent
    leave(tmp_path / "checkpoints" / "step-00000001.deleted", "state/part-00000.safetensors")
    (tmp_path / "checkpoints" / "step-00000002.deleted").symlink_to(kept)
    made.save(6, trainer(6))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step-00000003", "step-00000006"]
    assert (kept / "kept").is_file()
    leave(tmp_path / "checkpoints" / "step-00000001.deleted", "x")
    prune(tmp_path, 1)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step-00000006"]
