"""What models of both families share: what they are to transformers, losses, and what turns hidden states into logits.

Legend: B batch, L length, D channels, V vocabulary, K classes.
"""

import math
from collections.abc import Collection
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import PreTrainedModel
from transformers import initialization as init

from mega_scale.model.basic_layers import LanguageModelHead
from mega_scale.model.configuration_mega import BaseConfig
from mega_scale.ops.linear import linear_cross_entropy

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)  # dtypes of labels
# What transformers' flattened batches say of documents.
DOCUMENT_KEYS = ("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


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
            from mega_scale.model.static_cache import MegaStaticCache  # noqa: PLC0415

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
