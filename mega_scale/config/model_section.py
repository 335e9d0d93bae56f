"""The `model` section of a run: the keys that MegaConfig declares, with defaults for a causal language model."""

import dataclasses
import inspect
import re
import types
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin

from mega_scale.data import separator_id, vocabulary_size
from mega_scale.model.configuration_mega import BATCH_NORMS, MegaConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FROM_TOKENIZER = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")

# A run pretrains a causal language model; MegaConfig itself keeps the defaults of transformers 4.37.2, an encoder's.
CAUSAL = {"is_decoder": True, "bidirectional": False}


def _section_type(name: str, declared: Any) -> Any:
    """Give the type of a key on the command line: `float | int` is float, and what a tokenizer fills in may be null."""
    members = list(get_args(declared)) if get_origin(declared) in (Union, types.UnionType) else [declared]
    if float in members and int in members:
        members.remove(int)
    if name in FROM_TOKENIZER and types.NoneType not in members:
        members.append(types.NoneType)
    return Union[tuple(members)]  # noqa: UP007  the members are known only here


def _documented() -> dict[str, str]:
    """Read the sentence on every key out of MegaConfig's docstring."""
    entry = re.compile(r"^    (\w+) \(.*\):\n((?:        .*\n?)+)", re.MULTILINE)
    text = inspect.cleandoc(MegaConfig.__doc__ or "") + "\n"
    return {name: " ".join(body.split()) for name, body in entry.findall(text)}


def _make_section() -> type:
    documented = _documented()
    defaults = {field.name: field.default for field in dataclasses.fields(MegaConfig)}
    fields, lines = [], []
    for name, declared in inspect.get_annotations(MegaConfig, eval_str=True).items():
        if name not in defaults:  # a ClassVar
            continue
        default = None if name in FROM_TOKENIZER else CAUSAL.get(name, defaults[name])
        fields.append((name, _section_type(name, declared), dataclasses.field(default=default)))
        sentence = documented[name]
        if name in FROM_TOKENIZER:
            sentence = sentence.rstrip(".") + "; null takes the tokenizer's."
        lines.append(f"    {name}: {sentence}")
    doc = "Shape and options of the model.\n\nArgs:\n" + "\n".join(lines)
    return dataclasses.make_dataclass("ModelSection", fields, namespace={"__doc__": doc, "__module__": __name__})


if TYPE_CHECKING:
    ModelSection = Any
else:
    ModelSection = _make_section()


def model_config(section: ModelSection, tokenizer: "PreTrainedTokenizerBase | None" = None) -> MegaConfig:
    """Turn the `model` section into the configuration of a model.

    Args:
        section: the `model` section of a run.
        tokenizer: gives the vocabulary size and the special token ids that the section leaves open; without one they
            keep MegaConfig's defaults.

    Returns:
        The configuration, checked for combinations that no model can have.

    Raises:
        ValueError: a value or combination is impossible or cannot be trained, `model.vocab_size` is smaller than the
            tokenizer's, or a special token lies outside the vocabulary.
    """
    values = {name: value for name, value in dataclasses.asdict(section).items() if value is not None}
    if tokenizer is not None:
        size = vocabulary_size(tokenizer)
        if values.get("vocab_size", size) < size:
            raise ValueError(
                f"model.vocab_size={values['vocab_size']} is less than the {size} ids of the tokenizer: "
                "leave it null, or set it to at least that"
            )
        values.setdefault("vocab_size", size)
        values.setdefault("eos_token_id", separator_id(tokenizer))
        if "pad_token_id" not in values and _occurs_in_texts(tokenizer, tokenizer.pad_token_id):
            values["pad_token_id"] = None  # or its embedding would never be learned
        for name in FROM_TOKENIZER[1:]:
            values.setdefault(name, getattr(tokenizer, name))
    try:
        config = MegaConfig(**values)
        config.check_for_model()
        config.check_special_ids(*values)
        if config.is_decoder and config.normalization_type in BATCH_NORMS:
            raise ValueError(
                f"normalization_type={config.normalization_type!r} takes its statistics from all positions, so a "
                "decoder that trains would see the future: choose scalenorm, layernorm or rmsnorm"
            )
    except Exception as error:
        # The strict dataclass wraps what its validators raise.
        raise ValueError(f"model.{error.__cause__ or error}") from None
    return config


def _occurs_in_texts(tokenizer: "PreTrainedTokenizerBase", pad: int | None) -> bool:
    """Whether the padding token stands for something else too: an unknown word, or a word of the vocabulary.

    One that begins or ends texts is in the configuration, which knows what that means.
    """
    roles = (getattr(tokenizer, f"{role}_token_id", None) for role in ("unk", "sep", "cls", "mask"))
    if pad is None or pad in roles:
        return pad is not None
    text = getattr(tokenizer, "pad_token", None)
    return text is not None and pad in tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
