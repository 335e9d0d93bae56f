"""What models of both families are to transformers: saving, vocabulary, initial values, and what may not be rounded."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from mega_scale.model.configuration import BaseConfig


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
