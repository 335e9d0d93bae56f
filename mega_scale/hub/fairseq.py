"""The original fairseq Mega models and ours: weights by tables of names that run both ways, checkpoints, dictionaries.

In fairseq's published checkpoints `delta` weighs the input of the moving average (`move`) and `alpha` damps the past,
the reverse of the paper. Its last version weighs the input with `alpha`; names and shapes are the same.
"""

import argparse
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mega_scale.files import check_destination, write_folder
from mega_scale.hub.export import write_export, write_tokenizer
from mega_scale.hub.folder import StateDictSpec, read_pickle, state_dict_spec
from mega_scale.model import MegaConfig, MegaForCausalLM, MegaForMaskedLM, MegaModel

EMA_INPUTS = ("delta", "alpha")
_UNUSED_BUFFER = "rel_pos_bias._float_tensor"
_ONE_SWITCH = ("final_norm", "normalize_before_mega", "normalize_before_ffn")
_BIAS_TABLE = "rel_pos_bias.rel_pos_bias"
_NORM = ("weight", "bias", "scalar", "running_mean", "running_var", "num_batches_tracked")

# Inside a block: fairseq's name, ours.
_MEGA_LAYER = {
    "gamma": "qk_weight",
    "beta": "qk_bias",
    "move.delta": "ema_gate.damping_factor",
    "move.alpha": "ema_gate.decay_factor",
    "move.beta": "ema_gate.ema_expansion_matrix",
    "move.gamma": "ema_gate.kernel_projection_matrix",
    "move.omega": "ema_gate.residual_weight",
}


def _same(module: str, *names: str) -> dict[str, str]:
    return {f"{module}.{name}": f"{module}.{name}" for name in names}


def _block(part: str, linear: tuple[str, ...], *tables: dict[str, str]) -> dict[str, str]:
    tables = (*tables, _same("norm.norm", *_NORM), *(_same(module, "weight", "bias") for module in linear))
    return {f"{part}.{theirs}": f"{part}.{ours}" for table in tables for theirs, ours in table.items()}


_POSITIONAL_BIAS = _same("rel_pos_bias", "rel_pos_bias", "alpha", "_float_tensor")
_POSITIONAL_BIAS["rel_pos_bias.beta"] = "rel_pos_bias.b_param"
_BLOCK = {
    **_block("mega_layer", ("v_proj", "mx_proj", "h_proj"), _MEGA_LAYER, _POSITIONAL_BIAS),
    **_block("cross_attn", ("q_proj", "k_proj", "v_proj", "h_proj"), _POSITIONAL_BIAS),
    **_block("nffn", ("fc1", "fc2")),
}

# Field of MegaConfig to the option in fairseq's checkpoint; {side} is encoder or decoder.
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
    **_SHARED_OPTIONS,
    "shared_representation_size": "{side}_z_dim",
    "ema_projection_size": "{side}_n_dim",
    "chunk_size": "{side}_chunk_size",
    "hidden_dropout_prob": "hidden_dropout",
    "nffn_activation_dropout_prob": "activation_dropout",
    "normalization_type": "normalization_type",
    "normalize_before_mega": "normalize_before",
    "scale_embeddings": "no_scale_embedding",
}
_OPTIONS = {
    "lm": {
        **_TRANSLATION_OPTIONS,
        "max_positions": "max_target_positions",
        "tie_word_embeddings": "share_decoder_input_output_embed",
    },
    "encoder": {**_TRANSLATION_OPTIONS, "max_positions": "max_source_positions"},
    "lra": {
        **_SHARED_OPTIONS,
        "shared_representation_size": "z_dim",
        "ema_projection_size": "n_dim",
        "chunk_size": "chunk_size",
        "hidden_dropout_prob": "act_dropout",
        "nffn_activation_dropout_prob": "act_dropout",
        "normalization_type": "norm_type",
        "normalize_before_mega": "encoder_normalize_before",
        "max_positions": "max_positions",
    },
}
CHECKPOINT_LAYOUTS = tuple(_OPTIONS)


