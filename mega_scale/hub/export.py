"""Writes a model as one Hugging Face folder, tensor by tensor, with its tokenizer and, if wanted, its own Python files.

transformers copies such Python files into one folder and imports them as one package, so they are flat: a module of
mega_scale.model keeps its name, one of mega_scale.ops carries that name too, and imports between them become relative.
"""

import ast
import copy
import importlib.util
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto import modeling_auto

from mega_scale.data import end_ids, prompt_ids, separator_id, vocabulary_size
from mega_scale.files import check_destination, write_folder
from mega_scale.hub.folder import StateDictSpec, state_dict_spec
from mega_scale.model import MegaConfig
from mega_scale.model.configuration_mega import SAVED_BY

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEFAULT_SHARD_BYTES = 5_000_000_000
# What tokenizers 0.15 knows; parts that came later are absent.
_KINDS = {
    "model": {"BPE", "WordPiece", "WordLevel", "Unigram"},
    "normalizer": {
        "BertNormalizer", "Strip", "StripAccents", "NFC", "NFD", "NFKC", "NFKD", "Sequence", "Lowercase", "Nmt",
        "Precompiled", "Replace", "Prepend",
    },
    "pre_tokenizer": {
        "BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Metaspace", "Whitespace", "Sequence", "Split",
        "Punctuation", "WhitespaceSplit", "Digits", "UnicodeScripts",
    },
    "post_processor": {"BertProcessing", "ByteLevel", "RobertaProcessing", "Sequence", "TemplateProcessing"},
    "decoder": {
        "BPEDecoder", "ByteFallback", "ByteLevel", "CTC", "Fuse", "Metaspace", "Replace", "Sequence", "Strip",
        "WordPiece",
    },
}  # fmt: skip


def write_export(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    config: MegaConfig,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    dtype: str = "fp32",
    overwrite: bool = False,
    with_code: bool = False,
) -> Path:
    """Write a causal language model as a folder that `AutoModelForCausalLM` and transformers 4.37.2 load.

    Safetensors (with an index when there are several files), config, generation config, tokenizer and model card.
    Memory stays below one shard and one tensor. The folder appears under its name only when it is complete.

    Args:
        folder: the folder to create.
        tensors: name to full tensor of the model's state dict; each is read once. Of tied names one is enough.
        config: the model's configuration.
        tokenizer: saved beside the weights; its special tokens end generation.
        card: Markdown text of README.md.
        max_shard_bytes: largest weight file, bytes; a single larger tensor gets a file of its own.
        dtype: "fp32" or "bf16", of the parameters; buffers and the moving average's parameters stay in fp32.
        overwrite: whether an export that is already there is replaced.
        with_code: whether the folder holds the model's Python files too, by which it loads without mega_scale when
            `trust_remote_code=True` is given.

    Returns:
        The folder.

    Raises:
        ValueError: the destination is taken, an argument is out of range, or tensors do not fit the configuration.
    """
    folder = Path(folder)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} must be at least 1 byte")
    if (size := vocabulary_size(tokenizer)) > config.vocab_size:
        raise ValueError(
            f"the tokenizer needs ids for {size} tokens, but vocab_size={config.vocab_size}: export the model with the "
            "tokenizer it was trained with"
        )
    check_destination(folder, overwrite=overwrite)
    spec = state_dict_spec(config)
    wrong = spec.differences({name: spec.tensors[name].shape if name in spec.tensors else () for name in tensors})
    if wrong:
        raise ValueError(f"the tensors do not fit the configuration: {'; '.join(wrong)}")

    def write(target: Path) -> None:
        (target / "README.md").write_text(card, encoding="utf-8")
        _write_configs(target, config, tokenizer, DTYPES[dtype], with_code)
        write_tokenizer(target, tokenizer)
        _write_weights(target, tensors, spec, max_shard_bytes, DTYPES[dtype])
        for file in target.glob("*.safetensors"):
            # safetensors makes its files private; they are to be as readable as the rest.
            shutil.copymode(target / "README.md", file)

    write_folder(folder, write)
    return folder


