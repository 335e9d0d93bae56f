"""Configuration of Mega models: the keys of transformers 4.37.2, and a few of the paper's recipes that it lacks.

`BaseConfig` is what those of all families share: special tokens, remote code, and what libraries ask of any model.
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

# The key of config.json by which an export is known, also after transformers 4.37.2 has saved it again.
SAVED_BY = "saved_by"


class BaseConfig(PreTrainedConfig):
    """A configuration of either family."""

    keys_to_ignore_at_inference = ["past_key_values"]

    def __post_init__(self, **kwargs: Any) -> None:
        # Where no class of its name is in transformers, TRL reads the map of remote code without asking for one.
        kwargs.setdefault("auto_map", {})
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """All values, but for a map of remote code that is empty."""
        values = super().to_dict()
        if not values.get("auto_map"):
            values.pop("auto_map", None)
        return values

    @property
    def attention_chunk(self) -> int | None:
        """Tokens C that attention stays inside; none without chunks."""
        raise NotImplementedError

    @property
    def layer_types(self) -> list[str]:
        """Kind of every block: `linear_attention`, by which third-party sequence parallelism refuses layers with a
        recurrent state."""
        return ["linear_attention"] * self.num_hidden_layers

    def special_ids(self) -> dict[str, list[int]]:
        """Ids of the special tokens, by the key that names them."""
        named = {name: value for name, value in vars(self).items() if name.endswith("_token_id") and value is not None}
        return {name: list(value) if isinstance(value, list | tuple) else [value] for name, value in named.items()}

    def check_special_ids(self, *names: str) -> None:
        """Refuse ids, of these keys, that lie outside the vocabulary."""
        for name, ids in self.special_ids().items():
            if name in names and not all(0 <= id < self.vocab_size for id in ids):
                raise ValueError(
                    f"{name}={getattr(self, name)} lies outside the vocabulary: choose an id from 0 to "
                    f"{self.vocab_size - 1} (vocab_size={self.vocab_size}), or none"
                )

    def check_choices(self, choices: dict[str, tuple[str, ...]]) -> None:
        """Refuse values, of the keys of `choices`, that are not among a key's."""
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(allowed)}")

    def check_sizes(self, names: Iterable[str]) -> None:
        """Refuse values of these keys below 1, and probabilities of dropout outside [0, 1)."""
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in (name for name in type(self).__annotations__ if name.endswith("dropout_prob")):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1)")

    def check_for_model(self) -> None:
        """Refuse combinations that a configuration may pass through while it is edited, but no model can have."""
        if (self.pad_token_id or 0) >= 0:
            # No row could be its embedding. 4.37.2 loads a negative one, and models whose other ids lie outside.
            self.check_special_ids("pad_token_id")


def name_classes(model_type: str, classes: dict[str, str]) -> None:
    """Write a family's classes, by the name of the table, into transformers' tables of names.

    Its Trainer, pipelines and server look a class up by name to know what it computes: a Trainer with label smoothing
    shifts labels only for names of the causal table. `register` of the Auto classes does not write them.
    """
    for table, name in classes.items():
        getattr(modeling_auto, f"{table}_MAPPING_NAMES")[model_type] = name


# Mega

BATCH_NORMS = ("batchnorm", "syncbatchnorm")
# Table of transformers' Auto classes to the class of ours that belongs there.
CLASSES = {
    "MODEL": "MegaModel",
    "MODEL_FOR_PRETRAINING": "MegaForMaskedLM",
    "MODEL_FOR_CAUSAL_LM": "MegaForCausalLM",
    "MODEL_FOR_MASKED_LM": "MegaForMaskedLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION": "MegaForSequenceClassification",
    "MODEL_FOR_MULTIPLE_CHOICE": "MegaForMultipleChoice",
    "MODEL_FOR_TOKEN_CLASSIFICATION": "MegaForTokenClassification",
    "MODEL_FOR_QUESTION_ANSWERING": "MegaForQuestionAnswering",
}