class FairseqLayout(NamedTuple):
    """How one kind of fairseq model names its tensors; all names are fairseq's, but for `base`."""

    build: Callable[[MegaConfig], nn.Module]  # makes the model here that holds the same weights
    base: str  # prefix of the backbone in the names here
    embedding: str  # the word embedding
    blocks: str  # prefix of the list of blocks
    final_norm: str | None = None  # prefix of the norm after the last block; None where the model has none
    final_affine: bool = False  # whether that norm always has parameters (in language models it is an option)
    head: Mapping[str, str] = MappingProxyType({})  # names of the head to ours
    version: str | None = None  # a buffer that holds the format's number, 3
    can_scale: bool = False  # whether embeddings may be multiplied by sqrt(hidden_size)
    others: tuple[str, ...] = ()  # prefixes of another model in the same checkpoint, which is left out


_BACKBONE = partial(MegaModel, add_pooling_layer=False)


def _half(side: str, other: str, **more: Any) -> FairseqLayout:
    """The layout of one side of an encoder-decoder, `other` being that beside it, which another layout converts."""
    return FairseqLayout(
        embedding=f"{side}.embed_tokens.weight",
        blocks=f"{side}.layers.",
        final_norm=f"{side}.final_norm.",
        version=f"{side}.version",
        can_scale=True,
        others=(f"{other}.",),
        **more,
    )


_LM_HEAD = {"decoder.output_projection.weight": "lm_head.weight"}
LAYOUTS = {
    "lm": _half("decoder", "encoder", build=MegaForCausalLM, base="mega.", head=_LM_HEAD),
    "encoder": _half("encoder", "decoder", build=_BACKBONE, base="", final_affine=True),
    "lra": FairseqLayout(
        build=_BACKBONE,
        base="",
        embedding="encoder.encoder.embed_tokens.embed.weight",
        blocks="encoder.encoder.layers.",
        final_norm="encoder.encoder.final_norm.",
        final_affine=True,
        others=("classifier.", "sentence_projection_layer."),  # over mean-pooled states, which no head here computes
    ),
    "mlm": FairseqLayout(
        build=MegaForMaskedLM,
        base="mega.",
        embedding="mega.embedding_layer.weight",
        blocks="mega.encoders.",
        head={"mlm_head.weight": "mlm_head.weight", "mlm_head.bias": "mlm_head.bias"},
    ),
}

# Parts of fairseq models that no Mega model here has: a piece of the name, and why.
NO_COUNTERPART = {
    "adaptive_softmax.": "the output is an adaptive softmax, here it is a linear layer",
    "embed_tokens.embeddings.": "the input is an adaptive embedding, here it is one table",
    "embed_tokens.": "the input is not a table of words",
    "project_in_dim.": "embeddings have a width of their own, here it is hidden_size",
    "embed_norm.": "embeddings are normalised (--normalize-embedding), here they are not",
    "final_norm.": "the final norm has parameters that change its output: set final_norm_affine=True",
    "cross_attn.": "blocks attend to an encoder: set add_cross_attention=True",
    "nffn.": "blocks have a feed-forward network: set use_normalized_ffn=True",
}


def name_table(layout: FairseqLayout, blocks: int) -> dict[str, str]:
    """Every name that a fairseq model of this kind and number of blocks can have, to the one here; one to one."""
    table = {layout.embedding: f"{layout.base}embedding_layer.word_embeddings.weight", **layout.head}
    for i in range(blocks):
        for theirs, ours in _BLOCK.items():
            table[f"{layout.blocks}{i}.{theirs}"] = f"{layout.base}layers.{i}.{ours}"
    if layout.final_norm is not None:
        table |= {f"{layout.final_norm}norm.{name}": f"{layout.base}final_norm.norm.{name}" for name in _NORM}
    return table


# Weights


