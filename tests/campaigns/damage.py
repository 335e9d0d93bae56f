"""What disks, file systems and people do to the files of a checkpoint, drawn from a seed."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGE = 4096


def files(folder: Path) -> list[str]:
    """Every file of a folder, relative to it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def flip(path: Path, draw: random.Random) -> None:
    """One bit."""
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def zero_page(path: Path, draw: random.Random) -> None:
    """One page of 4 KiB reads as zeros, as after a lost write."""
    content = bytearray(path.read_bytes())
    first = draw.randrange(len(content)) // PAGE * PAGE
    last = min(first + PAGE, len(content))
    content[first:last] = bytes(last - first)
    path.write_bytes(content)


def truncate(path: Path, draw: random.Random) -> None:
    """The end is missing."""
    os.truncate(path, draw.randrange(path.stat().st_size))


def empty(path: Path, draw: random.Random) -> None:
    """All of it is missing, but not the name."""
    os.truncate(path, 0)


def append(path: Path, draw: random.Random) -> None:
    """There is more than was written."""
    with path.open("ab") as file:
        file.write(draw.randbytes(draw.choice((1, 8, PAGE))))


def delete(path: Path, draw: random.Random) -> None:
    """The name is missing too."""
    path.unlink()


def link(path: Path, draw: random.Random) -> None:
    """A link to the right content, which is not the checkpoint's own."""
    elsewhere = path.parents[3] / f"elsewhere-{path.name}"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def make_folder(path: Path, draw: random.Random) -> None:
    """A folder of that name."""
    path.unlink()
    path.mkdir()


OF_ONE_FILE: dict[str, Callable[[Path, random.Random], None]] = {
    "bit flip": flip,
    "zeroed page": zero_page,
    "truncated": truncate,
    "emptied": empty,
    "bytes appended": append,
    "deleted": delete,
}


def swap(kind: str, folder: Path, name: str, older: Path, draw: random.Random) -> list[str] | None:
    """Whole files in the wrong place; returns what has to be named, none where nothing was changed."""
    if kind == "two files swapped":
        return two_swapped(folder, name, draw)
    if kind == "file of the older checkpoint":
        return of_older(folder, name, older)
    return extra(folder, name, draw)


def two_swapped(folder: Path, name: str, draw: random.Random) -> list[str] | None:
    """Two files have each other's content; none where there are no two that differ."""
    content = (folder / name).read_bytes()
    others = [other for other in files(folder) if other != name and (folder / other).read_bytes() != content]
    if not others:
        return None
    other = draw.choice(others)
    (folder / name).write_bytes((folder / other).read_bytes())
    (folder / other).write_bytes(content)
    return [name, other]


def of_older(folder: Path, name: str, older: Path) -> list[str] | None:
    """The older checkpoint's file of that name; none where it is the same."""
    if not (older / name).is_file() or (older / name).read_bytes() == (folder / name).read_bytes():
        return None
    shutil.copyfile(older / name, folder / name)
    return [name]


def extra(folder: Path, name: str, draw: random.Random) -> list[str]:
    """Something that does not belong there, beside a file: a file, a folder, a link to a folder."""
    added = (folder / name).with_name(draw.choice(("part-00007.safetensors", "left-over", ".hidden")))
    kind = draw.randrange(3)
    if kind == 0:
        added.write_bytes(draw.randbytes(draw.choice((0, 100))))
    elif kind == 1:
        added.mkdir()
    else:
        added.symlink_to("/etc")
    return [added.relative_to(folder).as_posix()]


def _entry(manifest: dict[str, Any], draw: random.Random) -> list[Any]:
    return draw.choice(list(manifest["files"].values()))


