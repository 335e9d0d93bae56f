"""Settings as nested dataclasses: defaults < YAML files < the command line, and refusals that name key, value, remedy.

The keys are the fields, their types say which values are allowed, and the string below a field is its help. A section
of several kinds is a union of dataclasses, each with a key `type` that only has its own name; the first is the default.
"""

import argparse
import dataclasses
import difflib
import importlib
import importlib.util
import json
import math
import re
import sys
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from mega_scale.files import local_path, reason

_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}
# What a key means that is given without a value, and options that stand for a key.
_ALONE = {"resume": "latest", "overwrite": "true"}
_SHORT = {"max_time": "train.max_time"}
# Arguments of commands that are paths, or may be.
_PATHS = ("key_file", "new_key_file", "tokenizer", "json", "plot", "peer_python", "folder")

# Keys of earlier versions: their names and values now. Users are told; files that a run wrote are read as they are.
RENAMED: dict[str, tuple[str, dict[Any, Any]]] = {
    "parallel.activation_checkpoint_keeps": (
        "parallel.activation_checkpoint_policy",
        {"nothing": "full", "products": "save_matmuls"},
    ),
}


# Checks of values


def require(good: bool, key: str, value: object, remedy: str) -> None:
    """Refuse a value: raise ValueError unless `good`."""
    if not good:
        raise ValueError(f"{key}={value!r} is not possible: {remedy}")


def require_ranges(
    section: str,
    config: object,
    *,
    positive: Iterable[str] = (),
    not_negative: Iterable[str] = (),
    shares: Iterable[str] = (),
) -> None:
    """Refuse fields that are no choice of their Literal, or not above 0, 0 or above, or 0 to below 1, and finite."""
    for name, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal:
            remedy = f"choose one of {', '.join(map(str, get_args(hint)))}"
            require(getattr(config, name) in get_args(hint), f"{section}.{name}", getattr(config, name), remedy)
    for names, low, high, remedy in (
        (positive, math.nextafter(0, 1), math.inf, "it must be above 0"),
        (not_negative, 0, math.inf, "it must be 0 or above"),
        (shares, 0, 1, "it must be 0 or above and below 1"),
    ):
        for name in names:
            value = getattr(config, name)
            require(low <= value < high, f"{section}.{name}", value, remedy)


def local_paths(args: argparse.Namespace) -> None:
    """Apply `local_path` to every file and folder that a command was given, in place."""
    for name, value in vars(args).items():
        if isinstance(value, Path) or (isinstance(value, str) and name in _PATHS):
            setattr(args, name, type(value)(local_path(str(value), f"--{name.replace('_', '-')}")))


# Keys and types


def sections(hint: Any) -> tuple[Any, ...]:
    """The dataclasses of a field's type: none where it is a value, several for a section of several kinds."""
    return tuple(member for member in members(hint) if dataclasses.is_dataclass(member))


def known_keys(section: Any, prefix: str = "") -> dict[str, Any]:
    """Types by dotted key of a dataclass and of the dataclasses in it, in the order of declaration.

    A section of several kinds has the keys of all of them.
    """
    keys: dict[str, Any] = {}
    for name, hint in get_type_hints(section).items():
        kinds = sections(hint)
        keys |= keys_of_kinds(kinds, f"{prefix}{name}.") if kinds else {f"{prefix}{name}": hint}
    return keys


def keys_of_kinds(kinds: Iterable[Any], prefix: str) -> dict[str, Any]:
    """The keys of each of some dataclasses; where one has several types, their union."""
    keys: dict[str, Any] = {}
    for kind in kinds:
        for key, hint in known_keys(kind, prefix).items():
            keys[key] = keys[key] | hint if keys.get(key, hint) != hint else hint
    return keys


