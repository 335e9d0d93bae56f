"""Writes a model as one Hugging Face folder, tensor by tensor, with tokenizer, model card and, if wanted, its code."""

import ast
import copy
import importlib.util
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto import modeling_auto

from mega_scale.data.tokenizer import end_ids, prompt_ids, separator_id, vocabulary_size
from mega_scale.files import check_destination, write_folder, write_json
from mega_scale.hub.folder import StateDictSpec, state_dict_spec
from mega_scale.model import MegaConfig, MegalodonConfig, causal_lm_class
from mega_scale.model.configuration_mega import SAVED_BY, BaseConfig

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
    config: BaseConfig,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    dtype: str = "fp32",
    overwrite: bool = False,
    with_code: bool = False,
) -> Path:
    """Write a causal language model as a folder that `AutoModelForCausalLM` loads, and of Mega transformers 4.37.2.

    The folder, which is returned, appears under its name only when it is complete. Memory stays below one shard and one
    tensor: `tensors`, full ones by their names in the state dict, are read once each; of tied names one is enough.

    `card` is the text of README.md. A tensor larger than `max_shard_bytes` gets a file of its own. Parameters are
    stored in `dtype`, "fp32" or "bf16", those of the moving average and buffers in fp32. `with_code` adds the model's
    Python files, see `remote_code`. Raises ValueError where the destination is taken, an argument is out of range, or
    tensors do not fit.
    """
    folder = Path(folder)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} must be at least 1 byte")
    if (size := vocabulary_size(tokenizer)) > config.vocab_size:
        remedy = "export the model with the tokenizer it was trained with"
        raise ValueError(f"the tokenizer needs ids for {size} tokens, but vocab_size={config.vocab_size}: {remedy}")
    check_destination(folder, overwrite=overwrite)
    spec = state_dict_spec(config)
    shapes = {name: spec.tensors[name].shape if name in spec.tensors else () for name in tensors}
    spec.require(shapes, "the tensors do not fit the configuration")
    with write_folder(folder) as target:
        (target / "README.md").write_text(card, encoding="utf-8")
        _write_configs(target, config, tokenizer, DTYPES[dtype], with_code)
        write_tokenizer(target, tokenizer)
        _write_weights(target, tensors, spec, max_shard_bytes, DTYPES[dtype])
    return folder


def _write_weights(
    folder: Path, tensors: Mapping[str, Tensor], spec: StateDictSpec, max_shard_bytes: int, dtype: torch.dtype
) -> None:
    # Only iterate over the tensors: `in` reads one, of a mapping that defines no `in` of its own.
    source_of = spec.complete({name: name for name in tensors})
    # On the meta device, so that files are planned before anything is read.
    stored = {name: spec.tensors[name].to(spec.stored_dtype(name, dtype)) for name in spec.stored()}
    plan = split_torch_state_dict_into_shards(stored, max_shard_size=max_shard_bytes)
    for file, names in plan.filename_to_tensors.items():
        shard = {}
        for name in names:
            tensor, expected = tensors[source_of[name]], stored[name]
            if tensor.shape != expected.shape:
                raise ValueError(f"{name} is {tuple(tensor.shape)}, expected {tuple(expected.shape)}")
            tensor = tensor.detach().to("cpu", expected.dtype).contiguous()
            # A view would keep its whole storage in memory, and safetensors refuses storage shared between tensors.
            shard[name] = tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
        # Readers of both transformers lines refuse a file that does not name its framework.
        save_file(shard, folder / file, metadata={"format": "pt"})
        # safetensors makes its files private; they are to be as readable as the rest.
        shutil.copymode(folder / "README.md", folder / file)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def _write_configs(
    folder: Path, config: BaseConfig, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, with_code: bool
) -> None:
    config = copy.deepcopy(config)
    config.architectures = [causal_lm_class(config).__name__]
    config.dtype = dtype
    setattr(config, SAVED_BY, _PACKAGE)
    # A configuration that was read from a folder with code may point to files that this one lacks.
    vars(config).pop("auto_map", None)
    if with_code:
        classes = auto_classes(type(config))
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