def fairseq_to_mega(
    state: Mapping[str, Tensor], config: MegaConfig, *, layout: str = "lm", ema_input: str = "delta"
) -> dict[str, Tensor]:
    """Convert a fairseq model's state dict to that of the model here, tied names included, in a new model's dtypes.

    Left out is what nothing here computes with: the number of the format (`version`), the other half of an
    encoder-decoder, the mean-pooling classifier of `lra`, and parameters of a final norm that change nothing.

    `layout` is "lm" (mega_lm, or the decoder of an encoder-decoder) to `MegaForCausalLM`; "encoder" (of an
    encoder-decoder) or "lra" (sentence encoder) to `MegaModel` without pooler; "mlm" (the masked language model that
    transformers 4.37.2 converts) to `MegaForMaskedLM`. `ema_input`, "delta" or "alpha", weighs the input of the moving
    average.

    Raises ValueError, with all names, for one without counterpart, a missing one, shapes or tied weights that differ,
    or a configuration that no fairseq model of this kind computes.
    """
    kind, ours = _prepare(config, layout, ema_input)
    table = name_table(kind, config.num_hidden_layers)
    same = _unit_final_norm(kind, ours, config)
    found: dict[str, Tensor] = {}
    unknown: dict[str, list[str]] = {}
    for name, tensor in state.items():
        unit = name in same and torch.equal(tensor.to(same[name].dtype), same[name])
        if table.get(name) in ours.tensors:
            found[table[name]] = tensor
        elif not (unit or name == kind.version or name.startswith(kind.others)):
            causes = (cause for piece, cause in NO_COUNTERPART.items() if piece in name)
            unknown.setdefault(next(causes, "a model of this configuration has none"), []).append(name)
    if unknown:
        lines = "; ".join(f"{', '.join(names)} ({cause})" for cause, names in unknown.items())
        raise ValueError(f"no counterpart in this configuration: {lines}")
    centre = config.chunk_size if config.use_chunking else config.max_positions
    for name in [name for name in found if name.endswith(_BIAS_TABLE)]:
        # A table of 2M - 1 biases about distance 0; ours is as long without chunks, and not shorter with them.
        bias, length = found[name], ours.tensors[name].shape[0]
        if tuple(bias.shape) != (2 * centre - 1,):
            field = "chunk_size" if config.use_chunking else "max_positions"
            raise ValueError(
                f"{name} is {tuple(bias.shape)}, but {field}={centre} needs {(2 * centre - 1,)}: "
                f"set it to {(bias.numel() + 1) // 2}"
            )
        if length < bias.shape[0]:
            raise ValueError(f"max_positions={config.max_positions} must be at least chunk_size={centre}")
        # The table here begins at the same distance; what follows lies beyond a chunk and is never read.
        found[name] = torch.cat([bias, bias.new_zeros(length - bias.shape[0])])
    unused = [name for name in ours.tensors if name.endswith(_UNUSED_BUFFER)]
    shapes = {name: tensor.shape for name, tensor in found.items()}
    ours.require(shapes, "the fairseq weights, under the names used here, do not fit", optional=unused)
    for name, owner in ours.unequal_ties(found):
        raise ValueError(
            f"tie_word_embeddings=True, but {name} and {owner} differ in the fairseq weights: set it to False"
        )
    # fairseq leaves this buffer uninitialised.
    found |= {name: torch.zeros(ours.tensors[name].shape) for name in unused}
    whole = {name: tensor.to(ours.tensors[name].dtype) for name, tensor in ours.complete(found).items()}
    return _other_ema_input(whole, config, omega_sign=-1) if ema_input == "alpha" else whole


def mega_to_fairseq(
    tensors: Mapping[str, Tensor], config: MegaConfig, *, layout: str = "lm", ema_input: str = "delta"
) -> dict[str, Tensor]:
    """Convert a model's state dict to fairseq's names and shapes: the reverse of `fairseq_to_mega`.

    Of tied names one is enough. fairseq loads the result strictly (of an "lra" model: all but its classifier). Raises
    ValueError, with all names, where the tensors do not fit the configuration, or fairseq has no such model.
    """
    kind, ours = _prepare(config, layout, ema_input)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    ours.require(shapes, "the tensors do not fit the configuration")
    table = {name: theirs for theirs, name in name_table(kind, config.num_hidden_layers).items()}
    if unknown := [name for name in ours.tensors if name not in table]:
        raise ValueError(
            f"a fairseq model of layout={layout!r} has no counterpart of {', '.join(unknown)}: the switches "
            "are add_lm_hidden_dense_layer, lm_head_bias and add_token_type_embeddings"
        )
    whole = ours.complete(tensors)
    if ema_input == "alpha":
        whole = _other_ema_input(whole, config, omega_sign=1)
    centre = config.chunk_size if config.use_chunking else config.max_positions
    length = 2 * centre - 1
    for name in [name for name in whole if name.endswith(_BIAS_TABLE)]:
        bias = whole[name]
        # Cross-attention reaches beyond a chunk: only the attention inside a chunk may lose what lies outside it.
        if bias.shape[0] < length or (bias.shape[0] > length and "cross_attn." in name):
            raise ValueError(
                f"{name} is {tuple(bias.shape)}, fairseq's with chunk_size={config.chunk_size} is {(length,)}: "
                f"set max_positions={centre}"
            )
        whole[name] = bias[:length]
    state = {} if kind.version is None else {kind.version: torch.tensor([3.0])}
    state |= _unit_final_norm(kind, ours, config) if kind.final_affine or config.add_cross_attention else {}
    return state | {table[name]: tensor for name, tensor in whole.items()}