def values_of(config: Any, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key of a dataclass and of the dataclasses in it."""
    values: dict[str, Any] = {}
    for entry in dataclasses.fields(config):
        key, value = f"{prefix}{entry.name}", getattr(config, entry.name)
        values |= values_of(value, f"{key}.") if dataclasses.is_dataclass(value) else {key: value}
    return values


def members(hint: Any) -> tuple[Any, ...]:
    """Members of a union; any other type is its own only member."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def describe(hint: Any) -> str:
    """The values of a type in words, such as "an integer or null"."""
    words = []
    choices = [str(v) for member in members(hint) if get_origin(member) is Literal for v in get_args(member)]
    for member in members(hint):
        if get_origin(member) is Literal:
            words.append("one of " + ", ".join(choices))
        elif get_origin(member) is list:
            words.append(f"a list of {describe(get_args(member)[0]).removeprefix('an ').removeprefix('a ')} items")
        elif get_origin(member) is dict:
            words.append("a mapping")
        elif not (member is int and _WORDS[float] in words):  # float | int is any number
            words.append(_WORDS.get(member, str(member)))
    return " or ".join(dict.fromkeys(words))


def _convert(value: Any, hint: Any) -> Any:
    """A value as a type has it: integers become numbers where numbers are expected, and texts lists of one.

    Raises TypeError if it is no value of the type.
    """
    for member in members(hint):
        origin = get_origin(member)
        if origin is Literal and value in get_args(member):
            return value
        if origin is list and isinstance(value, list):
            return [_convert(item, get_args(member)[0]) for item in value]
        if origin is dict and isinstance(value, dict):
            return value
        if member is float and type(value) in (int, float):
            return float(value)
        if origin is None and type(value) is member:
            return value
    if isinstance(value, str) and list[str] in members(hint):
        return [value]
    raise TypeError(value)


def _convert_text(text: str, hint: Any) -> Any:
    """A value as the command line has it: text is taken as it is, and anything else is YAML."""
    plain = [member for member in members(hint) if member is str or get_origin(member) is Literal]
    others = [member for member in members(hint) if member not in plain]
    if plain and text != "null" and types.NoneType in others:
        others.remove(types.NoneType)  # ~ is a home folder, and Null a name
    if others and text.strip():
        try:
            return _convert(yaml.load(text, Loader=_StrictLoader), Union[tuple(others)])  # noqa: UP007  known only here
        except (yaml.YAMLError, ValueError, RecursionError, TypeError):
            pass  # a text, if that is allowed
    return _convert(text, hint)


def allowed(key: str, value: Any, known: dict[str, Any], convert: Callable[[Any, Any], Any] = _convert) -> Any:
    """A key's value, converted to its type; refuses any other, and a key that is unknown, with the one most like it."""
    if key in known:
        try:
            return convert(value, known[key])
        except TypeError:
            shown = "null" if value in (None, "null") else repr(value)
            raise ValueError(f"{key}={shown} is not allowed: expected {describe(known[key])}") from None
    if key in RENAMED:
        name, values = RENAMED[key]
        now = ", ".join(f"{old} is {new}" for old, new in values.items())
        raise ValueError(f"{key} is now {name}: set that one ({now})")
    sections = {path.rpartition(".")[0] for path in known} - {""}
    if key in sections:
        raise ValueError(f"{key}={value} is not allowed: {key} is a section, set {key}.KEY=VALUE")

    def likeness(candidate: str) -> float:
        pairs = ((key, candidate), (key.rpartition(".")[2], candidate.rpartition(".")[2]))
        return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    nearest = max(sections if isinstance(value, dict) else known, key=likeness)
    raise ValueError(f"{key} is not a key: the nearest known one is {nearest}; --help all lists them")


# YAML


class _StrictLoader(yaml.SafeLoader):
    """Reads numbers as people write them: 010 is ten, 1e-3 a number, and 1:30 a text.

    YAML 1.1 takes 010 for eight (octal), 1:30 for ninety (base 60) and 1e-3 for a text. A key that is given twice, of
    which it silently keeps the last, is refused.
    """


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


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node)).replace("_", "").lower()
    return int(text, 10 if text.lstrip("+-").isdigit() else 0)  # 0b and 0x name their base


