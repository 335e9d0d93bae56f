"""A trained model on one device, from a run, a checkpoint of either engine, an export or a Hugging Face folder."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mega_scale.data import vocabulary_size
from mega_scale.hub import open_folder
from mega_scale.model import MegaConfig, MegaForCausalLM
from mega_scale.parallel import Values, fill, open_weights
from mega_scale.training.checkpoint import STATE, find_checkpoint, verify


def describe_model(folder: Path, config: MegaConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write what a checkpoint needs beside weights to be a model again: its configuration and tokenizer."""
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def open_model(
    path: Path, key: bytes | None = None
) -> tuple[MegaConfig, Mapping[str, Tensor], PreTrainedTokenizerBase]:
    """Open a model without reading its weights.

    Args:
        path: an export or Hugging Face folder (it has config.json), a checkpoint, or a run folder (its newest one).
        key: the secret with which the checkpoint must be signed, if there is one.

    Returns:
        Configuration; full CPU tensors by state-dict name, read when asked for; tokenizer.

    Raises:
        ValueError: the path is none of these, the checkpoint is damaged, or the weights do not fit the
            configuration.
    """
    tensors: Mapping[str, Tensor]
    if (path / "config.json").is_file():
        config, tensors = open_folder(path)
        described = path
    else:
        folder, _ = find_checkpoint(path, key)
        verify(folder, key)
        described = folder / "model"
        try:
            config = MegaConfig.from_pretrained(described, local_files_only=True)
        except Exception as error:  # of any kind, for a file that describes no model
            raise ValueError(f"{described} describes no model ({_reason(error)}): choose another checkpoint") from None
        tensors = open_weights(folder / STATE)
    try:
        tokenizer = AutoTokenizer.from_pretrained(described, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # every format has errors of its own
        raise ValueError(f"{described} has no tokenizer ({_reason(error)}): save one there") from None
    if (size := vocabulary_size(tokenizer)) > config.vocab_size:
        raise ValueError(
            f"{described} has a tokenizer of {size} ids, but a model of vocab_size={config.vocab_size}: save there the "
            "tokenizer that the model was trained with"
        )
    return config, tensors, tokenizer


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def values_from(tensors: Mapping[str, Tensor]) -> Values:
    """Values to fill a model with, from tensors by name."""

    def value(name: str, owner: nn.Module, local_name: str) -> Tensor:
        return tensors[name]

    return value


def load_model(
    path: Path, device: torch.device, dtype: torch.dtype = torch.float32, key: bytes | None = None
) -> tuple[MegaForCausalLM, PreTrainedTokenizerBase]:
    """Load a model for inference on one device, one tensor at a time.

    Args:
        path: see `open_model`.
        device: where it goes.
        dtype: of the weights; those of the moving average stay fp32.
        key: the secret with which a checkpoint must be signed, if there is one.

    Returns:
        The model in eval mode, and its tokenizer.

    Raises:
        ValueError: see `open_model`.
    """
    config, tensors, tokenizer = open_model(path, key)
    with torch.device("meta"):
        model = MegaForCausalLM(config)
    full = values_from(tensors)

    def value(name: str, owner: nn.Module, local_name: str) -> Tensor:
        exact = any(part in name for part in MegaForCausalLM.fp32_modules)
        return full(name, owner, local_name).to(torch.float32 if exact else dtype)

    fill(model, value, lambda old, tensor: nn.Parameter(tensor.to(device)), device)
    return model.eval(), tokenizer
