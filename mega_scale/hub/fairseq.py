"""Weights between the original fairseq Mega models and ours: tables of names that run both ways, and what else differs.

fairseq calls the moving average `move`; in the layout of its published checkpoints `delta` weighs the input and `alpha`
damps the past, which is the reverse of the paper. Its last version weighs the input with `alpha`; names and shapes are
the same. Its q/k affine is called `gamma` and `beta`, as is a part of the moving average, and `beta` is also half of
the rotary bias.
"""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mega_scale.hub.folder import StateDictSpec, state_dict_spec
from mega_scale.model import MegaConfig, MegaForCausalLM, MegaForMaskedLM, MegaModel

EMA_INPUTS = ("delta", "alpha")
_UNUSED_BUFFER = "rel_pos_bias._float_tensor"
_BIAS_TABLE = "rel_pos_bias.rel_pos_bias"
_VERSION = 3.0
_NORM = ("weight", "bias", "scalar", "running_mean", "running_var", "num_batches_tracked")
_LINEAR = ("weight", "bias")

# Inside a block: fairseq's name, ours.
_MOVING_AVERAGE = {
    "move.delta": "ema_gate.damping_factor",
    "move.alpha": "ema_gate.decay_factor",
    "move.beta": "ema_gate.ema_expansion_matrix",
    "move.gamma": "ema_gate.kernel_projection_matrix",
    "move.omega": "ema_gate.residual_weight",
}
_AFFINE = {"gamma": "qk_weight", "beta": "qk_bias"}
_POSITIONAL_BIAS = {
    "rel_pos_bias.rel_pos_bias": "rel_pos_bias.rel_pos_bias",
    "rel_pos_bias.alpha": "rel_pos_bias.alpha",
    "rel_pos_bias.beta": "rel_pos_bias.b_param",
    "rel_pos_bias._float_tensor": "rel_pos_bias._float_tensor",
}


def _linear(*modules: str) -> dict[str, str]:
    return {f"{module}.{name}": f"{module}.{name}" for module in modules for name in _LINEAR}


def _within(part: str, *tables: dict[str, str]) -> dict[str, str]:
    norm = {f"norm.norm.{name}": f"norm.norm.{name}" for name in _NORM}
    return {f"{part}.{theirs}": f"{part}.{ours}" for table in (norm, *tables) for theirs, ours in table.items()}


_BLOCK = {
    **_within("mega_layer", _MOVING_AVERAGE, _AFFINE, _POSITIONAL_BIAS, _linear("v_proj", "mx_proj", "h_proj")),
    **_within("cross_attn", _POSITIONAL_BIAS, _linear("q_proj", "k_proj", "v_proj", "h_proj")),
    **_within("nffn", _linear("fc1", "fc2")),
}


class FairseqLayout(NamedTuple):
    """How one kind of fairseq model names its tensors.

    Args:
        build: makes the model here that holds the same weights.
        base: prefix of the backbone in its names.
        embedding: fairseq's name of the word embedding.
        blocks: fairseq's prefix of the list of blocks.
        final_norm: fairseq's prefix of the norm after the last block; none where the model has none.
        final_affine: whether that norm always has parameters (in language models it is an option).
        head: fairseq's names of the head to ours.
        version: fairseq's name of a buffer that holds the format's number, 3; none where the model has none.
        can_scale: whether embeddings may be multiplied by sqrt(hidden_size).
        others: prefixes of names that belong to another model in the same checkpoint, with what they are.
    """

    build: Callable[[MegaConfig], nn.Module]
    base: str
    embedding: str
    blocks: str
    final_norm: str | None = None
    final_affine: bool = False
    head: Mapping[str, str] = MappingProxyType({})
    version: str | None = None
    can_scale: bool = False
    others: Mapping[str, str] = MappingProxyType({})


def _backbone(config: MegaConfig) -> MegaModel:
    return MegaModel(config, add_pooling_layer=False)


