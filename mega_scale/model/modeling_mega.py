"""The Hugging Face models: backbone and causal language model, and the initial values of all.

Legend: B batch, L length, D channels, V vocabulary.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
)
from transformers.utils import can_return_tuple, logging

from mega_scale.model.basic_layers import (
    DOCUMENT_KEYS,
    BasePreTrainedModel,
    CausalLanguageModel,
    following_tokens,
)
from mega_scale.model.configuration_mega import BATCH_NORMS, CLASSES, MegaConfig, warn_if_norm_differs
from mega_scale.model.layers import (
    BIASES,
    MegaBlock,
    MegaEmbeddings,
    MegaMovingAverageGatedAttention,
    MegaMultiDimensionDampedEma,
    MegaRMSNorm,
    MegaScaleNorm,
    MegaSequenceNorm,
)

if TYPE_CHECKING:
    from mega_scale.model.cache import MegaCache
    from mega_scale.model.rows import DocumentBorders

logger = logging.get_logger(__name__)


def initial_tensor(
    module: nn.Module, name: str, config: MegaConfig, generator: torch.Generator | None = None
) -> Tensor | None:
    """Draw the initial value of one parameter or buffer, as the reference does (transformers 4.37.2 `_init_weights`).

    Only the module's class and shapes are read. The generator is a CPU's, by default PyTorch's global one. Returns the
    full tensor on the CPU, fp32 (integers keep their dtype); none when the module is not one of Mega's.
    """
    tensor: Tensor | None = {**module._buffers, **module._parameters}[name]
    if tensor is None:
        return None
    shape = tensor.shape

    def normal(std: float) -> Tensor:
        return torch.empty(shape).normal_(0.0, std, generator=generator)

    if isinstance(module, MegaMultiDimensionDampedEma):
        if name in ("damping_factor", "decay_factor"):
            return normal(config.ema_delta_alpha_range)
        if name == "ema_expansion_matrix":
            alternating = torch.ones(shape[1], 1)
            alternating[1::2] = -1.0  # more stable than one sign for all (fairseq)
            return normal(config.ema_beta_range) + alternating
        return normal(config.ema_gamma_omega_range)
    if isinstance(module, nn.Embedding):
        # Scaled embeddings enter the first block with unit variance, as in fairseq.
        weight = normal(config.hidden_size**-0.5 if config.scale_embeddings else config.initializer_range)
        if module.padding_idx is not None:
            weight[module.padding_idx] = 0.0
        return weight
    if isinstance(module, (nn.Linear, MegaMovingAverageGatedAttention, *BIASES.values())):
        drawn = name in ("weight", "qk_weight", "alpha", "b_param", "rel_pos_bias")
        return normal(config.initializer_range) if drawn else torch.zeros(shape)
    if isinstance(module, (MegaScaleNorm, MegaRMSNorm, nn.LayerNorm, nn.modules.batchnorm._BatchNorm)):
        if name == "num_batches_tracked":
            return torch.zeros(shape, dtype=tensor.dtype)
        return torch.ones(shape) if name in ("scalar", "weight", "running_var") else torch.zeros(shape)
    return None


class MegaPreTrainedModel(BasePreTrainedModel):
    """What all Mega models share: configuration class, initial values, and what may not be split or rounded."""

    config: MegaConfig
    config_class = MegaConfig
    base_model_prefix = "mega"
    _no_split_modules = ["MegaBlock"]
    fp32_modules = ("ema_gate",)
    _keep_in_fp32_modules_strict = list(fp32_modules)
    public_names = CLASSES.values()
    initial_tensor = staticmethod(initial_tensor)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers does; warns of a checkpoint whose norm computed something else."""
        loaded = super().from_pretrained(*args, **kwargs)
        warn_if_norm_differs(vars((loaded[0] if isinstance(loaded, tuple) else loaded).config))
        return loaded


def valid_token(x: Tensor, mask: Tensor | None, last: bool = False) -> Tensor:
    """Each row's first, or last, valid token, (B, L, D) to (B, D); of a row without any, the outermost position."""
    if mask is None:
        return x[:, -1 if last else 0]
    valid = mask.to(x.device).bool().int()
    index = x.shape[1] - 1 - valid.flip(1).argmax(1) if last else valid.argmax(1)
    return x[torch.arange(x.shape[0], device=x.device), index]


