"""From the command line to a RunConfig: dataclass defaults < YAML files < KEY=VALUE arguments."""

import argparse
import copy
import json
import re
import sys
from argparse import SUPPRESS, Action, ArgumentError
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings

from mega_scale.config.continued import adopt
from mega_scale.config.files import StrictLoader, read_layer, to_yaml
from mega_scale.config.keys import describe, flatten, known_keys, members, unknown_key
from mega_scale.config.run_config import RunConfig
from mega_scale.files import local_path

DEFAULT_CONFIG = Path(__file__).resolve().parents[2] / "configs" / "debug.yaml"

_DESCRIPTION = """Every key below can stand in a YAML file (as sections) and on the command line, as train.steps=200,
--train.steps=200 or --train.steps 200. Command line beats files, a later file beats an earlier one, files beat the
defaults shown here. A key that is unknown is refused."""

# Arguments of commands that are paths, or may be.
_PATHS = ("key_file", "new_key_file", "tokenizer", "json", "plot", "peer_python", "folder")
# What a key means that is given without a value.
_ALONE = {"resume": "latest", "overwrite": "true"}
# Options that stand for a key.
_SHORT = {"max_time": "train.max_time"}


@dataclass
class _Arguments:
    """What a command line says, before any of it is understood."""

    configs: list[str] = field(default_factory=list)
    overrides: list[tuple[str, str | None]] = field(default_factory=list)
    help: bool = False
    print_config: bool = False


class _Formatter(DefaultHelpFormatter):
    """Leaves out the options that would take a whole section at once."""

    def add_argument(self, action: Action) -> None:
        if action.dest not in {key.split(".")[0] for key in known_keys(RunConfig) if "." in key}:
            super().add_argument(action)


def _parser() -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        usage="%(prog)s [--config FILE] [KEY=VALUE ...] [--resume [CHECKPOINT]] [--overwrite] [--max-time TIME] "
        "[--print-config] [--help]",
        description=_DESCRIPTION,
        formatter_class=_Formatter,
        exit_on_error=False,
        default_env=False,
        allow_abbrev=False,
    )
    # These are taken out before the parser sees the command line; it only prints their help.
    file_help = "YAML file of keys; may be given several times; without it, configs/debug.yaml (path)"
    print_help = "Print the resolved run as YAML, which runs again as it is, and exit"
    parser.add_argument("--config", metavar="FILE", default=SUPPRESS, help=file_help)
    parser.add_argument("--print-config", action="store_true", default=SUPPRESS, help=print_help)
    time_help = "The same as train.max_time=TIME (seconds, or H:MM:SS)"
    parser.add_argument("--max-time", metavar="TIME", default=SUPPRESS, help=time_help)
    parser.add_argument("--local-rank", metavar="N", default=SUPPRESS, help="Accepted from launchers, and ignored")
    parser.add_class_arguments(RunConfig, None)
    return parser


def _starts_a_key(token: str) -> bool:
    return "=" in token and re.split(r"[.=]", token)[0] in {field.name for field in fields(RunConfig)}


def _split(argv: Sequence[str]) -> _Arguments:
    """Sort the words of a command line by what they are."""
    found = _Arguments()
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        name, equals, text = token.partition("=")
        dashed = name.startswith("--")
        key = name[2:].replace("-", "_") if dashed else name
        if token in ("-h", "--help"):
            found.help = True
            continue
        if dashed and key == "print_config" and not equals:
            found.print_config = True
            continue
        if (name.startswith("-") and not dashed) or not (dashed or equals):
            raise ValueError(f"{token!r} is not understood: write KEY=VALUE, as in train.steps=200")
        value: str | None = text if equals else None
        alone = _ALONE.get(key)
        if value is None and rest and not rest[0].startswith("--") and not (alone and _starts_a_key(rest[0])):
            value = rest.pop(0)
        if value is None:
            value = alone
        key = _SHORT.get(key, key)
        if key == "config":
            if value is None:
                raise ValueError("--config has no value: write --config FILE")
            found.configs.append(value)
        elif key != "local_rank":
            found.overrides.append((key, value))
    return found


def _refuse_type(error: Exception, given: dict[str, Any], known: dict[str, Any]) -> NoReturn:
    """Turn jsonargparse's refusal of a value into one sentence with key, value and expected type."""
    named = re.search(r'[Kk]ey "([^"]+)"', str(error))
    key = named.group(1) if named else ""
    if key in given and key in known:
        raise ValueError(f"{key}={given[key]!r} is not allowed: expected {describe(known[key])}") from None
    raise ValueError(" ".join(str(error).split())) from None


def _as_list(value: Any, hint: Any) -> Any:
    """Take a single text where a list of texts is expected as a list of one."""
    wants_list = list[str] in members(hint) and str not in members(hint)
    return [value] if wants_list and isinstance(value, str) else value


