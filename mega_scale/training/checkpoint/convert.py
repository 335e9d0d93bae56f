"""Rewriting a checkpoint in another number of files, or with another signature; memory for one parameter."""

import shutil
from pathlib import Path

from mega_scale.parallel import INDEX, StateReader, part_file, write_tensors
from mega_scale.training.checkpoint.files import discard, dump, flush, replace_text
from mega_scale.training.checkpoint.folder import LATEST, STATE, folder_of, newest_first, run_lock, verify
from mega_scale.training.checkpoint.manifest import Manifest, Record, hash_file, new_hash, write_manifest


def convert(folder: Path, run_dir: Path, parts: int, key: bytes | None = None, new_key: bytes | None = None) -> Path:
    """Write a checkpoint anew into another run folder; it is resumed from as the original is.

    Args:
        folder: of the checkpoint, which is verified first.
        run_dir: the other run folder.
        parts: files for the state, as so many ranks would have written them.
        key: the secret with which the checkpoint is signed, if it is.
        new_key: the secret to sign the new one with, if it is to be.

    Returns:
        Folder of the new checkpoint.

    Raises:
        ValueError: the checkpoint is damaged, the number of parts is not at least 1, or the destination holds a
            run, or a job that trains has it.
    """
    if parts < 1:
        raise ValueError(f"parts={parts} is not possible: give at least 1")
    manifest = verify(folder, key)
    run_dir.mkdir(parents=True, exist_ok=True)
    with run_lock(run_dir):
        return _write(folder, manifest, run_dir, parts, new_key)


def _write(folder: Path, manifest: Manifest, run_dir: Path, parts: int, new_key: bytes | None) -> Path:
    final = folder_of(run_dir, manifest.step)
    if final.exists():
        raise ValueError(f"{final} exists: choose another folder")
    if newest_first(run_dir):
        raise ValueError(f"{run_dir} holds a run already, which the new checkpoint would join: choose another folder")
    fresh = final.with_name(final.name + ".unfinished")
    discard(fresh)
    (fresh / STATE).mkdir(parents=True)
    small = [name for name in manifest.files if not name.startswith(f"{STATE}/")]  # what else lies there is not ours
    for name in small:
        (fresh / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, fresh / name)
    reader = StateReader(folder / STATE)
    files: dict[str, Record] = {}
    spans = []
    for part in range(parts):
        own, hashed = reader.part_of(part, parts), new_hash(new_key)
        size = write_tensors(fresh / STATE / part_file(part), own.like, hashed.update, own.read)
        files[f"{STATE}/{part_file(part)}"] = Record(size, hashed.hexdigest())
        spans.append(own.spans)
    dump(fresh / STATE / INDEX, reader.index(spans))
    for name in (*small, f"{STATE}/{INDEX}"):
        flush(fresh / name)
        files[name] = hash_file(fresh / name, new_key)
    write_manifest(fresh, Manifest(manifest.step, manifest.serial, files), new_key)
    for path in (*(path for path in fresh.rglob("*") if path.is_dir()), fresh):
        flush(path)
    fresh.rename(final)
    flush(final.parent)
    if newest_first(run_dir)[0] == final:
        replace_text(final.parent / LATEST, final.name + "\n")
    return final