@strict
class MegaConfig(BaseConfig):
    """Shape and options of a Mega model (arXiv 2209.10655), with the names and defaults of transformers 4.37.2.

    Args:
        vocab_size: Number of token ids.
        hidden_size: Width D of the residual stream, in channels.
        num_hidden_layers: Number of Mega blocks.
        intermediate_size: Width E of the attention values, in channels.
        ema_projection_size: Number N of exponential moving averages per channel.
        bidirectional: Whether the moving average also runs from right to left; must be false in a decoder.
        shared_representation_size: Width Z of queries and keys, in channels.
        use_chunking: Whether attention stays inside chunks of `chunk_size` tokens (Mega-chunk, linear cost).
        chunk_size: Attention chunk C, in tokens; read when `use_chunking` is true.
        truncation: Length of the moving average's kernel, in tokens; none means unlimited.
        normalize_before_mega: Whether the attention sublayer normalises its input (pre-norm) rather than its output.
        normalization_type: One of scalenorm, layernorm, rmsnorm, batchnorm, syncbatchnorm.
        norm_affine: Whether norms have learned parameters.
        activation: Activation of values, outputs and feed-forward: silu, relu, linear, gelu or gelu_accurate.
        attention_activation: What turns scores into attention weights: softmax, laplace or relu2.
        dropout_prob: Dropout of the moving average's and the sublayers' outputs, as a probability.
        hidden_dropout_prob: Dropout of attention values, as a probability.
        attention_probs_dropout_prob: Dropout of attention weights, as a probability.
        use_feature_dropout: Whether dropout removes whole features of a sequence instead of single elements.
        use_normalized_ffn: Whether a block ends with a normalised feed-forward network.
        nffn_hidden_size: Inner width F of the feed-forward network, in channels.
        normalize_before_ffn: Whether the feed-forward network normalises its input rather than its output.
        nffn_activation_dropout_prob: Dropout inside the feed-forward network, as a probability.
        max_positions: Length of the simple positional bias's table, in tokens; without chunks the longest sequence.
        add_token_type_embeddings: Whether token type embeddings are added to word embeddings.
        type_vocab_size: Number of token types.
        initializer_range: Standard deviation of initial weights: linear layers, embeddings and positional biases.
        ema_delta_alpha_range: Standard deviation of the average's initial damping and decay, before the sigmoid.
        ema_beta_range: Standard deviation of the initial expansion of the moving average about 1, -1, 1, ...
        ema_gamma_omega_range: Standard deviation of the average's initial projection and residual weight.
        pad_token_id: Id of the padding token; its embedding stays at zero, unless it also ends or begins texts.
        bos_token_id: Id of the token that begins a text.
        eos_token_id: Id of the token that ends a text.
        relative_positional_bias: Positional bias added to attention scores: rotary (any length) or simple (a table).
        classifier_dropout: Dropout of classification heads, as a probability; none means `hidden_dropout_prob`.
        use_cache: Whether a decoder returns a cache for generation when no labels are given.
        add_lm_hidden_dense_layer: Whether a dense layer with tanh precedes the language-model head.
        is_decoder: Whether attention is causal.
        add_cross_attention: Whether every block of a decoder attends to an encoder.
        tie_word_embeddings: Whether the language-model head shares its weight with the word embeddings.
        scale_embeddings: Whether word embeddings are times sqrt(D), as in the paper's language models; not in 4.37.2.
        final_norm: Whether a norm follows the last block, as in the paper's pre-norm models; not in 4.37.2.
        final_norm_affine: Whether it has learned parameters, as in the paper's encoders only; not in 4.37.2.
        embedding_dropout_prob: Dropout of the embeddings, as a probability; not in 4.37.2.
        lm_head_bias: Whether the language-model head has a bias; 4.37.2 always has one.
    """

    model_type = "mega"

    vocab_size: int = 30522
    hidden_size: int = 128
    num_hidden_layers: int = 4
    intermediate_size: int = 256
    ema_projection_size: int = 16
    bidirectional: bool = True
    shared_representation_size: int = 64
    use_chunking: bool = False
    chunk_size: int = -1
    truncation: int | None = None
    normalize_before_mega: bool = True
    normalization_type: str = "scalenorm"
    norm_affine: bool = True
    activation: str = "silu"
    attention_activation: str = "softmax"
    dropout_prob: float | int = 0.1
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    use_feature_dropout: bool = False
    use_normalized_ffn: bool = True
    nffn_hidden_size: int = 256
    normalize_before_ffn: bool = True
    nffn_activation_dropout_prob: float | int = 0.1
    max_positions: int = 2048
    add_token_type_embeddings: bool = False
    type_vocab_size: int = 2
    initializer_range: float | int = 0.02
    ema_delta_alpha_range: float | int = 0.2
    ema_beta_range: float | int = 0.02
    ema_gamma_omega_range: float | int = 1.0
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    relative_positional_bias: str = "rotary"
    classifier_dropout: float | int | None = None
    use_cache: bool = True
    add_lm_hidden_dense_layer: bool = True
    is_decoder: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True
    scale_embeddings: bool = False
    final_norm: bool = False
    final_norm_affine: bool = False
    embedding_dropout_prob: float | int = 0.0
    lm_head_bias: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("num_attention_heads", None)  # files of 4.37.2 hold it; it is no choice
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """All values, with the number of heads: 4.37.2's files have it, and PEFT looks for it there."""
        return super().to_dict() | {"num_attention_heads": self.num_attention_heads}

    @property
    def num_attention_heads(self) -> int:
        return 1  # for libraries that ask

    @property
    def attention_chunk(self) -> int | None:
        return self.chunk_size if self.use_chunking else None

    @property
    def layer_types(self) -> list[str]:
        """As the base has it; with cross-attention `hybrid`: `generate()` would make caches that no model here can
        use."""
        return ["hybrid"] * self.num_hidden_layers if self.add_cross_attention else super().layer_types

    @property
    def padding_idx(self) -> int | None:
        """Row of the word embeddings that is never learned: of a token that only pads. Negative ids name no token."""
        others = [id for name, ids in self.special_ids().items() if name != "pad_token_id" for id in ids]
        pad = self.pad_token_id
        return None if pad is None or pad < 0 or pad in others else pad

    def validate_architecture(self) -> None:
        """Refuse values and combinations that no Mega model can have; strict dataclasses call `validate_...`."""
        self.check_choices(
            {
                "normalization_type": ("scalenorm", "layernorm", "rmsnorm", *BATCH_NORMS),
                "attention_activation": ("softmax", "laplace", "relu2"),
                "activation": ("silu", "relu", "linear", "gelu", "gelu_accurate"),
                "relative_positional_bias": ("rotary", "simple"),
            }
        )
        sizes = ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "ema_projection_size"]
        sizes += ["shared_representation_size", *(["nffn_hidden_size"] if self.use_normalized_ffn else [])]
        sizes += ["max_positions"] if self.relative_positional_bias == "simple" else []
        sizes += ["type_vocab_size"] if self.add_token_type_embeddings else []
        self.check_sizes(sizes)
        if self.use_chunking and self.chunk_size < 1:
            raise ValueError(
                f"use_chunking=True with chunk_size={self.chunk_size}: set chunk_size to a number of tokens, at least 1"
            )
        if self.truncation is not None and self.truncation < 1:
            raise ValueError(f"truncation={self.truncation} must be at least 1 token, or None for no truncation")
        if self.relative_positional_bias == "rotary" and self.shared_representation_size % 2:
            raise ValueError(
                f"relative_positional_bias='rotary' splits queries in halves, but shared_representation_size="
                f"{self.shared_representation_size} is odd: make it even, or use the simple bias"
            )

    def check_for_model(self) -> None:
        """Refuse combinations that a configuration may pass through while it is edited, but no model can have."""
        super().check_for_model()
        if self.is_decoder and self.bidirectional:
            raise ValueError(
                "is_decoder=True with bidirectional=True would let every position see the future: "
                "set bidirectional=False"
            )
        if self.final_norm_affine and not self.final_norm:
            raise ValueError("final_norm_affine=True without final_norm=True: set final_norm=True, or neither")
        if self.add_cross_attention and not self.is_decoder:
            raise ValueError("add_cross_attention=True needs a decoder: set is_decoder=True and bidirectional=False")


def warn_if_norm_differs(values: Mapping[str, Any]) -> None:
    """Warn of a config.json of a model that was trained with the RMSNorm of 4.37.2, which does not normalise."""
    release = str(values.get("transformers_version") or "").split(".")[0]
    older = release.isdecimal() and int(release) < 5
    if values.get("normalization_type") == "rmsnorm" and older and SAVED_BY not in values:
        warnings.warn(
            "normalization_type='rmsnorm' in a checkpoint of transformers "
            f"{values['transformers_version']}: its RMSNorm returned its input without normalising it, here it "
            "normalises, so the model computes something else than it did there; train it further, or start anew",
            UserWarning,
            stacklevel=3,
        )


# Here, so that an export's own code does it too.
name_classes(MegaConfig.model_type, CLASSES)