def _apply_file(parser: ArgumentParser, base: Namespace, path: str, known: dict[str, Any]) -> Namespace:
    layer = read_layer(path)
    try:
        given = {key: _as_list(value, known[key]) for key, value in flatten(layer, known).items()}
        try:
            return parser.parse_object(given, base)
        except ArgumentError as error:
            _refuse_type(error, given, known)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _apply_overrides(
    parser: ArgumentParser, base: Namespace, overrides: Sequence[tuple[str, str | None]], known: dict[str, Any]
) -> Namespace:
    """Set what the command line says over what the files said."""
    given: dict[str, str] = {}
    inside: list[tuple[str, str, str]] = []
    mappings = [key for key, hint in known.items() if "a mapping" in describe(hint)]
    for key, value in overrides:
        within = next((name for name in mappings if key.startswith(f"{name}.")), None)
        if within is None and key not in known:
            if any(path.startswith(f"{key}.") for path in known):
                raise ValueError(f"{key}={value} is not allowed: {key} is a section, set {key}.KEY=VALUE")
            raise ValueError(unknown_key(key, known))
        if value is None:
            raise ValueError(f"{key} has no value: write {key}=VALUE")
        if within:
            inside.append((within, key.removeprefix(f"{within}."), value))
            continue
        allowed = members(known[key])
        if value == "null" and type(None) not in allowed and str not in allowed:
            raise ValueError(f"{key}=null is not allowed: expected {describe(known[key])}")
        given[key] = value
    words = []
    for key, value in given.items():
        listed = value if value.startswith("[") or value == "null" else _as_list(value, known[key])
        words.append(f"--{key}={json.dumps(listed) if isinstance(listed, list) else listed}")
    try:
        result = parser.parse_args(words, namespace=base)
    except ArgumentError as error:
        _refuse_type(error, given, known)
    for mapping, path, value in inside:
        _set_inside(result, mapping, path, value)
    return result


def _set_inside(result: Namespace, mapping: str, path: str, value: str) -> None:
    """Set one entry of a mapping key, of any depth, as in parallel.ds_config.zero_optimization.stage3_prefetch=0."""
    root = copy.deepcopy(result[mapping] or {})
    *parents, last = path.split(".")
    place = root
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise ValueError(f"{mapping}.{path}={value} is not allowed: {parent} already holds the value {place!r}")
    try:
        place[last] = yaml.load(value, Loader=StrictLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{mapping}.{path}={value} is not YAML: {' '.join(str(error).split())}") from None
    result[mapping] = root


def _resolve(configs: Sequence[str], overrides: Sequence[tuple[str, str | None]]) -> RunConfig:
    parser, known = _parser(), known_keys(RunConfig)
    result = parser.get_defaults()
    for path in configs:
        result = _apply_file(parser, result, path, known)
    result = _apply_overrides(parser, result, overrides, known)
    sections = parser.instantiate(result)
    return RunConfig(**{field.name: sections[field.name] for field in fields(RunConfig)})


def _given(arguments: _Arguments) -> set[str]:
    """The keys that a user gave; those of the default job are none."""
    known = known_keys(RunConfig)
    files = (flatten(read_layer(path), known) for path in arguments.configs)
    return {key for key, _ in arguments.overrides}.union(*files)


def load_config(path: str | Path) -> RunConfig:
    """Read a run from one YAML file over the dataclass defaults.

    Args:
        path: the file, as `save_config` writes it or shorter.

    Returns:
        The run.

    Raises:
        ValueError: the file cannot be read, or a key or value in it is refused.
    """
    return _resolve([str(path)], [])


def local_paths(args: argparse.Namespace) -> None:
    """Hold what a command was given as files and folders to the rule of `local_path`, in place.

    Args:
        args: the command's arguments.

    Raises:
        ValueError: one of them is no local path.
    """
    for name, value in vars(args).items():
        if isinstance(value, Path) or (isinstance(value, str) and name in _PATHS):
            setattr(args, name, type(value)(local_path(str(value), f"--{name.replace('_', '-')}")))


def refuse(message: object, *, quiet: bool = False) -> NoReturn:
    """End the program with exit code 2 and one line, `error: ...`, on standard error.

    Args:
        message: what is wrong and what to do; line breaks become spaces.
        quiet: leave the line out, as ranks other than the first do.
    """
    if not quiet:
        print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def parse(argv: Sequence[str], *, quiet: bool = False) -> RunConfig:
    """Read a run from a command line.

    Without `--config` the run is that of `configs/debug.yaml`, the default job. A run that goes on from a checkpoint or
    starts from an export has its model and tokenizer, and keys that contradict it are refused. `--help` and
    `--print-config` print and exit with code 0; whatever is refused is said in one line, and exits with code 2.

    Args:
        argv: the words after the program's name.
        quiet: print nothing, as ranks other than the first do.

    Returns:
        The run, its keys and types checked, its combinations not: see `RunConfig.validate`.
    """
    try:
        arguments = _split(argv)
        if arguments.help:
            if not quiet:
                _parser().print_help()
            raise SystemExit(0)
        config = _resolve(arguments.configs or [str(DEFAULT_CONFIG)], arguments.overrides)
        config = adopt(config, _given(arguments))
    except ValueError as error:
        refuse(error, quiet=quiet)
    if arguments.print_config:
        if not quiet:
            print(to_yaml(config), end="", flush=True)
        raise SystemExit(0)
    return config