# Tokenizers


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
    write_json(path, settings)
    path = folder / "tokenizer.json"
    definition = json.loads(path.read_text(encoding="utf-8"))
    merges = _merges(definition)
    if merges and not any(" " in piece for pair in merges for piece in pair):
        definition["model"]["merges"] = [" ".join(pair) for pair in merges]
    for part in _parts(definition, ("pre_tokenizer", "decoder")):
        if part["type"] == "Metaspace":
            part["add_prefix_space"] = part["prepend_scheme"] != "never"
    write_json(path, definition)


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


def _merges(definition: dict[str, Any]) -> list[list[str]]:
    merges = definition["model"].get("merges") or []
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]


# The model's own code, as files of one flat folder: transformers imports them as one package

_PACKAGE = "mega_scale"
_ROOMS = ("model", "ops")


def auto_classes(family: type[BaseConfig] = MegaConfig) -> dict[str, type]:
    """The classes that transformers' Auto classes give for a family's configuration, by the name of the Auto class."""
    found: dict[str, type] = {"AutoConfig": family}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None) if name.startswith("AutoModel") else None
        if mapping is not None and family in mapping:
            found[name] = mapping[family]
    return found


def auto_map(classes: dict[str, type]) -> dict[str, str]:
    """What config.json says under `auto_map`: Auto class to `file.Class`."""
    return {name: f"{flat_name(found.__module__)}.{found.__name__}" for name, found in classes.items()}


def remote_code(classes: dict[str, type]) -> dict[str, str]:
    """The modules that classes need, through all their imports within the project, as text by the name of a flat file.

    With them a folder loads without mega_scale, where `trust_remote_code=True` is given. Raises ValueError where one
    imports from elsewhere than model and ops, or in a form that cannot be made relative.
    """
    files: dict[str, str] = {}
    waiting = sorted({found.__module__ for found in classes.values()})
    for module in waiting:  # which grows
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise ValueError(f"{module} has no source file")
        name, path = f"{flat_name(module)}.py", module.replace(".", "/")
        path += "/__init__.py" if spec.submodule_search_locations else ".py"
        if name in files:
            raise ValueError(f"two modules would become {name}, one of them {module}: rename it")
        text, imported = _flatten(module, Path(spec.origin).read_text(encoding="utf-8"))
        files[name] = f"# Made by {_PACKAGE} from its own {path}; edits belong there.\n{text}"
        waiting += sorted(imported.difference(waiting))
    return dict(sorted(files.items()))


def flat_name(module: str) -> str:
    """Name of a module in a flat folder: layers for mega_scale.model.layers, ops_ema for mega_scale.ops.ema."""
    package, *parts = module.split(".")
    if package != _PACKAGE or not parts or parts[0] not in _ROOMS:
        raise ValueError(
            f"{module} cannot go with a model: it may import from {_PACKAGE}.model and {_PACKAGE}.ops only"
        )
    return "_".join(parts[1:] if parts[0] == "model" and len(parts) > 1 else parts)


def _flatten(module: str, source: str) -> tuple[str, set[str]]:
    """A module's text with relative imports, and the modules of the project that it imports."""
    lines, imported = source.splitlines(keepends=True), set()
    form = f"write `from {_PACKAGE}... import ...`"
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        where, target = f"{module}, line {node.lineno}", getattr(node, "module", None) or ""
        if isinstance(node, ast.Import):
            if any(alias.name.split(".")[0] == _PACKAGE for alias in node.names):
                raise ValueError(f"{where}: {form}")
        elif node.level:
            raise ValueError(f"{where}: relative imports stay within one folder: {form}")
        elif target.split(".")[0] == _PACKAGE:
            spec = importlib.util.find_spec(target)
            is_package = spec is not None and spec.submodule_search_locations is not None
            for alias in node.names:
                if alias.name == "*" or (is_package and importlib.util.find_spec(f"{target}.{alias.name}") is not None):
                    raise ValueError(
                        f"{where}: name what {target} holds, not {alias.name!r}: a flat folder has no packages"
                    )
            imported.add(target)
            absolute, relative = f"from {target} import", f"from .{flat_name(target)} import"
            lines[node.lineno - 1] = lines[node.lineno - 1].replace(absolute, relative, 1)
    return "".join(lines), imported


