"""Configuration of Megalodon models (arXiv 2404.08801)."""

from typing import Any

from huggingface_hub.dataclasses import strict

from mega_scale.model.configuration_mega import BaseConfig, name_classes

# Table of transformers' Auto classes to the class of ours that belongs there.
CLASSES = {"MODEL": "MegalodonModel", "MODEL_FOR_CAUSAL_LM": "MegalodonForCausalLM"}
INIT_MODES = ("he", "bert", "xavier", "gaussian")
# What MegaConfig lets a user choose.
_FIXED = {"is_decoder": True, "bidirectional": False, "use_chunking": True, "truncation": None}


@strict
class MegalodonConfig(BaseConfig):
    """Shape and options of a Megalodon language model (arXiv 2404.08801): always causal, always in chunks.

    Args:
        vocab_size: Number of token ids.
        hidden_size: Width D of the residual stream, in channels.
        num_hidden_layers: Number of Megalodon blocks.
        num_attention_heads: Number H of attention heads.
        shared_representation_size: Width Z of queries and keys, all heads together, in channels.
        intermediate_size: Width E of the attention values, all heads together, in channels.
        nffn_hidden_size: Inner width F of the feed-forward network, in channels.
        ema_projection_size: Number N of complex exponential moving averages per channel.
        chunk_size: Attention chunk C, in tokens.
        timestep_norm_groups: Number G of groups of channels that a timestep norm takes statistics of.
        norm_affine: Whether RMS norm and layer norm have learned parameters; timestep norms always do.
        norm_eps: What all norms add to a variance.
        rope_base: Base of the rotary positions' frequencies.
        swiglu: Whether the feed-forward network multiplies its inner activation by a third projection.
        rescale_nffn: Whether what the feed-forward network adds is times a learned factor a channel.
        scale_embeddings: Whether word embeddings are times sqrt(D).
        tie_word_embeddings: Whether the language-model head shares its weight with the word embeddings.
        dropout_prob: Dropout of embeddings and of both sublayers' outputs, as a probability.
        hidden_dropout_prob: Dropout of the average, the gated attention and inner activations, as a probability.
        attention_probs_dropout_prob: Dropout of attention weights, as a probability.
        init_mode: How weights of linear layers are drawn: he, bert, xavier or gaussian.
        use_cache: Whether the model returns a cache for generation when no labels are given.
        pad_token_id: Id of the padding token.
        bos_token_id: Id of the token that begins a text.
        eos_token_id: Id of the token that ends a text.
    """

    model_type = "megalodon"

    vocab_size: int = 32000
    hidden_size: int = 1024
    num_hidden_layers: int = 12
    num_attention_heads: int = 1
    shared_representation_size: int = 256
    intermediate_size: int = 2048
    nffn_hidden_size: int = 2560
    ema_projection_size: int = 16
    chunk_size: int = 2048
    timestep_norm_groups: int = 32
    norm_affine: bool = True
    norm_eps: float | int = 1e-5
    rope_base: float | int = 10000.0
    swiglu: bool = False
    rescale_nffn: bool = False
    scale_embeddings: bool = False
    tie_word_embeddings: bool = False
    dropout_prob: float | int = 0.0
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    init_mode: str = "he"
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        for name, value in _FIXED.items():
            if kwargs.pop(name, value) != value:
                raise ValueError(f"{name} is always {value} in a Megalodon model: leave it out")
        super().__post_init__(**kwargs)

    @property
    def attention_chunk(self) -> int:
        return self.chunk_size

    def validate_architecture(self) -> None:
        """Refuse values and combinations that no Megalodon model can have; strict dataclasses call `validate_...`."""
        self.check_choices({"init_mode": INIT_MODES})
        self.check_sizes(
            name for name in type(self).__annotations__
            if name.startswith(("num_", "vocab_")) or name.endswith(("_size", "_groups"))
        )  # fmt: skip
        for name in ("norm_eps", "rope_base"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be greater than 0")
        if self.hidden_size < 2:
            raise ValueError("hidden_size=1 leaves the moving average's angles without an initial value: at least 2")
        channels, groups, heads = self.hidden_size, self.timestep_norm_groups, self.num_attention_heads
        if channels % groups or groups >= channels:
            raise ValueError(
                f"timestep_norm_groups={groups} does not suit hidden_size={channels}: choose a divisor below it, as a "
                "group of one channel has no variance at the first token"
            )
        for name in ("shared_representation_size", "intermediate_size"):
            if getattr(self, name) % heads:
                raise ValueError(
                    f"{name}={getattr(self, name)} is not a multiple of num_attention_heads={heads}: change either"
                )
        if self.shared_representation_size // heads % 2:
            raise ValueError(
                f"shared_representation_size={self.shared_representation_size} gives each of num_attention_heads="
                f"{heads} an odd width, but rotary positions turn pairs of channels: make it a multiple of {2 * heads}"
            )


# Here, so that an export's own code does it too.
name_classes(MegalodonConfig.model_type, CLASSES)

__all__ = ["MegalodonConfig"]
