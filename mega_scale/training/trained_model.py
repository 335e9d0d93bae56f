"""A trained model on one device, from a run, a checkpoint of either engine, an export or a Hugging Face folder."""

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mega_scale.checkpoint.folder import STATE, checkpoints, find_checkpoint, own_files, verify
from mega_scale.checkpoint.state import open_weights
from mega_scale.data import vocabulary_size
from mega_scale.model import MegaConfig, MegaForCausalLM
from mega_scale.parallel import Values, fill


def describe_model(config: MegaConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """Files of a checkpoint by path that make weights a model again: its configuration and tokenizer."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


class Opened(NamedTuple):
    """A model whose weights are not read yet.

    Args:
        config: of the model.
        tensors: full CPU tensors by state-dict name, read when asked for.
        tokenizer: that lies beside it.
        folder: the export, or the checkpoint, that it is.
    """

    config: MegaConfig
    tensors: Mapping[str, Tensor]
    tokenizer: PreTrainedTokenizerBase
    folder: Path


def log_to_stderr(line: str) -> None:
    """Print a line beside what a command prints."""
    print(f"mega_scale | {line}", file=sys.stderr, flush=True)


def open_model(path: Path, key: bytes | None = None, *, log: Callable[[str], None] = log_to_stderr) -> Opened:
    """Open a model without reading its weights.

    Args:
        path: an export or Hugging Face folder (it has config.json), a checkpoint, or a run folder (its newest valid
            one).
        key: secret with which the checkpoint must be signed, if there is one.
        log: see `open_checkpoint`.

    Raises:
        ValueError: the path is none of these, the checkpoint is damaged, or the weights do not fit the configuration.
    """
    if not is_export(path):
        return open_checkpoint(path, key, log=log)
    from mega_scale.hub.folder import open_folder

    config, tensors = open_folder(path)
    return _fitting(Opened(config, tensors, read_tokenizer(path), path))


def open_checkpoint(
    path: Path, key: bytes | None = None, *, older: bool = True, log: Callable[[str], None] = log_to_stderr
) -> Opened:
    """Open the model of a checkpoint, every byte of which is verified first.

    Args:
        path: a checkpoint, or a run folder (its newest valid one).
        key: secret with which it must be signed, if there is one.
        older: whether an older one may be taken where the newest of the run is damaged or gone.
        log: is given one line where there is something to know: which checkpoint is taken, and why none that is newer.

    Raises:
        ValueError: it is damaged, or there is none.
    """
    folder, notes = find_checkpoint(path, key, older=older, proof=verify)
    if notes:
        log(f"{folder} is taken: {'; '.join(notes)}")
    return _fitting(Opened(read_model(folder), open_weights(folder / STATE), read_own_tokenizer(folder), folder))


def is_export(path: Path) -> bool:
    """Whether a path means an export or a Hugging Face folder rather than a run or a checkpoint."""
    return (path / "config.json").is_file() and not checkpoints(path)


def read_model(folder: Path) -> MegaConfig:
    """Configuration of a verified checkpoint's model, from its own files alone.

    Raises ValueError where they describe none.
    """
    with _own_part(folder, "model") as described:
        try:
            return MegaConfig.from_pretrained(described, local_files_only=True)
        except Exception as error:  # of any kind, for a file that describes no model
            named = folder / "model"
            raise ValueError(f"{named} describes no model ({_reason(error)}): choose another checkpoint") from None


def read_own_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Tokenizer of a verified checkpoint, from its own files alone. Raises ValueError where none can be loaded."""
    with _own_part(folder, "model") as described:
        return read_tokenizer(described)


@contextlib.contextmanager
def _own_part(folder: Path, part: str) -> Iterator[Path]:
    """A folder of a verified checkpoint, or a copy without what is none of it: loaders take whatever they find."""
    found = {path.relative_to(folder).as_posix() for path in (folder / part).rglob("*") if not path.is_dir()}
    names = {name for name in own_files(folder) if name.startswith(f"{part}/")}
    if found == names:
        yield folder / part
        return
    with tempfile.TemporaryDirectory() as copy:
        for name in names:
            target = Path(copy) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, target)
        yield Path(copy) / part


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder; code in it is not run. Raises ValueError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # every format has errors of its own
        raise ValueError(f"{folder} has no tokenizer ({_reason(error)}): save one there") from None


def _fitting(opened: Opened) -> Opened:
    """Refuse a tokenizer that is not the model's."""
    if (size := vocabulary_size(opened.tokenizer)) > opened.config.vocab_size:
        raise ValueError(
            f"{opened.folder} has a tokenizer of {size} ids, but a model of vocab_size={opened.config.vocab_size}: "
            "save there the tokenizer that the model was trained with"
        )
    return opened


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def values_from(tensors: Mapping[str, Tensor]) -> Values:
    """Values to fill a model with, from tensors by name."""

    def value(name: str, owner: nn.Module, local_name: str) -> Tensor:
        return tensors[name]

    return value


def load_model(
    path: Path,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    key: bytes | None = None,
    log: Callable[[str], None] = log_to_stderr,
) -> tuple[MegaForCausalLM, PreTrainedTokenizerBase, Path]:
    """Load a model for inference on one device, one tensor at a time.

    Args:
        path: see `open_model`.
        device: where it goes.
        dtype: of the weights; those of the moving average stay fp32.
        key: see `open_model`.
        log: see `open_checkpoint`.

    Returns:
        The model in eval mode, its tokenizer, and the folder that it was loaded from.
    """
    config, tensors, tokenizer, folder = open_model(path, key, log=log)
    with torch.device("meta"):
        model = MegaForCausalLM(config)
    full = values_from(tensors)

    def value(name: str, owner: nn.Module, local_name: str) -> Tensor:
        exact = any(part in name for part in MegaForCausalLM.fp32_modules)
        return full(name, owner, local_name).to(torch.float32 if exact else dtype)

    fill(model, value, lambda old, tensor: nn.Parameter(tensor.to(device)), device)
    return model.eval(), tokenizer, folder