# Each changes the parsed manifest, or returns other bytes to stand in its place.
MANIFEST_EDITS: dict[str, Callable[[dict[str, Any], random.Random], bytes | None]] = {
    "entry removed": lambda m, draw: m["files"].pop(draw.choice(sorted(m["files"]))) and None,
    "entry added": lambda m, draw: m["files"].update({"state/part-00009.safetensors": [8, "0" * 32]}),
    "entry renamed": lambda m, draw: m["files"].update(other=m["files"].pop(draw.choice(sorted(m["files"])))),
    "hash replaced": lambda m, draw: _entry(m, draw).__setitem__(1, f"{draw.getrandbits(128):032x}"),
    "size edited": lambda m, draw: _entry(m, draw).__setitem__(0, draw.randrange(10**6)),
    "size of another type": lambda m, draw: _entry(m, draw).__setitem__(0, None),
    "step edited": lambda m, draw: m.update(step=draw.choice((0, 3, 7, -1, 10**12, "6", None))),
    "serial edited": lambda m, draw: m.update(serial=draw.choice((0, 1, 3, -1, 10**12, "2", None))),
    "format edited": lambda m, draw: m.update(format=draw.choice((0, 2, "1", None))),
    "algorithm edited": lambda m, draw: m.update(hash=draw.choice(("none", "hmac-sha256", "", None))),
    "digest replaced": lambda m, draw: m.update(digest=draw.choice(("", "0" * 32, "é", 5, None))),
    "key removed": lambda m, draw: m.pop(draw.choice(sorted(m))) and None,
    "key added": lambda m, draw: m.update(note="harmless"),
    "of another shape": lambda m, draw: draw.choice((b"[]", b"null", b"3", b'"manifest"', b'{"files": []}')),
    "no JSON": lambda m, draw: draw.choice((b"{", b"not json", b"\xff\xfe", b"\x80\x04.", b"[" * 100_000)),
    "spaced otherwise": lambda m, draw: json.dumps(m).encode(),
    "key given twice": lambda m, draw: b'{"step": 3,' + json.dumps(m).encode()[1:],
}


def edit_manifest(path: Path, draw: random.Random) -> str:
    """One of the edits; returns its name."""
    kind = draw.choice(sorted(MANIFEST_EDITS))
    before = path.read_bytes()
    while path.read_bytes() == before:  # an edit may draw what was there
        content = json.loads(before)
        other = MANIFEST_EDITS[kind](content, draw)
        path.write_bytes((json.dumps(content, indent=1) + "\n").encode() if other is None else other)
    return kind


STALE = b"step-00000003\n"
POINTERS = (b"", b"step-00000009\n", b"\x00" * 14, b"\xff\xfe\x00", b"../../etc\n", b"x" * 10_000)


def damage_pointer(pointer: Path, draw: random.Random) -> None:
    """What `latest` says becomes something else."""
    before = pointer.read_bytes()
    while pointer.exists() and pointer.read_bytes() == before:
        kind = draw.choice([*OF_ONE_FILE, "another word", "another word"])
        if kind == "another word":
            pointer.write_bytes(draw.choice(POINTERS))
        else:
            OF_ONE_FILE[kind](pointer, draw)


def _renamed(newer: Path, older: Path) -> tuple[list[str], bool]:
    newer.rename(newer.with_name("step-00000009"))
    return ["manifest.json"], True


def _unnamed(newer: Path, older: Path) -> tuple[list[str], bool]:
    newer.rename(newer.with_name("step-6"))
    return ["latest"], True


def _gone(newer: Path, older: Path) -> tuple[list[str], bool]:
    shutil.rmtree(newer)
    return ["latest"], True


def _older_again(newer: Path, older: Path) -> tuple[list[str], bool]:
    shutil.rmtree(newer)
    shutil.copytree(older, newer)
    return ["manifest.json"], True


def _exchanged(newer: Path, older: Path) -> tuple[list[str], bool]:
    aside = newer.with_name("aside")
    newer.rename(aside)
    older.rename(newer)
    aside.rename(older)
    return ["manifest.json"], False


def _tensors_gone(newer: Path, older: Path) -> tuple[list[str], bool]:
    shutil.rmtree(newer / "state")
    return ["state/"], True


def _a_file(newer: Path, older: Path) -> tuple[list[str], bool]:
    shutil.rmtree(newer)
    newer.write_text("a file")
    return ["latest"], True


# Each damages the newer checkpoint's folder; returns what has to be named, and whether the older one is still whole.
FOLDERS: dict[str, Callable[[Path, Path], tuple[list[str], bool]]] = {
    "renamed to another step": _renamed,
    "renamed to no checkpoint's name": _unnamed,
    "deleted": _gone,
    "replaced by the older one": _older_again,
    "exchanged with the older one": _exchanged,
    "its state folder deleted": _tensors_gone,
    "replaced by a file": _a_file,
}