def _prepare(config: MegaConfig, layout: str, ema_input: str) -> tuple[FairseqLayout, StateDictSpec]:
    for key, value, known in (("layout", layout, LAYOUTS), ("ema_input", ema_input, EMA_INPUTS)):
        if value not in known:
            raise ValueError(f"{key}={value!r} is unknown: choose one of {', '.join(known)}")
    kind = LAYOUTS[layout]
    lacking = f"a fairseq model of layout={layout!r}"
    if kind.final_norm is None and config.final_norm:
        raise ValueError(f"final_norm=True: {lacking} has no final norm, set it to False")
    switches = {name: getattr(config, name) for name in _ONE_SWITCH}
    if kind.final_norm is not None and len(set(switches.values())) > 1:
        given = ", ".join(f"{name}={value}" for name, value in switches.items())
        raise ValueError(f"{given}: fairseq has one switch for the three (--normalize-before), make them equal")
    if config.scale_embeddings and not kind.can_scale:
        raise ValueError(f"scale_embeddings=True: {lacking} does not scale embeddings, set it to False")
    return kind, state_dict_spec(config, kind.build)


def _unit_final_norm(kind: FairseqLayout, ours: StateDictSpec, config: MegaConfig) -> dict[str, Tensor]:
    """Parameters with which fairseq's final norm computes what one without parameters does; none if ours has them."""
    if kind.final_norm is None or not config.final_norm:
        return {}
    ones, zeros = torch.ones(config.hidden_size), torch.zeros(config.hidden_size)
    parameters = {"scalenorm": {"scalar": torch.ones(1)}, "rmsnorm": {"weight": ones}}
    named = parameters.get(config.normalization_type, {"weight": ones, "bias": zeros})
    prefix = f"{kind.base}final_norm.norm."
    return {f"{kind.final_norm}norm.{name}": unit for name, unit in named.items() if prefix + name not in ours.tensors}


def _other_ema_input(tensors: Mapping[str, Tensor], config: MegaConfig, omega_sign: int) -> dict[str, Tensor]:
    """Exchange the roles of alpha and delta.

    The code that weighs the input with alpha also counts a token itself once, not in either direction. What the reverse
    direction adds here, k2[0] x, has the form of the residual omega x, which takes it up.
    """
    out = dict(tensors)
    for name in tensors:
        gate, _, parameter = name.rpartition(".")
        if parameter != "damping_factor":
            continue
        out[name], out[f"{gate}.decay_factor"] = tensors[f"{gate}.decay_factor"], tensors[name]
        if config.bidirectional:
            damping = (out[name] if omega_sign < 0 else tensors[name]).double()
            gain = damping.sigmoid() * tensors[f"{gate}.ema_expansion_matrix"].double()
            projection = tensors[f"{gate}.kernel_projection_matrix"].double() * config.ema_projection_size**-0.5
            reverse = (gain.squeeze(-1) * projection).sum(-1)[config.hidden_size :]
            omega = tensors[f"{gate}.residual_weight"]
            out[f"{gate}.residual_weight"] = (omega.double() + omega_sign * reverse).to(omega.dtype)
    return out


# Checkpoints and dictionaries