def plan_shards(spec: StateDictSpec, max_shard_bytes: int, dtype: torch.dtype) -> list[list[str]]:
    """Distribute a model's tensors, in its order, over files of at most `max_shard_bytes` of data; returns their names.

    A tensor that is larger gets a file of its own.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name in spec.stored():
        size = _stored_bytes(spec, name, dtype)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _stored_bytes(spec: StateDictSpec, name: str, dtype: torch.dtype) -> int:
    return spec.tensors[name].numel() * spec.stored_dtype(name, dtype).itemsize


def _write_weights(
    folder: Path, tensors: Mapping[str, Tensor], spec: StateDictSpec, max_shard_bytes: int, dtype: torch.dtype
) -> None:
    # Only iterate over the tensors: `in` reads one, of a mapping that defines no `in` of its own.
    source_of = spec.complete({name: name for name in tensors})
    shards = plan_shards(spec, max_shard_bytes, dtype)
    weight_map = {}
    for number, part in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard = {}
        for name in part:
            shard[name] = _tensor_to_store(name, tensors[source_of[name]], spec, spec.stored_dtype(name, dtype))
            weight_map[name] = file
        # Readers of both transformers lines refuse a file that does not name its framework.
        save_file(shard, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(_stored_bytes(spec, name, dtype) for name in spec.stored())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _tensor_to_store(name: str, tensor: Tensor, spec: StateDictSpec, dtype: torch.dtype) -> Tensor:
    if tensor.shape != spec.tensors[name].shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)}, expected {tuple(spec.tensors[name].shape)}")
    tensor = tensor.detach().to("cpu", dtype).contiguous()
    # A view would keep its whole storage in memory, and safetensors refuses storage shared between tensors.
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _write_configs(
    folder: Path, config: MegaConfig, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, with_code: bool
) -> None:
    config = copy.deepcopy(config)
    config.architectures = ["MegaForCausalLM"]
    config.dtype = dtype
    setattr(config, SAVED_BY, "mega_scale")
    # A configuration that was read from a folder with code may point to files that this one lacks.
    vars(config).pop("auto_map", None)
    if with_code:
        classes = auto_classes()
        config.auto_map = auto_map(classes)
        for name, text in remote_code(classes).items():
            (folder / name).write_text(text, encoding="utf-8")
    if config.eos_token_id is None:
        config.eos_token_id = separator_id(tokenizer)
    config.save_pretrained(folder)
    generation = GenerationConfig.from_model_config(config)
    # The tokenizer wrote the training text, so its special tokens are the ones that the model has learned.
    generation.eos_token_id = end_ids(tokenizer, config.eos_token_id)
    # What an empty prompt begins with.
    generation.bos_token_id = prompt_ids(tokenizer, "")[0] if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if tokenizer.pad_token_id is not None:
        generation.pad_token_id = tokenizer.pad_token_id
    generation.save_pretrained(folder)


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save a tokenizer for transformers 4.37.2 and 5; a fast one as the general class, which reads tokenizer.json."""
    # 4.37.2 reads a chat template in the settings only, 5 there too.
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    # The class that reads tokenizer.json as it is, under the name that transformers 4 knows; 5 reads both names.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    _write_json(path, settings)
    path = folder / "tokenizer.json"
    definition = json.loads(path.read_text(encoding="utf-8"))
    merges = definition["model"].get("merges")
    if merges and not _has_spaces(merges):
        definition["model"]["merges"] = [" ".join(pair) for pair in _pairs(merges)]
    for part in _parts(definition, ("pre_tokenizer", "decoder")):
        if part["type"] == "Metaspace":
            part["add_prefix_space"] = part["prepend_scheme"] != "never"
    _write_json(path, definition)


def tokenizer_beyond_transformers_4(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What of a tokenizer transformers 4.37.2 does not read, in lines; none when it gives the same ids there."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return [f"the tokenizer is of the class `{type(tokenizer).__name__}`, which was not tried there"]
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    model = definition["model"]
    lines = [
        f"the tokenizer's {room.replace('_', '-')} `{part['type']}` is not known there"
        for room, known in _KINDS.items()
        for part in _parts(definition, (room,))
        if part["type"] not in known
    ]
    if _has_spaces(model.get("merges") or []):
        lines.append("the tokenizer merges pieces with spaces in them, which its files cannot hold there")
    if model.get("ignore_merges"):
        lines.append("the tokenizer takes a whole word before its merges (`ignore_merges`), which it does not do there")
    if any(part["type"] == "Metaspace" and not part.get("split", True) for part in _parts(definition, _KINDS)):
        lines.append("the tokenizer does not split at spaces (`Metaspace` with `split=false`), which it does there")
    return lines


def _parts(definition: dict[str, Any], rooms: Any) -> list[dict[str, Any]]:
    """Every component in some places of a tokenizer.json, those inside sequences included."""
    waiting, found = [definition.get(room) for room in rooms], []
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict) and "type" in part:
            found.append(part)
            for name in ("normalizers", "pretokenizers", "processors", "decoders"):
                waiting += part.get(name, [])
    return found


def _pairs(merges: list[Any]) -> list[list[str]]:
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]


def _has_spaces(merges: list[Any]) -> bool:
    return any(" " in piece for pair in _pairs(merges) for piece in pair)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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

    Returns:
        File name to source text.

    Raises:
        ValueError: a module imports from elsewhere than model and ops, or in a form that cannot be made relative.
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
    """Name of a module in a flat folder: attention for `mega_scale.model.attention`, ops_ema for `mega_scale.ops.ema`.

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