# The model card

_HOW_TO_LOAD = """\
```python
import mega_scale  # registers its model classes with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
prompt = tokenizer("def ", return_tensors="pt", add_special_tokens=False)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0]))
```
"""
_WITH_CODE = """\
The folder holds the model's own Python files. Without mega_scale, in an environment with only torch and transformers 5,
leave out its import and allow them to run:

```python
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
```
"""
# Absolute, of a home or variable, above a folder, on a Windows drive or host, or a file URL.
_OF_A_MACHINE = re.compile(r"[/~$\\]|\.\.[/\\]|[A-Za-z]:[/\\]|file:")
_TEXTS = ("sample_prompt",)  # are no paths, whatever they begin with
_PAPERS = {MegaConfig.model_type: ("Mega", "2209.10655"), MegalodonConfig.model_type: ("Megalodon", "2404.08801")}
_VERSIONS = (_PACKAGE, "torch", "transformers", "safetensors")
_NOT_IN_HF = {
    "scale_embeddings": (False, "it does not scale embeddings by sqrt(hidden_size)"),
    "final_norm": (False, "it has no norm after the last block"),
    "embedding_dropout_prob": (0.0, "it has no embedding dropout; this matters in training only"),
    "lm_head_bias": (True, "its head always has a bias, which it would initialise to zero"),
}


