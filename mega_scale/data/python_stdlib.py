"""The default corpus: the text of the Python that runs this, its library's sources and its built-in documentation."""

import importlib
import importlib.machinery
import inspect
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
# CPython's own test modules say nothing about Python, and importing readline may write to the terminal.
_SKIPPED_MODULES = re.compile(r"_?xx|_test|_ctypes_test|readline$")
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}")


def stdlib_documents() -> Iterator[str]:
    """Read Python's standard library: every module's source, then the documentation of the modules without one.

    The order and the text depend on the Python installation only, so every process of a run sees the same.

    Returns:
        Documents, one a module.
    """
    yield from _sources(Path(sysconfig.get_paths()["stdlib"]))
    yield from _documentation()


def _sources(root: Path) -> Iterator[str]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        # _sysconfigdata holds the build machine's settings, which are no text.
        found += [
            Path(folder, name) for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    for file in sorted(found, key=lambda file: file.relative_to(root).as_posix()):
        try:
            yield file.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue


def _documentation() -> Iterator[str]:
    for name in sorted(_compiled_module_names()):
        try:
            module = importlib.import_module(name)
        except ImportError:  # built against a library that this machine lacks
            continue
        text = _document_module(module)
        if text:
            yield text


def _compiled_module_names() -> set[str]:
    names = set(sys.builtin_module_names)
    folder = sysconfig.get_config_var("DESTSHARED")
    suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    if folder and os.path.isdir(folder):
        names |= {file.split(".")[0] for file in os.listdir(folder) if file.endswith(suffixes)}
    return {name for name in names if not _SKIPPED_MODULES.match(name)}


def _document_module(module: ModuleType) -> str:
    entries = [_entry(module.__name__, module)]
    for name, member in sorted(vars(module).items()):
        if getattr(member, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(member):
            entries.append(_entry(f"{module.__name__}.{name}", member))
            entries += [_entry(f"{module.__name__}.{name}.{key}", value) for key, value in sorted(vars(member).items())]
        elif inspect.isroutine(member):
            entries.append(_entry(f"{module.__name__}.{name}", member))
    return "\n\n".join(entry for entry in entries if entry)


def _entry(name: str, thing: object) -> str:
    """One heading with its documentation; empty where there is none of its own, or where it shows an address."""
    if not (inspect.ismodule(thing) or inspect.isclass(thing) or inspect.isroutine(thing) or _is_descriptor(thing)):
        return ""
    text = vars(thing).get("__doc__") if inspect.isclass(thing) else getattr(thing, "__doc__", None)
    if not isinstance(text, str) or not text.strip() or _ADDRESS.search(text):
        return ""
    signature = getattr(thing, "__text_signature__", None) if inspect.isroutine(thing) else None
    if signature is not None:
        name += signature.replace("$", "")
    return f"{name}\n{inspect.cleandoc(text)}\n"


def _is_descriptor(thing: object) -> bool:
    return inspect.isgetsetdescriptor(thing) or inspect.ismemberdescriptor(thing)
