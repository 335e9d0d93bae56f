"""Python files by which a folder loads with only torch and transformers, made of this project's own sources.

transformers copies such files into one folder and imports them as one package, so they are flat: a module of the model
room keeps its name, others carry their room's, and imports between them become relative. All else stays as it is.
"""

import ast
import importlib.util
from pathlib import Path

from transformers.models.auto import modeling_auto

from mega_scale.model import MegaConfig

_PACKAGE = "mega_scale"
_ROOMS = ("model", "ops")


def auto_classes() -> dict[str, type]:
    """The Mega classes that transformers' Auto classes give for a MegaConfig, by the name of the Auto class."""
    found: dict[str, type] = {"AutoConfig": MegaConfig}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None) if name.startswith("AutoModel") else None
        if mapping is not None and MegaConfig in mapping:
            found[name] = mapping[MegaConfig]
    return found


def auto_map(classes: dict[str, type]) -> dict[str, str]:
    """What config.json says under `auto_map`: Auto class to `file.Class`."""
    return {name: f"{flat_name(found.__module__)}.{found.__name__}" for name, found in classes.items()}


def remote_code(classes: dict[str, type]) -> dict[str, str]:
    """Collect the modules that classes need, through all their imports within the project, as flat files.

    Args:
        classes: as from `auto_classes`.

    Returns:
        File name to source text.

    Raises:
        ValueError: a module imports from another room than model and ops, or in a form that cannot be made relative.
    """
    files: dict[str, str] = {}
    waiting = sorted({found.__module__ for found in classes.values()})
    done: set[str] = set()
    while waiting:
        module = waiting.pop()
        if module in done:
            continue
        done.add(module)
        path, text, imported = _flatten(module)
        name = f"{flat_name(module)}.py"
        if name in files:
            raise ValueError(f"two modules would become {name}, one of them {module}: rename it")
        files[name] = f"# Made by {_PACKAGE} from its own {path}; edits belong there.\n{text}"
        waiting.extend(imported)
    return dict(sorted(files.items()))


def flat_name(module: str) -> str:
    """Name of a module in a folder: `mega_scale.model.attention` is block, `mega_scale.ops.ema.fft` is ops_ema_fft.

    Raises:
        ValueError: the module lies in another room.
    """
    package, *parts = module.split(".")
    if package != _PACKAGE or not parts or parts[0] not in _ROOMS:
        raise ValueError(
            f"{module} cannot go with a model: it may import from {_PACKAGE}.model and {_PACKAGE}.ops only"
        )
    return "_".join(parts[1:] if parts[0] == "model" and len(parts) > 1 else parts)


def _flatten(module: str) -> tuple[str, str, set[str]]:
    """A module's path in the project, its text with relative imports, and the modules of the project it imports."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"{module} has no source file")
    source = Path(spec.origin).read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            if any(alias.name.split(".")[0] == _PACKAGE for alias in node.names):
                raise ValueError(f"{module}, line {node.lineno}: write `from {_PACKAGE}... import ...`")
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == _PACKAGE):
            target = node.module or ""
            _check(module, node, target)
            imported.add(target)
            # Columns count bytes, of which the keyword's are one a character.
            start = lines[node.lineno - 1].encode()[: node.col_offset].decode()
            rest = lines[node.lineno - 1][len(start) :]
            lines[node.lineno - 1] = start + rest.replace(f"from {target} ", f"from .{flat_name(target)} ", 1)
    path = "/".join(module.split(".")) + ("/__init__.py" if spec.submodule_search_locations else ".py")
    return path, "".join(lines), imported


def _check(module: str, node: ast.ImportFrom, target: str) -> None:
    where = f"{module}, line {node.lineno}"
    spec = None if node.level else importlib.util.find_spec(target)
    is_package = spec is not None and spec.submodule_search_locations is not None
    if node.level:
        raise ValueError(f"{where}: relative imports stay within one folder: write `from {_PACKAGE}... import ...`")
    for alias in node.names:
        if alias.name == "*" or (is_package and importlib.util.find_spec(f"{target}.{alias.name}") is not None):
            raise ValueError(f"{where}: name what {target} holds, not {alias.name!r}: a flat folder has no packages")
