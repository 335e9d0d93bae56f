"""The Hugging Face Megalodon models (arXiv 2404.08801): backbone and causal language model, and their initial values.

Legend: B batch, L length, D channels, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from mega_scale.model.basic_layers import (
    DOCUMENT_KEYS,
    BasePreTrainedModel,
    CausalLanguageModel,
    LanguageModelHead,
    MegaDropout,
    check_ids,
    check_inputs,
    following_tokens,
)
from mega_scale.model.cache import MegaCache, check_cache
from mega_scale.model.configuration_megalodon import CLASSES, MegalodonConfig
from mega_scale.model.megalodon_layers import (
    MegalodonAttention,
    MegalodonBlock,
    MegalodonComplexEma,
    MegalodonFeedForward,
    MegalodonLayerNorm,
    MegalodonRMSNorm,
    MegalodonTimestepNorm,
    RotaryTurns,
)
from mega_scale.model.rows import read_rows

_NORMS = (MegalodonLayerNorm, MegalodonRMSNorm, MegalodonTimestepNorm)


def initial_tensor(
    module: nn.Module, name: str, config: MegalodonConfig, generator: torch.Generator | None = None
) -> Tensor | None:
    """Draw the initial value of one parameter, as the authors' code does (github.com/XuezheMax/megalodon).

    Only the module's class, shapes and layer are read. The generator is a CPU's, by default PyTorch's global one.
    Returns the full tensor on the CPU, fp32; none when the module is not one of Megalodon's.
    """
    tensor: Tensor | None = {**module._buffers, **module._parameters}[name]
    if tensor is None:
        return None
    shape = tensor.shape
    if isinstance(module, MegalodonComplexEma):
        return _average(name, shape, generator)
    if isinstance(module, nn.Embedding | LanguageModelHead):
        return _truncated(shape, config.hidden_size**-0.5, 3 * config.hidden_size**-0.5, generator)
    if isinstance(module, nn.Linear):
        return torch.zeros(shape) if name == "bias" else _weight(shape, config.init_mode, generator)
    if isinstance(module, MegalodonFeedForward):
        return torch.full(shape, 0.1 * 0.5**module.layer)
    # Scales are weight + 1.
    return torch.zeros(shape) if isinstance(module, (*_NORMS, MegalodonAttention)) else None


def _average(name: str, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
    if name == "theta":
        # Base angles from nearly 1 down to 1 / D of a turn, evenly on a logarithmic scale, in a random order.
        channels = shape[0]
        share = channels ** (-torch.arange(1, channels + 1, dtype=torch.float64) / channels)
        return share.logit()[torch.randperm(channels, generator=generator)].float().view(shape)
    if name == "omega":
        return _truncated(shape, 0.25, 1.0, generator)
    if name == "gamma":
        values = torch.zeros(shape)
        values[..., 0].normal_(generator=generator)
        return values
    return torch.empty(shape).normal_(0.0, 0.2, generator=generator)


def _truncated(shape: torch.Size, std: float, most: float, generator: torch.Generator | None) -> Tensor:
    return nn.init.trunc_normal_(torch.empty(shape), 0.0, std, -most, most, generator=generator)


def _weight(shape: torch.Size, mode: str, generator: torch.Generator | None) -> Tensor:
    outputs, inputs = shape
    if mode == "xavier":
        most = (6 / (inputs + outputs)) ** 0.5
        return torch.empty(shape).uniform_(-most, most, generator=generator)
    std = {"he": (3 * inputs) ** -0.5, "bert": 0.02, "gaussian": 1.0}[mode]
    return torch.empty(shape).normal_(0.0, std, generator=generator)


class MegalodonPreTrainedModel(BasePreTrainedModel):
    """What Megalodon models share: configuration class, initial values, and what may not be split or rounded."""

    config: MegalodonConfig
    config_class = MegalodonConfig
    base_model_prefix = "megalodon"
    _no_split_modules = ["MegalodonBlock"]
    fp32_modules = ("cema",)
    _keep_in_fp32_modules_strict = list(fp32_modules)
    public_names = CLASSES.values()
    initial_tensor = staticmethod(initial_tensor)


class MegalodonModel(MegalodonPreTrainedModel):
    """The backbone: embeddings, blocks, and a timestep norm."""

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.scale = config.hidden_size**0.5 if config.scale_embeddings else 1.0
        self.embed_dropout = MegaDropout(config.dropout_prob)
        self.layers = nn.ModuleList([MegalodonBlock(config, layer) for layer in range(config.num_hidden_layers)])
        self.final_norm = MegalodonTimestepNorm(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.add_module("embed", value)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        document_starts: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the blocks over a batch; raises ValueError where inputs exclude, lack or contradict each other.

        Args:
            input_ids: (B, L) int64; or give `inputs_embeds`, (B, L, D).
            attention_mask: (B, L), or with a cache also (B, past + L), of bool or 0 and 1; 1 or true for valid
                positions. The cache remembers earlier masks. Rows padded on the left count positions, and chunks, from
                their first valid token; other padding takes a position, and is in no statistic, average or key.
            past_key_values: cache of the tokens before these, of any number.
            use_cache: default: `config.use_cache` of a model that is not training.
            output_hidden_states: whether to return the embeddings and every block's output, before the last norm.
            document_starts: (B, L) bool, true at the first token of every document where rows hold several: norms and
                moving averages begin anew there, and attention in a chunk stays inside a document. Chunks count from
                the row's start. With a cache, a document that began before goes on until the next one starts.
            kwargs: what transformers' `DataCollatorWithFlattening` says of documents, as in `MegaModel`.
        """
        config = self.config
        if kwargs.get("output_attentions") or (kwargs.get("output_attentions") is None and config.output_attentions):
            raise ValueError("output_attentions=True: Megalodon returns no attention weights, set it to false")
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        x = self._embedded(input_ids, inputs_embeds)
        cache = self._cache(past_key_values, use_cache, *x.shape[:2])
        mask = pads = borders = None
        documents = {key: kwargs[key] for key in DOCUMENT_KEYS if kwargs.get(key) is not None}
        if cache is not None or attention_mask is not None or document_starts is not None or documents:
            mask, pads, borders = read_rows(
                attention_mask, document_starts, documents, cache, x, chunk=config.chunk_size, positional=True
            )

        rotary = RotaryTurns.at(0 if cache is None else cache.get_seq_length(), pads, x, config)
        hidden_states = [x]
        for i, block in enumerate(self.layers):
            layer = None if cache is None else cache.states[i]
            x, state = block(x, rotary, mask, pads, None if layer is None else layer.state, layer is not None, borders)
            if layer is not None:
                layer.remember(state)
            hidden_states.append(x)
        valid = None if mask is None else mask[:, -x.shape[1] :]
        resets = None if borders is None else borders.starts
        x, _, moments = self.final_norm(x, None if cache is None else cache.final_norm, resets, valid)
        if cache is not None:
            cache.remember_final_norm(moments)
            cache = cache.end_call()
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=cache,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
        )

    def _embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        x = check_inputs(input_ids, inputs_embeds, self.config.hidden_size)
        if input_ids is not None:
            if type(self.embed) is nn.Embedding:
                check_ids(input_ids, self.embed.num_embeddings, "input_ids", "vocab_size")
            x = self.embed(input_ids)
        return self.embed_dropout(x if self.scale == 1.0 else x * self.scale)

    def _cache(self, past: Cache | None, use_cache: bool | None, batch: int, length: int) -> MegaCache | None:
        """The cache from which `batch` rows go on by `length` tokens: the one given, or a new one, or none."""
        layers = self.config.num_hidden_layers
        if past is not None:
            return check_cache(past, layers, batch, norms=True).begin_call(length)
        wanted = self.config.use_cache and not self.training if use_cache is None else use_cache
        return MegaCache(layers) if wanted else None


class MegalodonForCausalLM(CausalLanguageModel, MegalodonPreTrainedModel, GenerationMixin):
    """The backbone with a linear language-model head, without bias, untied by default."""

    _tied_weights_keys = {"lm_head.weight": "megalodon.embed.weight"}

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__(config)
        self.megalodon = MegalodonModel(config)
        self.lm_head: nn.Module = LanguageModelHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        document_starts: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the cross-entropy of the next token when labels are given.

        `labels`, `logits_to_keep`, `num_items_in_batch`, `shift_labels` and `skip_logits` are as in `MegaForCausalLM`,
        other arguments as in the backbone.
        """
        following = following_tokens(labels, kwargs)
        outputs = self.megalodon(
            input_ids,
            attention_mask,
            inputs_embeds,
            past_key_values=past_key_values,
            use_cache=False if following is not None and use_cache is None else use_cache,
            output_hidden_states=output_hidden_states,
            document_starts=document_starts,
            return_dict=True,
            **{key: kwargs[key] for key in (*DOCUMENT_KEYS, "output_attentions") if key in kwargs},
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = outputs.last_hidden_state[:, kept]
        loss, logits = self.predict(hidden, following, num_items_in_batch, bool(kwargs.get("skip_logits")))
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
