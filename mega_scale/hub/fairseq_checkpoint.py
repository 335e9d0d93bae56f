"""fairseq's files: checkpoints read without running code and written as folders, dictionaries as tokenizers."""

import argparse
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mega_scale.files import check_destination, write_folder
from mega_scale.hub.export import write_export, write_tokenizer
from mega_scale.hub.fairseq import LAYOUTS, fairseq_to_mega, layout_named
from mega_scale.model import MegaConfig, MegaModel


class FairseqCheckpoint(NamedTuple):
    """What a checkpoint file holds of a model.

    Args:
        state: the model's state dict; its tensors stay in the mapped file until they are used.
        args: the command line's options by name, such as decoder_embed_dim; empty for a bare state dict.
    """

    state: dict[str, Tensor]
    args: dict[str, Any]


# Field of MegaConfig to fairseq option; {side} is encoder or decoder.
_SHARED_OPTIONS = {
    "hidden_size": "{side}_embed_dim",
    "intermediate_size": "{side}_hidden_dim",
    "nffn_hidden_size": "{side}_ffn_embed_dim",
    "num_hidden_layers": "{side}_layers",
    "activation": "activation_fn",
    "attention_activation": "attention_activation_fn",
    "dropout_prob": "dropout",
    "embedding_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "use_feature_dropout": "feature_dropout",
    "relative_positional_bias": "rel_pos_bias",
    "truncation": "truncation_length",
}
_TRANSLATION_OPTIONS = {
    "shared_representation_size": "{side}_z_dim",
    "ema_projection_size": "{side}_n_dim",
    "chunk_size": "{side}_chunk_size",
    "hidden_dropout_prob": "hidden_dropout",
    "nffn_activation_dropout_prob": "activation_dropout",
    "normalization_type": "normalization_type",
    "normalize_before_mega": "normalize_before",
}
_LRA_OPTIONS = {
    "shared_representation_size": "z_dim",
    "ema_projection_size": "n_dim",
    "chunk_size": "chunk_size",
    "hidden_dropout_prob": "act_dropout",
    "nffn_activation_dropout_prob": "act_dropout",
    "normalization_type": "norm_type",
    "normalize_before_mega": "encoder_normalize_before",
    "max_positions": "max_positions",
}
_OPTIONS = {
    "lm": {
        **_SHARED_OPTIONS,
        **_TRANSLATION_OPTIONS,
        "max_positions": "max_target_positions",
        "tie_word_embeddings": "share_decoder_input_output_embed",
        "scale_embeddings": "no_scale_embedding",
    },
    "encoder": {
        **_SHARED_OPTIONS,
        **_TRANSLATION_OPTIONS,
        "max_positions": "max_source_positions",
        "scale_embeddings": "no_scale_embedding",
    },
    "lra": {**_SHARED_OPTIONS, **_LRA_OPTIONS},
}
_SIDES = {"lm": "decoder", "encoder": "encoder", "lra": "encoder"}
CHECKPOINT_LAYOUTS = tuple(_SIDES)


def read_fairseq(path: str | os.PathLike[str]) -> FairseqCheckpoint:
    """Read a checkpoint that fairseq saved (`model` and `args`), or a bare state dict: a file of `torch.save`.

    It is mapped into memory, and nothing in it is executed.

    Raises:
        ValueError: the file is not readable so, or holds no model.
    """
    try:
        # The options are a Namespace, which holds values and runs nothing when it is read.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = " ".join(str(error).split())[:300] or repr(error)
        raise ValueError(
            f"{path} cannot be read as tensors and plain values ({reason}): open it where you trust it, and save "
            '{"model": checkpoint["model"], "args": checkpoint["args"]} with a torch of 1.6 or newer'
        ) from error
    whole = isinstance(content, dict) and "model" in content
    state = content["model"] if whole else content
    args = content.get("args") if whole else None
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no model: expected named tensors, or a fairseq checkpoint with them in 'model'")
    return FairseqCheckpoint(dict(state), {} if args is None else dict(vars(args)))


def find_layout(state: Mapping[str, Tensor]) -> str:
    """Which of `LAYOUTS` a state dict has, told by the name of its word embedding.

    Raises:
        ValueError: none, or several.
    """
    found = [name for name, layout in LAYOUTS.items() if layout.embedding in state]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"the checkpoint holds several models: choose --layout {' or --layout '.join(found)}")
    expected = ", ".join(layout.embedding for layout in LAYOUTS.values())
    raise ValueError(
        f"no word embedding among the names (looked for {expected}): an adaptive input, an input of numbers, and "
        "models other than Mega cannot be converted"
    )


