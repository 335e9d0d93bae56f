"""The `model` section of a run: one kind for each family of models, with the keys of its configuration.

A kind is made from the configuration's fields, types and docstring, so that a key has one name, meaning and default.
Legend: C chunk.
"""

import dataclasses
import inspect
import re
from collections.abc import Mapping
from dataclasses import field
from typing import TYPE_CHECKING, Any, Literal

from mega_scale.model import CONFIGURATIONS
from mega_scale.model.configuration_mega import BATCH_NORMS, BaseConfig, MegaConfig
from mega_scale.model.configuration_megalodon import MegalodonConfig
from mega_scale.settings import require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FROM_TOKENIZER = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
"""Keys that are null in a run where the tokenizer gives their value."""

TRAINING_ONLY = frozenset(
    {
        "dropout_prob", "hidden_dropout_prob", "attention_probs_dropout_prob", "nffn_activation_dropout_prob",
        "embedding_dropout_prob", "classifier_dropout", "use_feature_dropout", "initializer_range",
        "ema_delta_alpha_range", "ema_beta_range", "ema_gamma_omega_range", "init_mode", "use_cache",
    }
)  # fmt: skip
"""Keys that leave the function of trained weights as it is."""


def _make_section(configuration: type[BaseConfig], defaults: Mapping[str, Any]) -> type:
    """The keys of a configuration as a dataclass, `type` first; their sentences come from its docstring."""
    entries = re.compile(r"^    (\w+): (.*\n(?:        .*\n)*)", re.MULTILINE)
    sentences = dict(entries.findall(inspect.cleandoc(configuration.__doc__ or "") + "\n"))
    own = {entry.name: entry.default for entry in dataclasses.fields(configuration)}
    defaults = {**own, **defaults}
    name = configuration.model_type
    told = {"help": "Family of models; a key that only another family has is refused (no unit)."}
    fields: list[Any] = [("type", Literal[name], field(default=name, metadata=told))]
    for key, declared in inspect.get_annotations(configuration, eval_str=True).items():
        hint, default, sentence = declared, defaults[key], " ".join(sentences[key].split())
        if key in FROM_TOKENIZER:
            hint, default, sentence = declared | None, None, sentence.rstrip(".") + "; null takes the tokenizer's."
        fields.append((key, hint, field(default=default, metadata={"help": sentence})))
    namespace = {"__module__": __name__, "__doc__": "The model"}
    return dataclasses.make_dataclass(f"{name.capitalize()}Section", fields, namespace=namespace)


if TYPE_CHECKING:
    MegaSection = Any
    MegalodonSection = Any
else:
    # A run pretrains a causal language model; MegaConfig keeps the defaults of transformers 4.37.2, an encoder's.
    MegaSection = _make_section(MegaConfig, {"is_decoder": True, "bidirectional": False})
    MegalodonSection = _make_section(MegalodonConfig, {})


_SECTIONS = {"mega": MegaSection, "megalodon": MegalodonSection}


def section_of(config: BaseConfig) -> Any:
    """The `model` section that describes a configuration."""
    section = _SECTIONS[config.model_type]
    names = [entry.name for entry in dataclasses.fields(section) if entry.name != "type"]
    return section(**{name: getattr(config, name) for name in names})


def model_config(section: Any, tokenizer: "PreTrainedTokenizerBase | None" = None) -> BaseConfig:
    """Turn the `model` section into the configuration of a model; a tokenizer gives what the section leaves open.

    Raises ValueError where a value or combination is impossible, cannot be trained, or does not fit the tokenizer.
    """
    values = {name: value for name, value in dataclasses.asdict(section).items() if value is not None}
    del values["type"]
    if tokenizer is not None:
        from mega_scale.data.tokenizer import separator_id, vocabulary_size

        size = vocabulary_size(tokenizer)
        remedy = f"it is less than the {size} ids of the tokenizer, leave it null, or set it to at least that"
        require(values.get("vocab_size", size) >= size, "model.vocab_size", values.get("vocab_size"), remedy)
        values.setdefault("vocab_size", size)
        values.setdefault("eos_token_id", separator_id(tokenizer))
        if "pad_token_id" not in values and _occurs_in_texts(tokenizer):
            values["pad_token_id"] = None  # or its embedding would never be learned
        for name in FROM_TOKENIZER[1:]:
            values.setdefault(name, getattr(tokenizer, name))
    try:
        config = CONFIGURATIONS[section.type](**values)
        config.check_for_model()
        config.check_special_ids(*values)
        if isinstance(config, MegaConfig) and config.is_decoder and config.normalization_type in BATCH_NORMS:
            raise ValueError(
                f"normalization_type={config.normalization_type!r} takes its statistics from all positions, so a "
                "decoder that trains would see the future: choose scalenorm, layernorm or rmsnorm"
            )
    except Exception as error:
        # The strict dataclass wraps what its validators raise.
        raise ValueError(f"model.{error.__cause__ or error}") from None
    return config


def _occurs_in_texts(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the padding token stands for something else too: an unknown word, or a word of the vocabulary.

    One that begins or ends texts is in the configuration, which knows what that means.
    """
    pad, text = tokenizer.pad_token_id, getattr(tokenizer, "pad_token", None)
    if pad is None or pad in (getattr(tokenizer, f"{role}_token_id", None) for role in ("unk", "sep", "cls", "mask")):
        return pad is not None
    return text is not None and pad in tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