def model_card(
    name: str,
    config: BaseConfig,
    trainer: Mapping[str, Any],
    run: Mapping[str, Any],
    *,
    dtype: str = "fp32",
    with_code: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    average: bool = False,
) -> str:
    """Markdown text of an export's README.md, titled `name`, with the metadata block that model hubs read.

    It tells what a checkpoint's trainer.json and the settings of its `run`, by section, say; of paths on this machine
    only the last part. `average` says that the weights are the average of those of the run's steps. For the other
    arguments see `write_export`.
    """
    attention, chunk = "Attention spans the whole sequence.", config.attention_chunk
    if chunk is not None:
        attention = (
            f"Attention stays inside chunks of {chunk} tokens; the moving average carries information "
            "across them, so the cost is linear in the length."
        )
    family, paper = _PAPERS[config.model_type]
    spec = state_dict_spec(config)
    parameters = sum(spec.tensors[name].numel() for name in spec.stored() if name not in spec.buffers)
    model = {
        "parameters": f"{parameters:,}",
        "blocks": str(config.num_hidden_layers),
        "hidden size": str(config.hidden_size),
        "vocabulary": f"{config.vocab_size:,} tokens",
        "weights stored in": "fp32" if dtype == "fp32" else f"{dtype}; the moving average's parameters in fp32",
    }
    training = {"steps": f"{trainer['step']:,}", "tokens seen": f"{trainer['tokens']:,}"}
    validation = trainer.get("validation", {})
    if average:
        training["weights"] = f"exponential average over the steps, decay {run['train']['weight_average']}"
        validation = validation.get("average", {})
    if (loss := validation.get("loss")) is not None:
        # Beyond e^100 the figure says nothing, and exp overflows at 710.
        perplexity = f"{math.exp(loss):.2f}" if loss < 100 else "beyond measure"
        training["validation loss"] = f"{loss:.4f} nats/token (perplexity {perplexity})"
    if (bits := validation.get("bits_per_byte")) is not None:
        training["validation text"] = f"{bits:.4f} bits/byte"
    run, layout = _without_folders(run), trainer["layout"]
    data = run["data"]
    source = f"{data['hub_name']} ({data['hub_split']})" if data["source"] == "hub" else data["source"]
    if data["mixture"] is not None:
        source = f"a mixture of {', '.join(data['mixture'])}"
    files = f" ({', '.join(data['path'])})" if data["path"] else ""
    length = data["sequence_length"]
    training["data"] = f"{source}{files}, tokenizer {data['tokenizer']}, sequences of {length} tokens"
    ranks = layout["world_size"]
    training["layout"] = f"{layout['engine']}, ZeRO stage {layout['zero_stage']}, {ranks} rank(s)"
    settings = yaml.safe_dump(run, sort_keys=False, allow_unicode=True).strip()
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", settings)), default=0))
    versions = {"python": platform.python_version(), **{package: version(package) for package in _VERSIONS}}
    tags = f"tags:\n- {config.model_type}\n- {_PACKAGE}"
    sections = [
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n{tags}\n---",
        f"# {_inline(name)}",
        f"A {family} causal language model (arXiv {paper}), pretrained with mega_scale. {attention}",
        "## Load",
        _HOW_TO_LOAD,
        *([_WITH_CODE] if with_code else []),
        _in_transformers_4(config, tokenizer),
        f"## Model\n\n{_table(model)}",
        f"## Training\n\n{_table(training)}",
        f"The run's configuration:\n\n{fence}yaml\n{settings}\n{fence}",
        f"## Versions\n\n{_table(versions)}",
    ]
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _in_transformers_4(config: BaseConfig, tokenizer: PreTrainedTokenizerBase | None) -> str:
    if not isinstance(config, MegaConfig):
        return f"No release of transformers has {_PAPERS[config.model_type][0]} itself."
    beyond = [
        f"`{key}={getattr(config, key)!r}`: {effect}"
        for key, (default, effect) in _NOT_IN_HF.items()
        if getattr(config, key) != default
    ]
    if config.normalization_type == "rmsnorm":
        beyond.append("`normalization_type='rmsnorm'`: its RMSNorm returns the scaled input without normalising it")
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        definition = json.loads(tokenizer.backend_tokenizer.to_str())
        beyond += [
            f"the tokenizer's {room.replace('_', '-')} `{part['type']}` is not known there"
            for room, known in _KINDS.items()
            for part in _parts(definition, (room,))
            if part["type"] not in known
        ]
        if any(" " in piece for pair in _merges(definition) for piece in pair):
            beyond.append("the tokenizer merges pieces with spaces in them, which its files cannot hold there")
        if definition["model"].get("ignore_merges"):
            beyond.append("the tokenizer takes a whole word before its merges (`ignore_merges`), but not there")
        if any(part["type"] == "Metaspace" and not part.get("split", True) for part in _parts(definition, _KINDS)):
            beyond.append("the tokenizer does not split at spaces (`Metaspace` with `split=false`), but does there")
    elif tokenizer is not None:
        beyond.append(f"the tokenizer is of the class `{type(tokenizer).__name__}`, which was not tried there")
    if not beyond:
        spelt = " Its tokenizer reads a special token that a text spells out as that token, here as characters."
        note = spelt if getattr(tokenizer, "split_special_tokens", False) else ""
        return f"The folder also loads in transformers 4.37.2, with its own `MegaForCausalLM`.{note}"
    lines = "\n".join(f"* {line}" for line in beyond)
    return f"transformers 4.37.2 has a `MegaForCausalLM` too, but lacks part of this model:\n\n{lines}"


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_inline(value)} |" for name, value in rows.items())])


def _inline(text: str) -> str:
    """A text as one line of Markdown that shows it as it is, in a table's cell too."""
    return re.sub(r"([\\`*|<>\[\]])", r"\\\1", " ".join(text.split()))


def _without_folders(value: Any, key: str = "") -> Any:
    """Settings with the last part only of every path that names places of one machine."""
    if isinstance(value, Mapping):
        return {_without_folders(name): _without_folders(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    if not isinstance(value, str) or key in _TEXTS or not _OF_A_MACHINE.match(value):
        return value
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
