"""A folder of prepared data: token files, and a manifest that says what they are.

`manifest.json` is written last and under another name first, so a folder that has one is whole. It holds the hash of
the tokenizer, the type of the tokens, the shards of every part ("train", "validation") and what was skipped.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mega_scale.data.rows import Tally
from mega_scale.data.token_files import Shard, ShardRecord
from mega_scale.data.token_store import TokenStore

FORMAT = "mega_scale tokens 2"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What a folder of prepared data holds.

    Args:
        tokenizer: Hash of the tokenizer, see `tokenizer_digest`.
        tokenizer_name: `data.tokenizer` of the preparation.
        dtype: Type of the tokens, as numpy writes it.
        parts: Shards by part, in order.
        tally: Rows that were read, and the bad ones.
        add_bos: `data.add_bos` of the preparation.
    """

    tokenizer: str
    tokenizer_name: str
    dtype: str
    parts: dict[str, list[ShardRecord]]
    tally: Tally
    add_bos: bool = False

    def totals(self, part: str) -> dict[str, int]:
        """Tokens, documents and bytes of a part."""
        records = self.parts[part]
        return {key: sum(getattr(record, key) for record in records) for key in ("tokens", "documents", "bytes")}


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that the file is there as a whole or not at all."""
    unfinished = path.with_name(f"{path.name}.unfinished-{os.getpid()}")
    with unfinished.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Declare a folder whole.

    Args:
        folder: Where all shards lie.
        manifest: What it holds.
    """
    parts = {
        part: {**manifest.totals(part), "shards": [asdict(record) for record in records]}
        for part, records in manifest.parts.items()
    }
    head = {"format": FORMAT, "tokenizer": manifest.tokenizer, "tokenizer_name": manifest.tokenizer_name}
    rest = {"add_bos": manifest.add_bos, "dtype": manifest.dtype, "parts": parts, "rows": manifest.tally.to_json()}
    write_json(folder / MANIFEST, head | rest)


def read_manifest(folder: Path) -> Manifest:
    """Read what a folder holds.

    Args:
        folder: Folder of prepared data.

    Returns:
        Its manifest.

    Raises:
        ValueError: It is no such folder, was not prepared to the end, or has another format.
    """
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"{folder} has the format {found['format']!r}, not {FORMAT!r}: prepare it again")
        parts = {
            part: [ShardRecord(**record) for record in content["shards"]] for part, content in found["parts"].items()
        }
        tally = Tally.from_json(found["rows"])
        names = found["tokenizer"], found["tokenizer_name"]
        return Manifest(*names, found["dtype"], parts, tally, bool(found.get("add_bos", False)))
    except OSError:
        raise ValueError(
            f"{str(folder)!r} has no {MANIFEST}: name a folder that launch/prepare.py has written to its end"
        ) from None
    except (KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(f"{str(folder / MANIFEST)!r} is damaged: prepare the data again") from None


def open_part(folder: Path, manifest: Manifest, part: str) -> TokenStore:
    """Open the documents of a part; reads none of them.

    Args:
        folder: Folder of prepared data.
        manifest: Of the folder.
        part: "train" or "validation".

    Returns:
        The documents; none where the folder has no such part.

    Raises:
        ValueError: A file is missing or has another size than was written.
    """
    shards = [Shard(folder, record, manifest.dtype) for record in manifest.parts.get(part, [])]
    for shard in shards:
        shard.check_sizes()
    return TokenStore(shards)


def check_content(folder: Path) -> Iterator[str]:
    """Read all files of a folder and compare them with their checksums; names each shard that is good.

    Args:
        folder: Folder of prepared data.

    Raises:
        ValueError: A file is missing or damaged, or the folder is none of prepared data.
    """
    manifest = read_manifest(folder)
    for records in manifest.parts.values():
        for record in records:
            Shard(folder, record, manifest.dtype).check_content()
            yield record.name


def require_tokenizer(folder: Path, manifest: Manifest, digest: str, name: str) -> None:
    """Refuse tokens of another tokenizer.

    Args:
        folder: Folder of prepared data.
        manifest: Of the folder.
        digest: Hash of the run's tokenizer.
        name: `data.tokenizer` of the run.

    Raises:
        ValueError: The hashes differ.
    """
    if manifest.tokenizer != digest:
        raise ValueError(
            f"data.tokenizer={name!r} (hash {digest}) is not the tokenizer of the data in {str(folder)!r}, "
            f"{manifest.tokenizer_name!r} (hash {manifest.tokenizer}): set "
            f"data.tokenizer={str(folder / 'tokenizer')!r}, or prepare the data again"
        )
