"""The known keys of a run, their types in words, and refusals that name the nearest known key."""

import dataclasses
import difflib
import types
from collections.abc import Iterable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}


def known_keys(section: type, prefix: str = "") -> dict[str, Any]:
    """List the keys of a dataclass and of the dataclasses in it.

    Args:
        section: the dataclass.
        prefix: what stands before its names, with the dot.

    Returns:
        The type of every key by its dotted path, in the order of declaration.
    """
    keys: dict[str, Any] = {}
    hints = get_type_hints(section)
    for field in dataclasses.fields(section):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            keys |= known_keys(hint, f"{prefix}{field.name}.")
        else:
            keys[prefix + field.name] = hint
    return keys


def members(hint: Any) -> tuple[Any, ...]:
    """List the alternatives of a type; a type that is no union is its only one."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def describe(hint: Any) -> str:
    """Say in words what values a type takes."""
    words = []
    for member in members(hint):
        if get_origin(member) is Literal:
            words.append("one of " + ", ".join(str(value) for value in get_args(member)))
        elif get_origin(member) is list:
            words.append(f"a list of {describe(get_args(member)[0]).removeprefix('an ').removeprefix('a ')} items")
        elif get_origin(member) is dict or member is dict:
            words.append("a mapping")
        else:
            words.append(_WORDS.get(member, str(member)))
    return " or ".join(words)


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Word the refusal of a key that is not known, with the known key most like it."""

    def likeness(candidate: str) -> float:
        pairs = ((key, candidate), (key.rpartition(".")[2], candidate.rpartition(".")[2]))
        return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    return f"{key} is not a key: the nearest known one is {max(known, key=likeness)}; --help lists all"


def flatten(layer: dict[str, Any], known: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested sections into dotted keys, refusing what is not known.

    Args:
        layer: sections and keys as a file holds them.
        known: the known keys with their types.
        prefix: path of the section that `layer` is, with the dot.

    Returns:
        Values by dotted path.

    Raises:
        ValueError: a key is unknown or given twice, a section is a value, or null stands where none is allowed.
    """
    flat: dict[str, Any] = {}
    for name, value in layer.items():
        key = f"{prefix}{name}"
        if key in known:
            if value is None and types.NoneType not in members(known[key]):
                raise ValueError(f"{key}=null is not allowed: expected {describe(known[key])}")
            if key in flat:
                raise ValueError(f"{key} is given twice: keep one")
            flat[key] = value
        elif not any(path.startswith(f"{key}.") for path in known):
            sections = {path.rpartition(".")[0] for path in known} - {""}
            raise ValueError(unknown_key(key, sections if isinstance(value, dict) else known))
        elif isinstance(value, dict):
            inner = flatten(value, known, f"{key}.")
            if twice := flat.keys() & inner.keys():
                raise ValueError(f"{min(twice)} is given twice: keep one")
            flat |= inner
        elif value is not None:
            raise ValueError(f"{key}={value!r} is not allowed: {key} is a section, set the keys in it")
    return flat