class MegaPooler(nn.Module):
    """tanh of a dense layer over the first valid token, (B, L, D) to (B, D)."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return torch.tanh(self.dense(valid_token(x, mask)))


class MegaModel(MegaPreTrainedModel):
    """The backbone, an encoder's or with `is_decoder=True, bidirectional=False` a decoder's; a pooler if wanted."""

    def __init__(self, config: MegaConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embedding_layer = MegaEmbeddings(config)
        self.layers = nn.ModuleList([MegaBlock(config) for _ in range(config.num_hidden_layers)])
        final_norm = MegaSequenceNorm(config.normalization_type, config.hidden_size, config.final_norm_affine)
        self.final_norm = final_norm if config.final_norm else None
        self.pooler = MegaPooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding_layer.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding_layer.add_module("word_embeddings", value)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        document_starts: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Run the blocks over a batch; raises ValueError where inputs exclude, lack or contradict each other.

        Args:
            input_ids: (B, L) int64, as `token_type_ids`; or give `inputs_embeds`, (B, L, D).
            attention_mask: (B, L), or with a cache also (B, past + L), of bool or 0 and 1; 1 or true for valid
                positions. The cache remembers earlier masks. Rows padded on the left count positions, and chunks, from
                their first valid token.
            encoder_hidden_states: (B, S, D), what cross-attention attends to; its mask is (B, S). Neither is needed
                again with a cache.
            past_key_values: cache of the tokens before these, of any number; decoders only.
            use_cache: default: `config.use_cache` of a decoder that is not training.
            output_attentions: (B, K, C, C) a block, or (B, 1, L, past + L) without chunks; (B, L, S) to an encoder.
            document_starts: (B, L) bool, true at the first token of every document where rows hold several: the moving
                average begins anew there, and attention in a chunk stays inside a document. Chunks count from the row's
                start. With a cache, a document that began before goes on until the next one starts.
            kwargs: what transformers' `DataCollatorWithFlattening` says of documents, in place of `document_starts`:
                `position_ids` (B, L) or (1, L) that begin again at 0; `seq_idx` likewise, another number for each
                document; `cu_seq_lens_q`, `cu_seq_lens_k` (documents + 1,), borders in the flattened batch;
                `max_length_q`, `max_length_k`, no document being longer.
        """
        config = self.config
        if (
            config.is_decoder
            and config.normalization_type in BATCH_NORMS
            # In eval mode they read their running statistics, which leak nothing.
            and any(isinstance(module, MegaSequenceNorm) and module.norm.training for module in self.modules())
        ):
            raise ValueError(
                "normalization_type of batch norms, in a decoder that trains, would show every position the future: "
                "call eval(), or choose scalenorm, layernorm or rmsnorm"
            )
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        x = self.embedding_layer(input_ids, token_type_ids, inputs_embeds)
        cache = None
        if past_key_values is not None or use_cache is not False:
            cache = self._cache(past_key_values, use_cache, *x.shape[:2])
        source_mask = None
        if config.add_cross_attention:
            from mega_scale.model.rows import encoder_mask

            source_mask = encoder_mask(encoder_attention_mask, encoder_hidden_states, cache, x)
        # Without any of these, all tokens are valid, and each row is one document.
        mask = pads = borders = None
        documents = {key: kwargs[key] for key in DOCUMENT_KEYS if kwargs.get(key) is not None}
        if cache is not None or attention_mask is not None or document_starts is not None or documents:
            from mega_scale.model.rows import read_rows

            chunk = config.attention_chunk
            mask, pads, borders = read_rows(
                attention_mask, document_starts, documents, cache, x,
                chunk=chunk, positional=config.is_decoder or chunk is not None,
            )  # fmt: skip
            self._check_documents(borders)
        if borders is not None and kwargs.get("one_answer_a_row"):
            raise ValueError("several documents in a row, of which this head says one thing: give each document a row")

        hidden_states, attentions, cross_attentions = [x], [], []
        for i, block in enumerate(self.layers):
            layer = None if cache is None else cache.states[i]
            known = (None, None) if layer is None else (layer.state, layer.encoder)
            x, weights, cross_weights, state, encoder = block(
                x, mask, pads, encoder_hidden_states, source_mask, *known, layer is not None, output_attentions, borders
            )
            if layer is not None:
                layer.remember(state, encoder)
            hidden_states.append(x)
            attentions.append(weights)
            cross_attentions.append(cross_weights)
        if cache is not None:
            cache = cache.end_call()
        new_mask = None if mask is None else mask[:, -x.shape[1] :]
        if self.final_norm is not None:
            x = self.final_norm(x, new_mask)
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=x,
            pooler_output=None if self.pooler is None else self.pooler(x, new_mask),
            past_key_values=cache,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            cross_attentions=tuple(cross_attentions) if output_attentions and config.add_cross_attention else None,
        )

    def _check_documents(self, borders: "DocumentBorders | None") -> None:
        config = self.config
        if borders is not None and (config.truncation is not None or config.add_cross_attention):
            key = "add_cross_attention" if config.truncation is None else "truncation"
            raise ValueError(
                f"document_starts with {key}={getattr(config, key)}: a truncated moving average cannot begin anew "
                "inside a row, and an encoder's output belongs to a whole row; give each document a row"
            )

    def _cache(self, past: Cache | None, use_cache: bool | None, batch: int, length: int) -> "MegaCache | None":
        """The cache from which `batch` rows go on by `length` tokens: the one given, or a new one, or none."""
        from mega_scale.model.cache import MegaCache, check_cache, is_empty_wrapper

        config = self.config
        if is_empty_wrapper(past):
            past, use_cache = None, True
        if use_cache is None:
            use_cache = config.use_cache and config.is_decoder and config.truncation is None and not self.training
        if past is None and not use_cache:
            return None
        if not config.is_decoder:
            raise ValueError("a cache needs is_decoder=True and bidirectional=False: set them, or use_cache=False")
        if config.truncation is not None:
            raise ValueError(
                f"truncation={config.truncation} leaves the moving average without a finite state to cache: "
                "pass use_cache=False, or set truncation=None"
            )
        layers = config.num_hidden_layers
        if past is None:
            return MegaCache(layers)
        return check_cache(past, layers, batch, norms=False).begin_call(length)


