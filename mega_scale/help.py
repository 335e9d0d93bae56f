"""Help on settings: a page of groups, and what a group, a key, or all keys mean."""

import argparse
import ast
import dataclasses
import difflib
import inspect
import itertools
import json
from collections.abc import Collection
from typing import Any, get_type_hints

from mega_scale.settings import describe, keys_of_kinds, known_keys, sections

_USAGE = (
    "%(prog)s [--config FILE] [KEY=VALUE ...] [--resume [CHECKPOINT]] [--overwrite] [--max-time TIME] "
    "[--print-config] [--help [GROUP | KEY | all]]"
)
_HELP_OPTION = {"--help [GROUP | KEY | all]": "This page, or what a group, a key, or all keys mean"}


def format_help(section: type, description: str, options: dict[str, str], topic: str) -> str:
    """What `--help` prints: options, as "--config FILE", and the groups of keys with their number.

    With a `topic`, keys with their sentences, types and defaults: those of a group, one, those whose names contain a
    word, or "all". Raises ValueError where the topic is none of these.
    """
    if not topic:
        return _overview(section, description, options)
    whole = topic == "all"
    usage = _USAGE if whole else argparse.SUPPRESS
    parser = argparse.ArgumentParser(usage=usage, description=description if whole else None, add_help=False)
    if whole:
        _add_list(parser, "options", options | _HELP_OPTION)
    wanted = _keys_of(topic.removeprefix("--").rstrip(".").replace("-", "_"), section)
    _add_keys(parser, section, "", wanted)
    return parser.format_help()


def _overview(section: type, description: str, options: dict[str, str]) -> str:
    known = known_keys(section)
    described = {}
    for name, kinds in _groups(section).items():
        count = len([key for key in known if _group_of(key) == name])
        described[name] = f"{_title(kinds)} ({count} keys)"
    parser = argparse.ArgumentParser(usage=_USAGE, description=description, add_help=False)
    _add_list(parser, "options", options | _HELP_OPTION)
    _add_list(parser, "groups of keys", described)
    return parser.format_help()


def _groups(section: type) -> dict[str, tuple[Any, ...]]:
    """Groups of keys by name, with the dataclasses that declare them; "run" has those that are in no section."""
    hints = get_type_hints(section)
    return {"run": (section,)} | {name: sections(hint) for name, hint in hints.items() if sections(hint)}


def _group_of(key: str) -> str:
    return key.partition(".")[0] if "." in key else "run"


def _title(kinds: tuple[Any, ...]) -> str:
    title = (inspect.getdoc(kinds[0]) or "").partition("\n")[0].removesuffix(".")
    return title if len(kinds) == 1 else f"{title}, {' or '.join(kind().type for kind in kinds)}"


def _keys_of(topic: str, section: type) -> list[str]:
    """Keys of a topic, see `format_help`."""
    known, groups = list(known_keys(section)), _groups(section)
    if topic == "all":
        return known
    if topic in groups:
        return [key for key in known if _group_of(key) == topic]
    if found := [key for key in known if key == topic] or [key for key in known if topic in key]:
        return found
    words = [*groups, *known, *(key.rpartition(".")[2] for key in known)]
    near = difflib.get_close_matches(topic, words, 1)
    remedy = f"the nearest one is {near[0]}" if near else "--help lists the groups, --help all the keys"
    raise ValueError(f"--help {topic}: there is no such group or key, {remedy}")


def _add_list(parser: argparse.ArgumentParser, title: str, entries: dict[str, str]) -> None:
    group = parser.add_argument_group(title)
    for number, (name, sentence) in enumerate(entries.items()):
        group.add_argument(f"{title}{number}", metavar=name, help=sentence.replace("%", "%%"))


def _add_keys(parser: argparse.ArgumentParser, section: Any, prefix: str, wanted: Collection[str]) -> None:
    group = parser.add_argument_group(_title((section,)))
    hints, defaults = get_type_hints(section), section()
    for name, sentence in _sentences(section).items():
        kinds = sections(hints[name])
        if len(kinds) == 1:
            _add_keys(parser, kinds[0], f"{prefix}{name}.", wanted)
        elif kinds:
            _add_kinds(parser, kinds, f"{prefix}{name}.", wanted)
        elif f"{prefix}{name}" in wanted:
            _add_key(group, f"{prefix}{name}", sentence, hints[name], _shown(getattr(defaults, name)))


def _add_kinds(parser: argparse.ArgumentParser, kinds: tuple[Any, ...], prefix: str, wanted: Collection[str]) -> None:
    """Keys of a section of several kinds; each tells what it means, and what its default is, in which of them."""
    sentences = {kind().type: _sentences(kind) for kind in kinds}
    group = parser.add_argument_group(_title(kinds))
    for name, hint in keys_of_kinds(kinds, "").items():
        if f"{prefix}{name}" not in wanted:
            continue
        meanings: dict[str, list[str]] = {}
        values: dict[str, list[str]] = {}
        for kind in kinds:
            tag = kind().type
            if name in sentences[tag]:
                meanings.setdefault(sentences[tag][name], []).append(tag)
                values.setdefault(_shown(getattr(kind(), name)), []).append(tag)
        sentence = next(iter(meanings))
        if len(meanings) > 1:
            sentence = " ".join(f"{', '.join(tags)}: {meaning}" for meaning, tags in meanings.items())
        default = ", ".join(f"{value} ({', '.join(tags)})" for value, tags in values.items())
        _add_key(group, f"{prefix}{name}", sentence, hint, _shown(kinds[0]().type) if name == "type" else default)


def _add_key(group: Any, key: str, sentence: str, hint: Any, default: str) -> None:
    text = f"{sentence} (type: {describe(hint)}, default: {default})".replace("%", "%%")
    group.add_argument(f"--{key}", metavar="VALUE", help=text)


def _shown(default: Any) -> str:
    return json.dumps(default) if default is None or isinstance(default, bool) else str(default)


def _sentences(section: Any) -> dict[str, Any]:
    """The help of each field: of its metadata, or the string below it."""
    sentences = {field.name: field.metadata.get("help") for field in dataclasses.fields(section)}
    if None in sentences.values():
        [definition] = ast.parse(inspect.getsource(section)).body
        assert isinstance(definition, ast.ClassDef)
        for node, below in itertools.pairwise(definition.body):
            if isinstance(node, ast.AnnAssign) and isinstance(below, ast.Expr):
                sentences[ast.unparse(node.target)] = " ".join(ast.literal_eval(below.value).split())
    return sentences