def read_fairseq(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Map a checkpoint of fairseq (`model` and `args`), or a bare state dict, into memory, without running its code.

    Returns tensors by name, and the command line's options, such as decoder_embed_dim; none of a bare state dict.
    Raises ValueError where it cannot be read so, or holds no model.
    """
    # The options are a Namespace, which holds values and runs nothing when it is read.
    content = read_pickle(path, argparse.Namespace, keep='{"model": checkpoint["model"], "args": checkpoint["args"]}')
    whole = isinstance(content, dict) and "model" in content
    state = content["model"] if whole else content
    args = content.get("args") if whole else None
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no model: expected named tensors, or a fairseq checkpoint with them in 'model'")
    return dict(state), {} if args is None else dict(vars(args))


def find_layout(state: Mapping[str, Tensor]) -> str:
    """Which of `LAYOUTS` a state dict has, told by its word embedding. Raises ValueError for none, or several."""
    found = [name for name, layout in LAYOUTS.items() if layout.embedding in state]
    if len(found) > 1:
        raise ValueError(f"the checkpoint holds several models: choose --layout {' or --layout '.join(found)}")
    if not found:
        expected = ", ".join(layout.embedding for layout in LAYOUTS.values())
        raise ValueError(
            f"no word embedding among the names (looked for {expected}): an adaptive input, an input of numbers, and "
            "models other than Mega cannot be converted"
        )
    return found[0]


def config_from_args(
    state: Mapping[str, Tensor], args: Mapping[str, Any], layout: str, changes: dict[str, Any] | None = None
) -> MegaConfig:
    """The configuration of a fairseq model of a layout (one of `CHECKPOINT_LAYOUTS`), from its checkpoint's options.

    `changes` are fields that replace options, or stand in for absent ones. Raises ValueError where an option is absent
    and not replaced, or no model here has it.
    """
    if layout not in _OPTIONS:
        raise ValueError(f"a checkpoint of layout={layout!r} names no options: build its MegaConfig by hand")
    kind = LAYOUTS[layout]
    changes = changes or {}
    side = "decoder" if layout == "lm" else "encoder"
    options = {field: name.format(side=side) for field, name in _OPTIONS[layout].items()}
    values = {field: args[name] for field, name in options.items() if name in args}
    if absent := [f"{field} ({name})" for field, name in options.items() if field not in values | changes]:
        raise ValueError(f"the checkpoint does not say {', '.join(absent)}: give the fields with --set FIELD=VALUE")
    if "scale_embeddings" in values:
        values["scale_embeddings"] = not values["scale_embeddings"]
    values |= changes
    # What follows from other options, in fairseq's code.
    if kind.embedding in state:
        values.setdefault("vocab_size", state[kind.embedding].shape[0])
    values["use_chunking"] = changes.get("use_chunking", values["chunk_size"] > 0)
    if "max_positions" not in changes and values["use_chunking"]:
        values["max_positions"] = values["chunk_size"]
    if values["truncation"] is not None and values["truncation"] < 1:
        values["truncation"] = None
    values["use_normalized_ffn"] = values["nffn_hidden_size"] > 0
    if not values["use_normalized_ffn"]:
        del values["nffn_hidden_size"]
    before = values["normalize_before_mega"]
    learned = any(name.startswith(f"{kind.final_norm}norm.") for name in state)
    derived = {"normalize_before_ffn": before, "final_norm": before, "final_norm_affine": before and learned}
    derived["add_lm_hidden_dense_layer"] = False
    if layout == "lm":
        cross = any(".cross_attn." in name for name in state)
        derived |= {"is_decoder": True, "bidirectional": False, "lm_head_bias": False, "add_cross_attention": cross}
    try:
        return MegaConfig(**derived | values)
    except StrictDataclassError as error:
        # The strict dataclass wraps what its validators raise.
        raise ValueError(str(error.__cause__ or error)) from None


# fairseq puts these before the words of the file, in this order.
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")


def tokenizer_from_dictionary(path: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """Read a dictionary, a word and its count a line, as a tokenizer with fairseq's ids that splits at white space.

    Raises ValueError where a line is not a word and a count, or a word comes twice.
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

    A language model needs a tokenizer. Without a layout, the names tell it; for `layout` and `ema_input` see
    `fairseq_to_mega`, for `changes` `config_from_args`. Raises ValueError where the checkpoint is not readable or has
    parts without counterpart, or the destination is taken.
    """
    check_destination(out, overwrite=overwrite)
    state, args = read_fairseq(checkpoint)
    layout = find_layout(state) if layout is None else layout
    config = config_from_args(state, args, layout, changes)
    tensors = fairseq_to_mega(state, config, layout=layout, ema_input=ema_input)
    card = f"# {out.resolve().name}\n\nA Mega model (arXiv 2209.10655), converted from fairseq's `{checkpoint.name}`.\n"
    if layout == "lm":
        if tokenizer is None:
            raise ValueError("a language model needs a tokenizer: give --dictionary dict.txt, or --tokenizer")
        write_export(out, tensors, config, tokenizer, card, overwrite=overwrite)
        return layout
    model = _BACKBONE(config)
    model.load_state_dict(tensors, strict=True)
    with write_folder(out) as folder:
        model.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
        if tokenizer is not None:
            write_tokenizer(folder, tokenizer)
    return layout
