"""What a run takes from the folder that it goes on from or starts from: the model and its tokenizer.

Whatever of the model changes what it computes is the folder's: a key that says otherwise is refused. What only training
reads, dropout and the spread of initial weights, may be changed.
"""

import contextlib
import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mega_scale.config.files import read_layer
from mega_scale.config.keys import known_keys
from mega_scale.config.model_section import FROM_TOKENIZER
from mega_scale.hub import read_config
from mega_scale.model import MegaConfig
from mega_scale.training.checkpoint import find_checkpoint, read_key
from mega_scale.training.restore import read_model, read_own_tokenizer, read_tokenizer
from mega_scale.training.run_folder import to_go_on_from
from mega_scale.training.schedule import ScheduleConfig, learning_rate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mega_scale.config.run_config import RunConfig

TRAINING_ONLY = frozenset(
    {
        "dropout_prob", "hidden_dropout_prob", "attention_probs_dropout_prob", "nffn_activation_dropout_prob",
        "embedding_dropout_prob", "classifier_dropout", "use_feature_dropout", "initializer_range",
        "ema_delta_alpha_range", "ema_beta_range", "ema_gamma_omega_range", "use_cache",
    }
)  # fmt: skip
"""Keys of `model` that leave the function of trained weights as it is."""

# Keys by which the same run would have other numbers; of those of `parallel`, another line tells.
_NUMBERS: tuple[str, ...] = ("model.", "data.", "optimizer.", "schedule.", "bad_steps.", "parallel.ds_config")
_NUMBERS += tuple(f"train.{key}" for key in ("steps", "global_", "micro_", "seed", "dtype", "compile", "eval_batches"))
_SILENT = ("data.workers", "data.prefetch", "data.cache_dir")
_LONGEST = 80  # characters of a value in a line


class Described(NamedTuple):
    """A model as a folder describes it.

    Args:
        source: the key that names the folder, with its value.
        config: of the model.
        tokenizer: that lies beside it; none where there is none that can be loaded.
        tokenizer_name: by which a run loads that one.
    """

    source: str
    config: MegaConfig
    tokenizer: "PreTrainedTokenizerBase | None"
    tokenizer_name: str

    def require_model(self, model: Any, names: Collection[str]) -> None:
        """Refuse a model, given by the keys of `model`, that is another function by some of them.

        Raises:
            ValueError: names all that differ.
        """
        wrong = [
            f"model.{name}={getattr(model, name)!r} (there: {getattr(self.config, name)!r})"
            for name in names
            if name not in TRAINING_ONLY and getattr(model, name) != getattr(self.config, name)
        ]
        if wrong:
            raise ValueError(
                f"{self.source} holds another model than the run describes: {', '.join(wrong)}; leave those keys out "
                "to take the folder's"
            )


def described_by(config: "RunConfig", checkpoint: Path | None) -> Described | None:
    """What the folder describes that a run takes its weights from; none where it draws them.

    Args:
        config: the run.
        checkpoint: that it goes on from, verified; none where it starts anew.

    Raises:
        ValueError: the folder describes no model.
    """
    tokenizer = None
    if checkpoint is not None:
        with contextlib.suppress(ValueError):
            tokenizer = read_own_tokenizer(checkpoint)
        recorded = read_layer(checkpoint / "config.yaml").get("data", {}).get("tokenizer", config.data.tokenizer)
        return Described(f"resume={config.resume!r}", read_model(checkpoint), tokenizer, recorded)
    if config.init_from is None:
        return None
    with contextlib.suppress(ValueError):
        tokenizer = read_tokenizer(Path(config.init_from))
    return Described(
        f"init_from={config.init_from!r}", read_config(Path(config.init_from)), tokenizer, config.init_from
    )