LAYOUTS = {
    "lm": FairseqLayout(
        build=MegaForCausalLM,
        base="mega.",
        embedding="decoder.embed_tokens.weight",
        blocks="decoder.layers.",
        final_norm="decoder.final_norm.",
        head={"decoder.output_projection.weight": "lm_head.weight"},
        version="decoder.version",
        can_scale=True,
        others={"encoder.": "the encoder beside this decoder: convert it with layout='encoder'"},
    ),
    "encoder": FairseqLayout(
        build=_backbone,
        base="",
        embedding="encoder.embed_tokens.weight",
        blocks="encoder.layers.",
        final_norm="encoder.final_norm.",
        final_affine=True,
        version="encoder.version",
        can_scale=True,
        others={"decoder.": "the decoder beside this encoder: convert it with layout='lm'"},
    ),
    "lra": FairseqLayout(
        build=_backbone,
        base="",
        embedding="encoder.encoder.embed_tokens.embed.weight",
        blocks="encoder.encoder.layers.",
        final_norm="encoder.encoder.final_norm.",
        final_affine=True,
        others={
            "classifier.": "the classifier over mean-pooled states, which no head here computes",
            "sentence_projection_layer.": "the classifier over mean-pooled states, which no head here computes",
        },
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


def layout_named(name: str) -> FairseqLayout:
    """The layout of that name; raises ValueError where there is none."""
    if name not in LAYOUTS:
        raise ValueError(f"layout={name!r} is unknown: choose one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def name_table(layout: FairseqLayout, blocks: int) -> dict[str, str]:
    """Every name that a fairseq model of this kind and number of blocks can have, to the one here; one to one."""
    table = {layout.embedding: f"{layout.base}embedding_layer.word_embeddings.weight", **layout.head}
    for i in range(blocks):
        for theirs, ours in _BLOCK.items():
            table[f"{layout.blocks}{i}.{theirs}"] = f"{layout.base}layers.{i}.{ours}"
    if layout.final_norm is not None:
        table |= {f"{layout.final_norm}norm.{name}": f"{layout.base}final_norm.norm.{name}" for name in _NORM}
    return table


def why_not(name: str) -> str:
    """Why a fairseq name has no counterpart, in words."""
    return next(
        (reason for piece, reason in NO_COUNTERPART.items() if piece in name), "a model of this configuration has none"
    )


def fairseq_to_mega(
    state: Mapping[str, Tensor], config: MegaConfig, *, layout: str = "lm", ema_input: str = "delta"
) -> dict[str, Tensor]:
    """Convert a fairseq model's state dict.

    Left out, because nothing here computes with them: the number of the format (`version`), the other half of an
    encoder-decoder, the mean-pooling classifier of `lra`, and parameters of a final norm that change nothing.

    Args:
        state: fairseq's state dict.
        config: of the model here (see `config_from_args`).
        layout: "lm" (mega_lm, or the decoder of an encoder-decoder) to `MegaForCausalLM`; "encoder" (of an
            encoder-decoder) or "lra" (sentence encoder) to `MegaModel` without pooler; "mlm" (the masked language
            model that transformers 4.37.2 converts: `mega.encoders`, `mlm_head`) to `MegaForMaskedLM`.
        ema_input: what weighs the input of the moving average: "delta" or "alpha".

    Returns:
        The whole state dict of that model, tied names included, in the dtypes of a new model.

    Raises:
        ValueError: a name without counterpart, a missing one, a shape that differs, tied weights that differ, or a
            configuration that no fairseq model of this kind computes; all names are listed.
    """
    kind, ours = _prepare(config, layout, ema_input)
    table = name_table(kind, config.num_hidden_layers)
    same = _unit_final_norm(kind, ours, config)
    state = {
        name: tensor
        for name, tensor in state.items()
        if not _left_out(name, kind) and not (name in same and torch.equal(tensor.to(same[name].dtype), same[name]))
    }
    unknown = [name for name in state if table.get(name) not in ours.tensors]
    if unknown:
        raise ValueError(f"no counterpart in this configuration: {_with_reasons(unknown)}")
    found = {table[name]: tensor for name, tensor in state.items()}
    for name in [name for name in found if name.endswith(_BIAS_TABLE)]:
        found[name] = _to_our_table(name, found[name], ours.tensors[name].shape[0], config)
    unused = [name for name in ours.tensors if name.endswith(_UNUSED_BUFFER)]
    wrong = ours.differences({name: tensor.shape for name, tensor in found.items()}, optional=unused)
    if wrong:
        raise ValueError(f"the fairseq weights, under the names used here, do not fit: {'; '.join(wrong)}")
    for name, owner in ours.unequal_ties(found, torch.equal):
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

    Args:
        tensors: state dict of the model that the layout names; of tied names one is enough.

    Returns:
        The state dict that fairseq loads strictly (of an "lra" model: all but its classifier).

    Raises:
        ValueError: the tensors do not fit the configuration, or fairseq has no such model; all names are listed.
    """
    kind, ours = _prepare(config, layout, ema_input)
    wrong = ours.differences({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    if wrong:
        raise ValueError(f"the tensors do not fit the configuration: {'; '.join(wrong)}")
    table = {name: theirs for theirs, name in name_table(kind, config.num_hidden_layers).items()}
    unknown = [name for name in ours.tensors if name not in table]
    if unknown:
        raise ValueError(
            f"a fairseq model of layout={layout!r} has no counterpart of {', '.join(unknown)}: the switches "
            "are add_lm_hidden_dense_layer, lm_head_bias and add_token_type_embeddings"
        )
    whole = ours.complete(tensors)
    if ema_input == "alpha":
        whole = _other_ema_input(whole, config, omega_sign=1)
    for name in [name for name in whole if name.endswith(_BIAS_TABLE)]:
        whole[name] = _to_their_table(name, whole[name], config)
    state = {} if kind.version is None else {kind.version: torch.tensor([_VERSION])}
    state |= _unit_final_norm(kind, ours, config) if kind.final_affine or config.add_cross_attention else {}
    return state | {table[name]: tensor for name, tensor in whole.items()}


def _prepare(config: MegaConfig, layout: str, ema_input: str) -> tuple[FairseqLayout, StateDictSpec]:
    kind = layout_named(layout)
    if ema_input not in EMA_INPUTS:
        raise ValueError(f"ema_input={ema_input!r} is unknown: choose one of {', '.join(EMA_INPUTS)}")
    if kind.final_norm is None:
        if config.final_norm:
            raise ValueError(
                f"final_norm=True: a fairseq model of layout={layout!r} has no final norm, set it to False"
            )
    elif not config.final_norm == config.normalize_before_mega == config.normalize_before_ffn:
        raise ValueError(
            f"final_norm={config.final_norm}, normalize_before_mega={config.normalize_before_mega} and "
            f"normalize_before_ffn={config.normalize_before_ffn}: fairseq has one switch for the three "
            "(--normalize-before), make them equal"
        )
    if config.scale_embeddings and not kind.can_scale:
        raise ValueError(
            f"scale_embeddings=True: a fairseq model of layout={layout!r} does not scale embeddings, set it to False"
        )
    return kind, state_dict_spec(config, kind.build)


def _left_out(name: str, kind: FairseqLayout) -> bool:
    return name == kind.version or name.startswith(tuple(kind.others))


def _unit_final_norm(kind: FairseqLayout, ours: StateDictSpec, config: MegaConfig) -> dict[str, Tensor]:
    """Parameters with which fairseq's final norm computes what one without parameters does; none if ours has them."""
    if kind.final_norm is None or not config.final_norm:
        return {}
    ones, zeros = torch.ones(config.hidden_size), torch.zeros(config.hidden_size)
    parameters = {"scalenorm": {"scalar": torch.ones(1)}, "rmsnorm": {"weight": ones}}
    named = parameters.get(config.normalization_type, {"weight": ones, "bias": zeros})
    prefix = f"{kind.base}final_norm.norm."
    return {f"{kind.final_norm}norm.{name}": unit for name, unit in named.items() if prefix + name not in ours.tensors}


def _with_reasons(names: Iterable[str]) -> str:
    reasons: dict[str, list[str]] = {}
    for name in names:
        reasons.setdefault(why_not(name), []).append(name)
    return "; ".join(f"{', '.join(group)} ({reason})" for reason, group in reasons.items())


def _centre(config: MegaConfig) -> int:
    return config.chunk_size if config.use_chunking else config.max_positions


def _to_our_table(name: str, table: Tensor, length: int, config: MegaConfig) -> Tensor:
    """A table of 2M - 1 biases about distance 0; ours is as long without chunks, and not shorter with them."""
    centre = _centre(config)
    if tuple(table.shape) != (2 * centre - 1,):
        field = "chunk_size" if config.use_chunking else "max_positions"
        raise ValueError(
            f"{name} is {tuple(table.shape)}, but {field}={centre} needs {(2 * centre - 1,)}: "
            f"set it to {(table.numel() + 1) // 2}"
        )
    if length < table.shape[0]:
        raise ValueError(f"max_positions={config.max_positions} must be at least chunk_size={centre}")
    # The table here begins at the same distance; what follows lies beyond a chunk and is never read.
    return torch.cat([table, table.new_zeros(length - table.shape[0])])


def _to_their_table(name: str, table: Tensor, config: MegaConfig) -> Tensor:
    length = 2 * _centre(config) - 1
    # Cross-attention reaches beyond a chunk: only the attention inside a chunk may lose what lies outside it.
    if table.shape[0] < length or (table.shape[0] > length and "cross_attn." in name):
        raise ValueError(
            f"{name} is {tuple(table.shape)}, fairseq's with chunk_size={config.chunk_size} is {(length,)}: "
            f"set max_positions={_centre(config)}"
        )
    return table[:length]


def _other_ema_input(tensors: Mapping[str, Tensor], config: MegaConfig, omega_sign: int) -> dict[str, Tensor]:
    """Exchange the roles of alpha and delta.

    The code that weighs the input with alpha also counts a token itself once, not in either direction. The part that
    the reverse direction adds here, k2[0] x, has the form of the residual omega x, which takes it up.
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