_TAG = "tag:yaml.org,2002:"
_INT = re.compile(r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)$")
_FLOAT = re.compile(
    r"(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (f"{_TAG}int", f"{_TAG}float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_constructor(f"{_TAG}int", _construct_int)
_StrictLoader.add_constructor(f"{_TAG}map", _construct_mapping)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or the reader could take for a number."""


for _format in (_StrictLoader, _Dumper):
    _format.add_implicit_resolver(f"{_TAG}int", _INT, list("-+0123456789"))
    _format.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+0123456789."))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read the sections and keys of a YAML file; empty for an empty file. Raises ValueError if it is no such file."""
    path = local_path(str(path), "--config")
    try:
        layer = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_StrictLoader)
        if layer is None or isinstance(layer, dict):
            return layer or {}
        problem = f"holds a {type(layer).__name__}: write sections and keys, as in train:"
    except FileNotFoundError:
        problem = f"there is no such file (looked from {Path.cwd()})"
    except (OSError, UnicodeDecodeError) as error:
        problem = f"cannot be read as text: {error}"
    except RecursionError:
        problem = "is nested too deeply"
    except (yaml.YAMLError, ValueError) as error:
        problem = f"is not YAML: {' '.join(str(error).split())}"
    raise ValueError(f"--config {path}: {problem}")


def to_yaml(config: Any) -> str:
    """A dataclass as YAML, every key included, in the order of declaration."""
    return yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


# Layers

Overrides = list[tuple[str, str | None]]


def split_arguments(argv: Sequence[str], sections: Iterable[str]) -> tuple[list[str], Overrides, dict[str, str]]:
    """Sort the words of a command line: KEY=VALUE, --KEY=VALUE, --KEY VALUE, --config FILE and the other options.

    The first words of the known keys, `sections`, tell `--resume train.steps=4` from `--resume FOLDER`. Returns the
    files, the keys with their values (None where a key has none), and which of "help", with the word behind it, and
    "print_config" are given.
    """
    sections = set(sections)
    configs: list[str] = []
    overrides: Overrides = []
    options: dict[str, str] = {}
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        name, equals, text = token.partition("=")
        dashed = name.startswith("--")
        key = name[2:].replace("-", "_") if dashed else name
        if token == "-h" or name == "--help":
            topic = not equals and bool(rest) and not rest[0].startswith("-") and "=" not in rest[0]
            options["help"] = rest.pop(0) if topic else text
            continue
        if token in ("--print-config", "--print_config"):
            options["print_config"] = ""
            continue
        if (name.startswith("-") and not dashed) or not (dashed or equals):
            raise ValueError(f"{token!r} is not understood: write KEY=VALUE, as in train.steps=200")
        value: str | None = text if equals else _ALONE.get(key)
        if not equals and rest and not rest[0].startswith("--"):
            starts_a_key = "=" in rest[0] and re.split(r"[.=]", rest[0])[0] in sections
            if value is None or not starts_a_key:
                value = rest.pop(0)
        if key == "config":
            if value is None:
                raise ValueError("--config has no value: write --config FILE")
            configs.append(value)
        elif key != "local_rank":  # which launchers add
            overrides.append((_SHORT.get(key, key), value))
    return configs, overrides, options


def resolve(
    section: type,
    configs: Sequence[str],
    overrides: Overrides,
    *,
    base: str | None = None,
    stored: bool = False,
    derive: Callable[[dict[str, Any]], dict[str, Any]] = lambda values: {},
) -> tuple[Any, dict[str, Any]]:
    """Build a dataclass from its defaults, YAML files, and the command line, each over the one before.

    `base` is a file below the others that nobody asked for: a key of it that the chosen kind of a section lacks is left
    out. `stored` files were written by a run, perhaps of an earlier version. `derive` finds values of keys that were
    not given in those that were. Returns the dataclass, and the values of the keys that were given. Raises ValueError
    where a key is unknown, or of another kind, or a value not of its type.
    """
    known = known_keys(section)
    values: dict[str, Any] = {}
    unasked: set[str] = set()
    for path in configs if base is None else (base, *configs):
        given = _flatten(read_yaml(path), known)
        layer: dict[str, Any] = {}
        try:
            for written, value in given:
                key, now = RENAMED[written] if stored and written in RENAMED else (written, None)
                if key in layer:
                    raise ValueError(f"{key} is given twice: keep one")
                layer[key] = allowed(key, now[value] if now else value, known)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        values |= layer
        unasked = set(layer) if path == base else unasked - set(layer)
    mappings = [key for key, hint in known.items() if any(get_origin(member) is dict for member in members(hint))]
    for key, text in sorted(overrides, key=lambda override: override[0] not in known):  # mappings, then their entries
        mapping = next((name for name in mappings if key.startswith(f"{name}.")), None)
        if text is None and (mapping or key in known):
            raise ValueError(f"{key} has no value: write {key}=VALUE")
        if mapping is None:
            values[key] = allowed(key, text, known, _convert_text)
            unasked.discard(key)
        else:
            values[mapping] = values.get(mapping) or {}
            _set_inside(values[mapping], key, key.removeprefix(f"{mapping}."), str(text))
    return _build(section, derive(values) | values, unasked), values


