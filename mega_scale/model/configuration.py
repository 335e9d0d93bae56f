"""What configurations of both families share: special tokens, remote code, and what libraries ask of any model."""

from collections.abc import Iterable
from typing import Any

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