def config_from_args(
    checkpoint: FairseqCheckpoint, layout: str, changes: Mapping[str, Any] | None = None
) -> MegaConfig:
    """The configuration of a fairseq model, from the options in its checkpoint.

    Args:
        checkpoint: see `read_fairseq`.
        layout: one of `CHECKPOINT_LAYOUTS`, see `fairseq_to_mega`.
        changes: fields that replace what the options say, or stand in for options that the checkpoint lacks.

    Raises:
        ValueError: an option is absent and not replaced, or no model here has it.
    """
    kind = layout_named(layout)
    if layout not in _OPTIONS:
        raise ValueError(f"a checkpoint of layout={layout!r} names no options: build its MegaConfig by hand")
    changes = dict(changes or {})
    options = {field: name.format(side=_SIDES[layout]) for field, name in _OPTIONS[layout].items()}
    absent = [
        f"{field} ({name})" for field, name in options.items() if field not in changes and name not in checkpoint.args
    ]
    if absent:
        raise ValueError(f"the checkpoint does not say {', '.join(absent)}: give the fields with --set FIELD=VALUE")
    values = {field: checkpoint.args[name] for field, name in options.items() if name in checkpoint.args}
    if "scale_embeddings" in values:
        values["scale_embeddings"] = not values["scale_embeddings"]
    values |= changes
    try:
        return MegaConfig(**_as_fields(values, changes, checkpoint.state, layout, kind.embedding))
    except StrictDataclassError as error:
        # The strict dataclass wraps what its validators raise.
        raise ValueError(str(error.__cause__ or error)) from None


def _as_fields(
    values: dict[str, Any], changes: Mapping[str, Any], state: Mapping[str, Tensor], layout: str, embedding: str
) -> dict[str, Any]:
    """Complete the fields that follow from others, in fairseq's code."""
    if embedding in state:
        values.setdefault("vocab_size", state[embedding].shape[0])
    values["use_chunking"] = changes.get("use_chunking", values["chunk_size"] > 0)
    if "max_positions" not in changes and values["use_chunking"]:
        values["max_positions"] = values["chunk_size"]
    if values["truncation"] is not None and values["truncation"] < 1:
        values["truncation"] = None
    values["use_normalized_ffn"] = values["nffn_hidden_size"] > 0
    if not values["use_normalized_ffn"]:
        del values["nffn_hidden_size"]
    before = values["normalize_before_mega"]
    derived = {"normalize_before_ffn": before, "final_norm": before, "add_lm_hidden_dense_layer": False}
    prefix = LAYOUTS[layout].final_norm
    learned = prefix is not None and any(name.startswith(f"{prefix}norm.") for name in state)
    derived["final_norm_affine"] = before and learned
    if layout == "lm":
        cross = any(".cross_attn." in name for name in state)
        derived |= {"is_decoder": True, "bidirectional": False, "lm_head_bias": False, "add_cross_attention": cross}
    return derived | values


# fairseq puts these before the words of the file, in this order.
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")


def tokenizer_from_dictionary(path: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """Read a dictionary as a tokenizer that splits at white space, as fairseq does.

    Args:
        path: a text file with one word and its count a line, the most frequent first.

    Returns:
        The tokenizer, with fairseq's ids: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, then the words in order.

    Raises:
        ValueError: a line is not a word and a count, or a word comes twice.
    """
    vocabulary = {word: number for number, word in enumerate(_SPECIAL)}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        word, _, count = line.rpartition(" ")
        if not word or not count.isdecimal():
            raise ValueError(f"{path}, line {number} is {line!r}: expected a word, a space and a count")
        if word in vocabulary:
            raise ValueError(f"{path}, line {number} repeats the word {word!r}: remove the line")
        vocabulary[word] = len(vocabulary)
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    bos, pad, eos, unknown = _SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, pad_token=pad, eos_token=eos, unk_token=unknown
    )


def convert_checkpoint(
    checkpoint: Path,
    out: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    layout: str | None,
    ema_input: str,
    changes: dict[str, Any],
    overwrite: bool,
) -> str:
    """Write the model of fairseq's file `checkpoint` as a Hugging Face folder `out`; returns its layout.

    Args:
        tokenizer: saved with the model; a language model needs one.
        layout: kind of model, see `fairseq_to_mega`; none means to tell it by the names.
        ema_input: see `fairseq_to_mega`.
        changes: fields of MegaConfig that replace what the checkpoint says.
        overwrite: whether an earlier export is replaced.

    Raises:
        ValueError: the checkpoint is not readable, has parts without counterpart, or the destination is taken.
    """
    check_destination(out, overwrite=overwrite)
    read = read_fairseq(checkpoint)
    layout = find_layout(read.state) if layout is None else layout
    config = config_from_args(read, layout, changes)
    tensors = fairseq_to_mega(read.state, config, layout=layout, ema_input=ema_input)
    card = f"# {out.resolve().name}\n\nA Mega model (arXiv 2209.10655), converted from fairseq's `{checkpoint.name}`.\n"
    if layout == "lm":
        if tokenizer is None:
            raise ValueError("a language model needs a tokenizer: give --dictionary dict.txt, or --tokenizer")
        write_export(out, tensors, config, tokenizer, card, overwrite=overwrite)
        return layout
    model = MegaModel(config, add_pooling_layer=False)
    model.load_state_dict(tensors, strict=True)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
        if tokenizer is not None:
            write_tokenizer(folder, tokenizer)

    write_folder(out, write)
    return layout