def _flatten(layer: dict[str, Any], known: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys of a file, and their values; what is in no section has the key that it would have."""
    for name, value in layer.items():
        key = f"{prefix}{name}"
        section = any(path.startswith(f"{key}.") for path in known)
        if section and isinstance(value, dict):
            yield from _flatten(value, known, f"{key}.")
        elif not section or value is not None:
            yield key, value


def _set_inside(at: dict[str, Any], key: str, path: str, text: str) -> None:
    """Set one entry of a mapping, of any depth, as in parallel.ds_config.zero_optimization.stage3_prefetch=0."""
    *parents, last = path.split(".")
    for parent in parents:
        at = at.setdefault(parent, {})
        if not isinstance(at, dict):
            raise ValueError(f"{key}={text} is not allowed: {parent} already holds the value {at!r}")
    try:
        at[last] = yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{key}={text} is not YAML: {' '.join(str(error).split())}") from None


def _build(section: Any, values: dict[str, Any], unasked: Collection[str], prefix: str = "") -> Any:
    found = {}
    for name, hint in get_type_hints(section).items():
        if kinds := sections(hint):
            kind = _chosen(kinds, values, unasked, f"{prefix}{name}.")
            found[name] = _build(kind, values, unasked, f"{prefix}{name}.")
        elif f"{prefix}{name}" in values:
            found[name] = values[f"{prefix}{name}"]
    return section(**found)


def _chosen(kinds: tuple[Any, ...], values: dict[str, Any], unasked: Collection[str], prefix: str) -> Any:
    """The kind of a section that its `type` names; refuses keys that only other kinds have."""
    if len(kinds) == 1:
        return kinds[0]
    known = {kind().type: known_keys(kind, prefix) for kind in kinds}
    chosen = values.get(f"{prefix}type", next(iter(known)))
    given = [key for key in values if key.startswith(prefix) and key not in known[chosen] and key not in unasked]
    if given:
        owner = next(name for name, keys in known.items() if given[0] in keys)
        words = "is a key" if len(given) == 1 else "are keys"
        named = ", ".join(f"{key}={json.dumps(values[key])}" for key in given)
        raise ValueError(
            f"{named} {words} of {prefix}type={owner}, and the run has {prefix}type={chosen}: leave "
            f"{'it' if len(given) == 1 else 'them'} out, or set {prefix}type={owner}"
        )
    return next(kind for kind in kinds if kind().type == chosen)


# Classes and functions of a user's own


def load_object(name: str, key: str, remedy: str) -> Any:
    """What a setting names as MODULE:NAME, or as FILE.py:NAME, a path; importing it runs its code.

    Raises ValueError, which names the key and says what is wrong, where there is none.
    """
    module, colon, attribute = name.rpartition(":")
    if not (colon and module and attribute):
        raise ValueError(f"{key}={name!r} is not possible: {remedy}")
    try:
        found = _load_file(Path(module)) if module.endswith(".py") else importlib.import_module(module)
    except Exception as error:
        raise ValueError(f"{key}={name!r}: {module} cannot be imported ({reason(error)})") from error
    if not hasattr(found, attribute):
        raise ValueError(f"{key}={name!r}: {module} has no {attribute}")
    return getattr(found, attribute)


def _load_file(path: Path) -> Any:
    """The module in a file, loaded once, though no folder of it is searched for modules."""
    name = f"mega_scale_user_{path.stem}_{abs(hash(path.resolve()))}"
    if name not in sys.modules:
        if not path.is_file():
            raise FileNotFoundError(2, "No such file", str(path))
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
