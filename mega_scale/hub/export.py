"""Writes a model as one Hugging Face folder, reading its tensors one at a time."""

import copy
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from mega_scale.data import end_ids, prompt_ids, separator_id, vocabulary_size
from mega_scale.hub.layout import Layout, layout_of
from mega_scale.hub.remote_code import auto_classes, auto_map, remote_code
from mega_scale.hub.tokenizer_files import write_tokenizer
from mega_scale.model import MegaConfig
from mega_scale.model.configuration_mega import SAVED_BY

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEFAULT_SHARD_BYTES = 5_000_000_000


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
    layout = layout_of(config)
    wrong = layout.differences({name: layout.tensors[name].shape if name in layout.tensors else () for name in tensors})
    if wrong:
        raise ValueError(f"the tensors do not fit the configuration: {'; '.join(wrong)}")

    def write(target: Path) -> None:
        (target / "README.md").write_text(card, encoding="utf-8")
        _write_configs(target, config, tokenizer, DTYPES[dtype], with_code)
        write_tokenizer(target, tokenizer)
        _write_weights(target, tensors, layout, max_shard_bytes, DTYPES[dtype])
        for file in target.glob("*.safetensors"):
            # safetensors makes its files private; they are to be as readable as the rest.
            shutil.copymode(target / "README.md", file)

    write_then_rename(folder, write)
    return folder


def check_destination(folder: Path, *, overwrite: bool, kind: str = "export", holds: str = "config.json") -> None:
    """Refuse a destination that an export, or another folder that a command writes, must not replace.

    Args:
        folder: where the folder is to appear.
        overwrite: whether an earlier one of its kind may be replaced; any other content never is.
        kind: what the command writes, in a word.
        holds: file by which that is known.

    Raises:
        ValueError: the path is a file, or a folder with content that is not to be replaced.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{folder} exists and is not empty: choose another folder, or replace it with --overwrite")
    if not (folder / holds).is_file():
        raise ValueError(f"{folder} holds no {holds}, so it is no {kind} and stays: choose another folder")


def plan_shards(layout: Layout, max_shard_bytes: int, dtype: torch.dtype) -> list[list[str]]:
    """Distribute a model's stored tensors over files, in the model's order.

    Args:
        layout: the model's layout.
        max_shard_bytes: largest file, bytes of tensor data.
        dtype: floating dtype of the folder.

    Returns:
        Names, file by file; a file exceeds the limit only when it holds a single tensor.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name in layout.stored():
        size = _stored_bytes(layout, name, dtype)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _stored_bytes(layout: Layout, name: str, dtype: torch.dtype) -> int:
    return layout.tensors[name].numel() * layout.stored_dtype(name, dtype).itemsize


def _write_weights(
    folder: Path, tensors: Mapping[str, Tensor], layout: Layout, max_shard_bytes: int, dtype: torch.dtype
) -> None:
    # Of tied names a source may hold any one. Only iterate over it: `in` reads the tensor of a mapping without its own.
    names = list(tensors)
    source_of = {layout.ties.get(name, name): name for name in names} | {name: name for name in names}
    shards = plan_shards(layout, max_shard_bytes, dtype)
    weight_map = {}
    for number, part in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard = {}
        for name in part:
            shard[name] = _tensor_to_store(name, tensors[source_of[name]], layout, layout.stored_dtype(name, dtype))
            weight_map[name] = file
        # Readers of both transformers lines refuse a file that does not name its framework.
        save_file(shard, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(_stored_bytes(layout, name, dtype) for name in layout.stored())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _tensor_to_store(name: str, tensor: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    if tensor.shape != layout.tensors[name].shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)}, expected {tuple(layout.tensors[name].shape)}")
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


def write_then_rename(folder: Path, write: Callable[[Path], None]) -> None:
    """Create or replace a folder as a whole, so that it appears under its name only when it is complete.

    Args:
        folder: the folder; what it holds is replaced.
        write: fills the empty folder that it is given.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        write(partial)
        if folder.exists() and any(folder.iterdir()):
            replaced = folder.with_name(f".{folder.name}.{os.getpid()}.replaced")
            folder.rename(replaced)
            partial.rename(folder)
            shutil.rmtree(replaced)
        else:
            partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
