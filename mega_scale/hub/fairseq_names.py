"""Names of the original fairseq Mega models and ours, as tables that run both ways.

fairseq calls the moving average `move`; in the layout of its published checkpoints `delta` weighs the input and `alpha`
damps the past, which is the reverse of the paper. Its q/k affine is called `gamma` and `beta`, as is a part of the
moving average, and `beta` is also half of the rotary bias.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import nn

from mega_scale.model import MegaConfig, MegaForCausalLM, MegaForMaskedLM, MegaModel

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
    final_norm: str | None
    final_affine: bool
    head: dict[str, str]
    version: str | None
    can_scale: bool
    others: dict[str, str]


def _backbone(config: MegaConfig) -> MegaModel:
    return MegaModel(config, add_pooling_layer=False)


LAYOUTS = {
    "lm": FairseqLayout(
        build=MegaForCausalLM,
        base="mega.",
        embedding="decoder.embed_tokens.weight",
        blocks="decoder.layers.",
        final_norm="decoder.final_norm.",
        final_affine=False,
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
        head={},
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
        head={},
        version=None,
        can_scale=False,
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
        final_norm=None,
        final_affine=False,
        head={"mlm_head.weight": "mlm_head.weight", "mlm_head.bias": "mlm_head.bias"},
        version=None,
        can_scale=False,
        others={},
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
    """The layout of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in LAYOUTS:
        raise ValueError(f"layout={name!r} is unknown: choose one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def name_table(layout: FairseqLayout, blocks: int) -> dict[str, str]:
    """Every name that a fairseq model of this kind can have, whatever its options, to the one here; one to one.

    Args:
        layout: the kind of model.
        blocks: number of blocks.

    Returns:
        fairseq's names to ours.
    """
    return dict(_rows(layout, blocks))


def _rows(layout: FairseqLayout, blocks: int) -> Iterator[tuple[str, str]]:
    yield layout.embedding, f"{layout.base}embedding_layer.word_embeddings.weight"
    for i in range(blocks):
        for theirs, ours in _BLOCK.items():
            yield f"{layout.blocks}{i}.{theirs}", f"{layout.base}layers.{i}.{ours}"
    if layout.final_norm is not None:
        for name in _NORM:
            yield f"{layout.final_norm}norm.{name}", f"{layout.base}final_norm.norm.{name}"
    yield from layout.head.items()


def why_not(name: str) -> str:
    """Why a fairseq name has no counterpart, in words."""
    return next(
        (reason for piece, reason in NO_COUNTERPART.items() if piece in name), "a model of this configuration has none"
    )
