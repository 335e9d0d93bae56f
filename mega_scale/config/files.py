"""A resolved run as a YAML file that runs again as it is."""

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mega_scale.files import local_path
from mega_scale.training.checkpoint.files import replace_text

if TYPE_CHECKING:
    from mega_scale.config.run_config import RunConfig


class _Dumper(yaml.SafeDumper):
    """Quotes text that the reader, whose numbers are wider than YAML 1.1's, could take for a number."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "'" if text[:1] and text[0] in "+-.0123456789" else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def to_yaml(config: "RunConfig") -> str:
    """Write a run as YAML, every key included, in the order of declaration."""
    values = dataclasses.asdict(config)
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def save_config(config: "RunConfig", path: str | Path) -> None:
    """Write a run to a YAML file that `load_config` reads back exactly.

    Args:
        config: the run.
        path: file to write, or to replace as a whole; its folder exists.

    Raises:
        OSError: it cannot be written.
    """
    replace_text(Path(path), to_yaml(config))


class StrictLoader(yaml.SafeLoader):
    """Refuses a key given twice, of which YAML silently keeps the last, and reads 1e-3 as a number."""


def _construct_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise ValueError(f"line {key_node.start_mark.line + 1}: a key is no word: write one")
        if key_node.value in seen:
            raise ValueError(f"line {key_node.start_mark.line + 1}: {key_node.value} is given twice: keep one")
        seen.add(key_node.value)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


StrictLoader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
_EXPONENT = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def read_layer(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of settings.

    Args:
        path: the file.

    Returns:
        Its sections and keys; empty for an empty file.

    Raises:
        ValueError: the file is missing, unreadable, no YAML, or not a mapping of keys.
    """
    path = local_path(str(path), "--config")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"--config {path}: there is no such file (looked from {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: cannot be read as text: {error}") from None
    try:
        layer = yaml.load(text, Loader=StrictLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path}: is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError(f"--config {path}: is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"--config {path}: {error}") from None
    if layer is None:
        return {}
    if not isinstance(layer, dict):
        raise ValueError(f"--config {path}: holds a {type(layer).__name__}: write sections and keys, as in train:")
    return layer
