"""What both families share: products, dropout, the output layer, checks of token ids, attention in chunks; losses, and
what a model is to transformers.

Legend: B batch, L new tokens, D channels, V vocabulary, W outputs of a linear layer, Z width of queries and keys, E
width of values, C chunk, K chunks (classes, of a loss), I queries, J keys.
"""

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import PreTrainedModel
from transformers import initialization as init

from mega_scale.model.configuration_mega import BaseConfig
from mega_scale.ops import ANY_LENGTH, chunk_count, in_memory, join_chunks, split_chunks, tracing
from mega_scale.ops.attention import ChunkDocuments
from mega_scale.ops.elementwise import PositionalDropout
from mega_scale.ops.linear import linear, linear_cross_entropy, linears

if TYPE_CHECKING:
    from mega_scale.model.cache import LayerState
    from mega_scale.model.rows import DocumentBorders, LeftPadding
    from mega_scale.model.static_cache import OpenChunk

INDICES = (torch.int64, torch.int32)  # dtypes of token ids
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)  # dtypes of labels
# What transformers' flattened batches say of documents.
DOCUMENT_KEYS = ("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class MegaLinear(nn.Linear):
    """(B, L, D) to (B, L, W), by whichever library is fastest on a CPU whatever hooks it has: for trainers."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear_layers(x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """What several layers make of the same x (B, L, D), a (B, L, W) each.

    For a compiler, which adds what autograd would, their products sum the gradients of x: `linears`. A layer that is
    more than its product, as one in fp8 or one with a hook, has them called one by one.
    """
    if tracing() != "compile" or not all(_is_a_product(layer) for layer in layers):
        return tuple(layer(x) for layer in layers)
    return linears(x, [layer.weight for layer in layers], [layer.bias for layer in layers])


def products_and_biases(x: Tensor, *layers: nn.Linear) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """What several layers make of the same x (B, L, D) but for their biases, a (B, L, W) each, and these, (W,), for
    kernels that add them; for a compiler. A layer that is more than its product adds its own: none."""
    if not all(_is_a_product(layer) for layer in layers):
        return tuple(layer(x) for layer in layers), (None,) * len(layers)
    return linears(x, [layer.weight for layer in layers], [None] * len(layers)), tuple(layer.bias for layer in layers)


def _is_a_product(layer: nn.Linear) -> bool:
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return type(layer).forward in (nn.Linear.forward, MegaLinear.forward) and not hooks


class MegaDropout(nn.Module):
    """Zeroes elements of (B, L, D) with probability p while training; featurewise: one draw for a feature of a row."""

    drop: Any = None  # does it, where PyTorch is not to draw: as here, but for p

    def __init__(self, p: float, featurewise: bool = False) -> None:
        super().__init__()
        self.p = float(p)
        self.featurewise = featurewise

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x after dropout, plus the residual."""
        if self.training and self.p > 0 and self.drop is not None:
            return self.drop(x, residual)
        if self.training and self.p > 0:
            x = (
                x * F.dropout(x.new_ones(x.shape[0], 1, x.shape[2]), self.p)
                if self.featurewise
                else F.dropout(x, self.p)
            )
        return x if residual is None else residual + x

    def of_weights(self) -> float | PositionalDropout:
        """What attention does to its weights: their probability of being dropped, or what drops them by place."""
        if not self.training or self.drop is None:
            return self.p if self.training else 0.0
        return self.drop.of_weights()


class LanguageModelHead(nn.Linear):
    """A linear layer that can also take targets, whatever hooks it has: what trainers make of it."""

    def forward(self, input: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, L, V) of (B, L, D); with targets (B, L) int64, -100 where there is none, the sum of losses."""
        if targets is None:
            return super().forward(input)
        return linear_cross_entropy(input, self.weight, self.bias, targets.to(input.device))


def use_own_linear(model: PreTrainedModel) -> None:
    """Make plain linear layers `MegaLinear`, and the output a `LanguageModelHead`, in place; parameters and ties stay.

    For models that this project runs: programs that look for `nn.Linear` itself, to quantise it, find none.
    """
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                with torch.device("meta"):
                    kind = LanguageModelHead if layer is head else MegaLinear
                    new = kind(layer.in_features, layer.out_features, layer.bias is not None)
                new.weight, new.bias = layer.weight, layer.bias
                parent.add_module(name, new)


def check_inputs(input_ids: Tensor | None, inputs_embeds: Tensor | None, channels: int) -> Tensor:
    """The one of input_ids (B, L) int64 and inputs_embeds (B, L, D) that is given.

    Raises ValueError for both or none of the two, and for other shapes or dtypes.
    """
    given = inputs_embeds if input_ids is None else input_ids
    if given is None or (input_ids is not None and inputs_embeds is not None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    shape = tuple(given.shape)
    if input_ids is None:
        name, expected = "inputs_embeds", f"(batch, length, {channels})"
        fits = shape[2:] == (channels,)
    else:
        name, expected = "input_ids", "int64 (batch, length)"
        fits = len(shape) == 2 and given.dtype in INDICES
    if not fits or shape[1] < 1:
        raise ValueError(f"{name} is {given.dtype} {shape}: expected {expected}, at least one token long")
    return given


def check_ids(ids: Tensor, rows: int, name: str, size: str) -> None:
    """Refuse ids outside 0 to rows - 1 on a CPU; other devices say so themselves, and later."""
    if not in_memory(ids) or not ids.numel() or not ids.is_cpu:
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= rows:
        raise ValueError(f"{name} holds {low if low < 0 else high}: expected 0 to {rows - 1} ({size}={rows})")


class ChunkedAttention(nn.Module):
    """Lays queries, keys and values out in chunks, remembered ones among them; a family's attention is a subclass."""

    def __init__(self, config: BaseConfig, causal: bool = True) -> None:
        super().__init__()
        self.config: Any = config  # of the subclass's family
        self.chunk, self.causal = config.attention_chunk, causal  # C, tokens, or none
        self.attention_dropout = MegaDropout(config.attention_probs_dropout_prob)

    def attend_chunks(self, q: Tensor, k: Tensor, v: Tensor, **rules: Any) -> tuple[Tensor, Tensor | None]:
        """Attention of every chunk to itself: q (B, K, I, Z), k (B, K, J, Z), v (B, K, J, E) to (B, K, I, E), and
        weights or none. The rules are arguments of `chunk_attention` that do not depend on the family.

        What is dropped of values may be of remembered ones too: a cache is not used while training.
        """
        raise NotImplementedError

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        pads: Tensor | None,
        state: "LayerState | None",
        return_state: bool,
        return_weights: bool,
        borders: "DocumentBorders | None",
        gate: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor, Any] | None]:
        """Attention of q (B, L, Z) to k (B, L, Z), v (B, L, E) and those of the state, which come before.

        The mask (B, L) bool, after a state also of columns before, is true for valid positions; `pads` (B,) int64 is
        the padding before each row's first token, from which chunks count; `borders` are of documents in rows without
        such padding; the gate, for such rows alone, is (B, L, E) and its bias (E,), as `chunk_attention` has it.
        Returns (B, L, E), weights or none, and with `return_state` what to remember: keys, values, and
        columns so far, a tensor without dimensions in a program that is exported.
        """
        if state is not None and state.rows is not None:
            return self._attend_in_place(q, k, v, state, state.rows, return_weights)
        position: Any = 0 if state is None else state.position
        length, columns, kept = q.shape[1], position, None
        if return_state and torch.compiler.is_exporting():
            # A number would hold for the calls that are like this one.
            columns = torch.zeros((), dtype=torch.long, device=q.device) + position
        if pads is not None:
            from mega_scale.model.rows import LeftPadding

            padding = LeftPadding.lay(pads, columns, 0 if state is None else state.keys.shape[1], length, self.chunk)
            out, weights, kept = self._attend_left_padded(q, k, v, mask, state, padding, return_weights)
            return out, weights, (*kept, columns + length)
        if return_state:
            from mega_scale.model.cache import remember

            kept = remember(state, k, v, self.chunk)
        seen = position % self.chunk if self.chunk else position  # of the chunk, before q
        total, any_length = seen + length, tracing() in ANY_LENGTH
        if seen and kept is not None and (self.chunk is None or total < self.chunk):
            k, v = (tensor[:, :total] for tensor in kept)
        elif seen and state is not None:
            k, v = torch.cat([state.keys[:, :seen], k], 1), torch.cat([state.values[:, :seen], v], 1)
        key_mask, documents = None if mask is None else mask[:, -total:], None if borders is None else borders.chunks
        if self.chunk is None or (not any_length and total <= self.chunk):
            out, weights = self._attend_in_chunks(q, k, v, key_mask, seen, return_weights, documents, gate)
            out = out[:, 0]
        else:
            # Whole chunks: remembered keys get dummy queries, the last chunk is filled up with masked keys.
            pad = chunk_count(total, self.chunk) * self.chunk - total
            more = any_length or pad > 0
            if more and (key_mask is not None or not self.causal):
                valid = q.new_ones(q.shape[0], total, dtype=torch.bool) if key_mask is None else key_mask
                key_mask = F.pad(valid, (0, pad), value=False)
            if seen or more:  # padding by nothing would copy
                q, k, v = F.pad(q, (0, 0, seen, pad)), F.pad(k, (0, 0, 0, pad)), F.pad(v, (0, 0, 0, pad))
                gate = None if gate is None else (F.pad(gate[0], (0, 0, seen, pad)), gate[1])
            out, weights = self._attend_in_chunks(q, k, v, key_mask, 0, return_weights, documents, gate)
            out = join_chunks(out, seen, total)
        return out, weights, None if kept is None else (*kept, columns + length)

    def _attend_in_place(
        self, q: Tensor, k: Tensor, v: Tensor, state: "LayerState", rows: "OpenChunk", return_weights: bool
    ) -> tuple[Tensor, None, tuple[Tensor, Tensor, Any]]:
        """Attention of one token a row to a static cache's keys, among which its own is written first."""
        if return_weights:
            raise ValueError("output_attentions=True with a static cache: use mega_scale.MegaCache")
        place = rows.place(state.position)
        rows.write(place, state.keys, k)
        rows.write(place, state.values, v)
        if getattr(self.config, "attention_activation", "softmax") != "softmax":
            # These divide scores by the place in the chunk, but count keys of the token's document only.
            q = q * ((place + 1) / (place + 1 - rows.first)).to(q.dtype)[:, None, None]
        out, _ = self._attend_in_chunks(q, state.keys, state.values, rows.visible(place), place, False, None)
        return out[:, 0], None, (state.keys, state.values, state.position)

    def _attend_left_padded(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        state: "LayerState | None",
        padding: "LeftPadding",
        return_weights: bool,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]:
        """`attend` of left-padded rows; also returns the keys and values to remember."""
        k = padding.in_slots(k, None if state is None else state.keys)
        v = padding.in_slots(v, None if state is None else state.values)
        kept, valid = (k, v), padding.valid(mask)
        if self.chunk is not None:
            kept = padding.open_chunk(k, self.chunk), padding.open_chunk(v, self.chunk)
        if padding.length == 1:
            out, weights = self._attend_in_chunks(q, k, v, valid, padding.shift, return_weights, None)
            out = out[:, 0]
        else:
            out, weights = self._attend_in_chunks(padding.in_slots(q), k, v, valid, 0, return_weights, None)
            out = padding.out_of_slots(out.flatten(1, 2))
        if weights is not None and self.chunk is None:
            weights = padding.by_column(weights)
        return out, weights, kept

    def _attend_in_chunks(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        offset: int | Tensor,
        return_weights: bool,
        documents: ChunkDocuments | None,
        gate: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of queries (B, I, Z) to keys (B, J, Z) and values (B, J, E) in whole chunks, (B, K, C, E)."""
        laid_out = tracing() in ANY_LENGTH and q.shape[1] == k.shape[1]
        size = self.chunk if self.chunk is not None and (laid_out or k.shape[1] > self.chunk) else None
        q, k, v, *pre = (
            t.unsqueeze(1) if size is None else split_chunks(t, size)
            for t in (q, k, v, *(() if gate is None else gate[:1]))
        )
        if key_mask is not None:
            key_mask = key_mask.unsqueeze(1) if size is None else split_chunks(key_mask, size)
        return self.attend_chunks(
            q, k, v,
            causal=self.causal,
            offset=offset,
            key_mask=key_mask,
            dropout=self.attention_dropout.of_weights(),
            return_weights=return_weights,
            documents=documents,
            gate=None if gate is None else (pre[0], gate[1]),
            impl="eager" if return_weights or self.config._attn_implementation == "eager" else "auto",
        )  # fmt: skip


# Models: what they are to transformers


class BasePreTrainedModel(PreTrainedModel):
    """A model of either family; its blocks are `base_model.layers`."""

    config: BaseConfig
    supports_gradient_checkpointing = True
    fp32_modules: tuple[str, ...] = ()  # names of modules whose parameters are fp32 in every number format
    public_names: Collection[str] = ()  # of the family's classes in transformers' tables
    # A moving average cannot take tokens back, so generate() refuses assisted decoding.
    _is_stateful = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True

    def __init__(self, config: Any) -> None:
        config.check_for_model()
        super().__init__(config)

    @staticmethod
    def initial_tensor(
        module: nn.Module, name: str, config: Any, generator: torch.Generator | None = None
    ) -> Tensor | None:
        """Draw the initial value of one parameter or buffer of a module; see the family's function of this name."""
        raise NotImplementedError

    def _get_name(self) -> str:
        # What a Trainer looks up in transformers' tables: FSDP2 makes a class of another name, and users do.
        names = (base.__name__ for base in type(self).__mro__)
        return next((name for name in names if name in self.public_names), type(self).__name__)

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        """Save as transformers does. A head that the configuration unties while it still shares the embeddings' tensor
        is written too: of tensors that are one, transformers writes one, and a loaded model would draw the other."""
        if not self.config.tie_word_embeddings:
            parameters = dict(self.named_parameters(remove_duplicate=False))
            for name, owner in (self._tied_weights_keys or {}).items():
                if name in parameters and parameters[name] is parameters.get(owner):
                    state_dict = dict(self.state_dict() if state_dict is None else state_dict)
                    state_dict[name] = state_dict[name].clone()
        super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Resize the vocabulary as transformers does; refuses to cut off the padding token."""
        multiple, pad = pad_to_multiple_of or 1, self.config.pad_token_id
        if new_num_tokens is not None and pad is not None and pad >= -(-new_num_tokens // multiple) * multiple:
            raise ValueError(
                f"a vocabulary of {new_num_tokens} has no pad_token_id={pad}: set config.pad_token_id to a token that "
                "stays, or to None, and resize then"
            )
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and name not in module._non_persistent_buffers_set:
                value = self.initial_tensor(module, name, self.config)
                if value is not None:
                    init.copy_(tensor, value.to(tensor.device, tensor.dtype))


# Causal language models


def mean(total: Tensor, count: Tensor | int, num_items: Tensor | int | None) -> Tensor:
    """A sum of losses over the number of targets that count, or over `num_items` where given: the number in several
    micro-batches or ranks, so that parts add up to the whole batch's loss. Without any target the loss is 0, not NaN.
    """
    divisor = count if num_items is None else num_items
    if isinstance(divisor, Tensor):
        divisor = divisor.to(total.device)
        return total / divisor.masked_fill(divisor == 0, 1)
    return total / (divisor or 1)


def check_labels(labels: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse labels that are no integers, or not one for each of the predictions (`shape`, or as many in a row)."""
    expected = tuple(shape)
    fits = labels.shape == expected or (labels.dim() != len(expected) and labels.numel() == math.prod(expected))
    if labels.dtype not in INTEGERS or not fits:
        raise ValueError(
            f"labels are {labels.dtype} {tuple(labels.shape)}: expected integers {expected}, one for each prediction"
        )


def cross_entropy(logits: Tensor, labels: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """The `mean` cross-entropy of logits (..., K) with integer labels (...), but for -100, in nats, fp32 or better."""
    check_labels(labels, logits.shape[:-1])
    labels = labels.reshape(-1).to(logits.device, torch.long)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).reshape(-1, logits.shape[-1])
    total = F.cross_entropy(wide, labels, reduction="sum")
    return mean(total, (labels != -100).sum(), num_items)


class CausalLanguageModel:
    """The head's part of a causal language model; stands before `GenerationMixin` among the bases."""

    lm_head: nn.Module

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # generate() then leaves the cache to forward(), which makes a MegaCache.
        return False

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """Give `cache_implementation="static"` its own cache; otherwise what transformers does."""
        named, wanted = generation_config.cache_implementation, generation_config.use_cache
        if named == "static" and wanted is not False and model_kwargs.get("past_key_values") is None:
            # Compilers are slow to import.
            from mega_scale.model.static_cache import MegaStaticCache

            longest = max(max_cache_length, generation_config.max_cache_len or 0)
            model_kwargs["past_key_values"] = MegaStaticCache(self.config, longest)  # type: ignore[attr-defined]
            return
        super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    @staticmethod
    def create_masks_for_generate(
        attention_mask: Tensor | None, is_first_iteration: bool = False, **kwargs: Any
    ) -> Tensor | None:
        """The mask that `generate()` hands to steps with a static cache: none, as generated tokens are valid."""
        return attention_mask if is_first_iteration else None

    def predict(
        self,
        hidden: Tensor,
        following: Tensor | None,
        num_items: Tensor | int | None = None,
        skip_logits: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The loss of hidden states (B, L, D) against the tokens that follow (B, L), and logits; either may be none.

        With `skip_logits` a few tokens are taken at a time, so that logits are never whole; but where calling the head
        is more than its product, as where it is replaced, adapted or watched.
        """
        head = self.lm_head
        if following is not None and skip_logits and (isinstance(head, LanguageModelHead) or _only_multiplies(head)):
            check_labels(following, hidden.shape[:-1])
            following = following.to(hidden.device)
            if isinstance(head, LanguageModelHead):
                total = head(hidden, following)
            else:
                total = linear_cross_entropy(hidden, head.weight, head.bias, following)
            return mean(total, (following != -100).sum(), num_items), None
        logits = head(hidden)
        if following is None:
            return None, logits
        return cross_entropy(logits, following, num_items), None if skip_logits else logits


def _only_multiplies(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling an output layer is its product and nothing else."""
    return (
        type(head) is nn.Linear
        and not torch.compiler.is_compiling()
        and "forward" not in vars(head)
        and head._compiled_call_impl is None
        and not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks)
        and not _has_any_global_hook()
    )


def following_tokens(labels: Tensor | None, kwargs: dict[str, Any]) -> Tensor | None:
    """The next token of every position, (B, L): `shift_labels` among the keywords, or labels moved by one."""
    following: Tensor | None = kwargs.get("shift_labels")
    if following is None and labels is not None:
        following = F.pad(labels[:, 1:], (0, 1), value=-100)
    return following
