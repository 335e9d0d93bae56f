"""The texts that the `datasets` library loads: files of three formats, and data sets by name."""

from pathlib import Path
from typing import Any

import datasets

from mega_scale.data.cache import cache_folder
from mega_scale.data.config import DataConfig, expand_paths
from mega_scale.data.hub_reach import look_up


def load_source(config: DataConfig, *, held_out: bool) -> tuple[Any, str]:
    """Open a data set without reading it into memory.

    Args:
        config: The keys under `data:`; source text, json, parquet or hub.
        held_out: Take `validation_path` or `validation_split` in place of `path` or `hub_split`.

    Returns:
        A `datasets.Dataset`, or `datasets.IterableDataset` when streaming; and what to call it in messages.

    Raises:
        ValueError: It cannot be found or read.
    """
    arguments: dict[str, Any] = {"streaming": config.streaming}
    if config.cache_dir is not None:
        arguments["cache_dir"] = str(cache_folder(config.cache_dir) / "datasets")
    if config.source == "hub":
        return _load_named(config, held_out, arguments)
    return _load_files(config, held_out, arguments)


def _load_files(config: DataConfig, held_out: bool, arguments: dict[str, Any]) -> tuple[Any, str]:
    key, paths = ("validation_path", config.validation_path) if held_out else ("path", config.path)
    assert paths is not None
    name = f"data.{key}={paths!r}"
    # The loader takes names for globs; a name that holds glob characters must be escaped.
    files = [_escape(file) for file in expand_paths(paths, key)]
    if config.source == "text":
        arguments["sample_by"] = "document"
    try:
        return datasets.load_dataset(config.source, data_files=files, split="train", **arguments), name
    except StopIteration:  # what the JSON reader makes of empty files
        raise ValueError(f"{name} holds no document: give files with text") from None
    except Exception as error:
        cause = error.__cause__ or error
        raise ValueError(
            f"{name} cannot be read as {config.source}: {cause}; repair it, or correct data.source"
        ) from None


def _escape(file: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in file)


def _load_named(config: DataConfig, held_out: bool, arguments: dict[str, Any]) -> tuple[Any, str]:
    assert config.hub_name is not None
    key, split = ("validation_split", config.validation_split) if held_out else ("hub_split", config.hub_split)
    name = f"data.hub_name={config.hub_name!r}"
    if not Path(config.hub_name).is_dir() and not datasets.config.HF_HUB_OFFLINE:
        reach = look_up(config.hub_name, "dataset")
        if reach == "absent":
            raise ValueError(f"{name}: the hub has no such data set, or needs a log-in for it; correct the name")
        if reach == "unreachable":
            raise ValueError(
                f"{name}: the hub cannot be reached; set HF_HUB_OFFLINE=1 to use what was fetched before, or give "
                "files with data.source=json, parquet or text"
            )
    try:
        return datasets.load_dataset(config.hub_name, config.hub_config, split=split, **arguments), f"{name} ({split})"
    except Exception as error:
        raise ValueError(
            f"{name} with data.hub_config={config.hub_config!r}, data.{key}={split!r} cannot be loaded: {error}; "
            "correct these keys, or fetch it while the hub can be reached"
        ) from None