def require_same(
    config: "RunConfig", checkpoint: Path | None, model: MegaConfig, tokenizer: "PreTrainedTokenizerBase"
) -> None:
    """Refuse a model or tokenizer that is not that of the folder from which the weights are taken, if there is one.

    Args:
        config: the run.
        checkpoint: that it goes on from, verified; none where it starts anew.
        model: of the run.
        tokenizer: of the run.

    Raises:
        ValueError: names what differs.
    """
    described = described_by(config, checkpoint)
    if described is None:
        return
    ids = FROM_TOKENIZER[1:]  # follow the tokenizer
    described.require_model(model, [f.name for f in dataclasses.fields(config.model) if f.name not in ids])
    if described.tokenizer is not None and tokenizer.get_vocab() != described.tokenizer.get_vocab():
        raise ValueError(
            f"data.tokenizer={config.data.tokenizer!r} has another vocabulary than the tokenizer that "
            f"{described.source} was trained with: set data.tokenizer={described.tokenizer_name}, or leave it out"
        )


def adopt(config: "RunConfig", given: Collection[str]) -> "RunConfig":
    """Take model and tokenizer from the folder that a run takes its weights from.

    Args:
        config: the run.
        given: the keys that its user gave, which the folder must agree with.

    Returns:
        The run; unchanged where it starts from nothing, or where `RunConfig.validate` refuses what it starts from.

    Raises:
        ValueError: a key that was given contradicts the folder.
    """
    try:
        path = to_go_on_from(Path(config.run_dir), config.resume)
        key = read_key(config.checkpoint.key_file)
        described = described_by(config, None if path is None else find_checkpoint(path, key)[0])
    except (ValueError, OSError):
        return config
    if described is None:
        return config
    section = config.model
    names = [field.name for field in dataclasses.fields(section)]
    own = {name for name in names if f"model.{name}" in given}
    own -= {name for name in FROM_TOKENIZER if getattr(section, name) is None}
    described.require_model(section, [name for name in names if name in own])
    values = {name: getattr(section if name in own else described.config, name) for name in names}
    name = config.data.tokenizer
    if "data.tokenizer" not in given and described.tokenizer is not None:
        name = described.tokenizer_name
    return dataclasses.replace(
        config, model=type(section)(**values), data=dataclasses.replace(config.data, tokenizer=name)
    )


def changes(config: "RunConfig", checkpoint: Path, step: int) -> str:
    """Say which keys that decide the numbers differ from those of a checkpoint that a run goes on from.

    Args:
        config: the run.
        checkpoint: the folder, verified.
        step: optimizer steps that it has done.

    Returns:
        One line, with the learning rate of the next step where that differs; empty where nothing does.
    """
    try:
        there = _flat(read_layer(checkpoint / "config.yaml"))
    except ValueError as error:
        return f"the keys of the checkpoint cannot be compared: {error}"
    model = read_model(checkpoint)
    there |= {key: getattr(model, key.removeprefix("model.")) for key in there if key.startswith("model.")}
    here = _flat(dataclasses.asdict(config))
    keys = [key for key in known_keys(type(config)) if key in there and key.startswith(_NUMBERS) and key not in _SILENT]
    differing = [f"{key}={_short(here[key])} (was {_short(there[key])})" for key in keys if here[key] != there[key]]
    if not differing:
        return ""
    line = f"resumed with other keys: {', '.join(differing)}"
    now, then = (_learning_rate(values, step) for values in (here, here | there))
    return line if now == then else f"{line}; the learning rate of step {step + 1} is {now:.4g} (was {then:.4g})"


def _learning_rate(values: dict[str, Any], step: int) -> float:
    schedule = ScheduleConfig(**{f.name: values[f"schedule.{f.name}"] for f in dataclasses.fields(ScheduleConfig)})
    return learning_rate(step, schedule, values["optimizer.lr"], values["train.steps"])


def _flat(sections: dict[str, Any]) -> dict[str, Any]:
    """Values by dotted key, of one or two words."""
    found: dict[str, Any] = {}
    for name, value in sections.items():
        nested = value if isinstance(value, dict) else {}
        found |= {f"{name}.{key}": inner for key, inner in nested.items()} if nested else {name: value}
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