class MegaForCausalLM(MegaPreTrainedModel, CausalLanguageModel, GenerationMixin):
    """A decoder with a language-model head: optional dense layer with tanh, then a linear layer, tied by default."""

    _tied_weights_keys = {"lm_head.weight": "mega.embedding_layer.word_embeddings.weight"}

    def __init__(self, config: MegaConfig) -> None:
        super().__init__(config)
        if not config.is_decoder:
            logger.warning(
                "MegaForCausalLM with is_decoder=False sees the tokens that it is to predict; for a language model set "
                "is_decoder=True and bidirectional=False"
            )
        self.mega = MegaModel(config, add_pooling_layer=False)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size) if config.add_lm_hidden_dense_layer else None
        self.lm_head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        document_starts: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithCrossAttentions:
        """Logits, and the cross-entropy of the next token when labels are given; other arguments as in `MegaModel`.

        Args:
            labels: (B, L) int64, the tokens themselves, of which t + 1 is compared with position t; -100 is ignored:
                set it where the first token of a document would be predicted from the one before.
            logits_to_keep: compute only the last n logits (0: all), or those at the given positions.
            num_items_in_batch: what the sum of losses is divided by; default: the number of labels that count.
            kwargs: `shift_labels` (B, L) int64, in place of `labels`: the next token of every position. (The Trainer
                expects every named argument with "label" in it.) `skip_logits=True`: a loss without whole logits.
        """
        following = following_tokens(labels, kwargs)
        inputs = input_ids, attention_mask, token_type_ids, inputs_embeds, encoder_hidden_states, encoder_attention_mask
        outputs = self.mega(
            *inputs,
            past_key_values=past_key_values,
            use_cache=False if following is not None and use_cache is None else use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            document_starts=document_starts,
            return_dict=True,
            **{key: kwargs[key] for key in DOCUMENT_KEYS if key in kwargs},
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = outputs.last_hidden_state[:, kept]
        if self.dense is not None:
            hidden = torch.tanh(self.dense(hidden))
        loss, logits = self.predict(hidden, following, num_items_in_batch, bool(kwargs.get("skip_logits")))
        return CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
        )
