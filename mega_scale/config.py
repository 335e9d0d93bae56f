"""RunConfig: everything that a run is told. A field's sentence is its help; `validate` refuses what cannot run.

The sections stand beside what they configure. Modules that take seconds to import are imported where a run needs them:
`--help` and most refusals do without.
"""

import contextlib
import dataclasses
import inspect
import os
import re
import shutil
import types
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Union, get_args, get_origin

import torch

from mega_scale.checkpoint.folder import CheckpointConfig, find_checkpoint
from mega_scale.checkpoint.manifest import read_key
from mega_scale.checkpoint.run_folder import check_run_folder, create_run_folder, resume_path
from mega_scale.data.config import DataConfig
from mega_scale.files import local_path, replace_text
from mega_scale.model.configuration_mega import BATCH_NORMS, MegaConfig
from mega_scale.parallel.config import EngineConfig, ParallelConfig
from mega_scale.parallel.launcher import check_accelerate
from mega_scale.parallel.mesh import (
    check_segments,
    check_sequence_parallel,
    check_tensor_parallel,
    divisors,
    multiples,
    nearest,
)
from mega_scale.process import refuse
from mega_scale.settings import format_help, known_keys, read_yaml, require, resolve, split_arguments, to_yaml
from mega_scale.training.bad_steps import BadStepsConfig
from mega_scale.training.config import TrainConfig
from mega_scale.training.optimizer import OptimizerConfig, ScheduleConfig, learning_rate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_CONFIG = Path(__file__).resolve().parents[1] / "configs" / "debug.yaml"

_DESCRIPTION = """Every key below can stand in a YAML file (as sections) and on the command line, as train.steps=200,
--train.steps=200 or --train.steps 200. Command line beats files, a later file beats an earlier one, files beat the
defaults shown here. A key that is unknown is refused."""
_OPTIONS = {
    "--config": ("YAML file of keys; may be given several times; without it, configs/debug.yaml (path)", "FILE"),
    "--print-config": ("Print the resolved run as YAML, which runs again as it is, and exit", ""),
    "--max-time": ("The same as train.max_time=TIME (seconds, or H:MM:SS)", "TIME"),
    "--local-rank": ("Accepted from launchers, and ignored", "N"),
}
_COMPILERS = ("c++", "g++", "clang++")


# The model section

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
    entry = re.compile(r"^    (\w+): (.*\n(?:        .*\n)*)", re.MULTILINE)
    text = inspect.cleandoc(MegaConfig.__doc__ or "") + "\n"
    return {name: " ".join(body.split()) for name, body in entry.findall(text)}


def _make_section() -> type:
    documented = _documented()
    defaults = {field.name: field.default for field in dataclasses.fields(MegaConfig)}
    fields = []
    for name, declared in inspect.get_annotations(MegaConfig, eval_str=True).items():
        if name not in defaults:  # a ClassVar
            continue
        default = None if name in FROM_TOKENIZER else CAUSAL.get(name, defaults[name])
        sentence = documented[name]
        if name in FROM_TOKENIZER:
            sentence = sentence.rstrip(".") + "; null takes the tokenizer's."
        own = dataclasses.field(default=default, metadata={"help": sentence})
        fields.append((name, _section_type(name, declared), own))
    return dataclasses.make_dataclass("ModelSection", fields, namespace={"__module__": __name__})


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

    Raises:
        ValueError: a value or combination is impossible or cannot be trained, `model.vocab_size` is smaller than the
            tokenizer's, or a special token lies outside the vocabulary.
    """
    values = {name: value for name, value in dataclasses.asdict(section).items() if value is not None}
    if tokenizer is not None:
        from mega_scale.data import separator_id, vocabulary_size

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


@dataclass
class RunConfig:
    """The run"""

    run_dir: str = "runs/debug"
    """Folder for checkpoints, TensorBoard events and the resolved configuration (path)."""

    resume: str | None = None
    """Checkpoint to continue from: "latest" in run_dir, "auto" the same if any, or a checkpoint folder (path).
    Model and tokenizer are the checkpoint's; a `model` key that is given must agree, unless it is one of dropout."""

    overwrite: bool = False
    """Whether a run that lies in run_dir is replaced, its checkpoints deleted, once the new one begins (no unit)."""

    init_from: str | None = None
    """Folder of an export or a Hugging Face model from which the initial weights are taken (path). Model and
    tokenizer are that folder's, as for resume."""

    model: ModelSection = field(default_factory=ModelSection)
    """The model"""

    data: DataConfig = field(default_factory=DataConfig)
    """The text"""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW"""

    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning rate's schedule"""

    train: TrainConfig = field(default_factory=TrainConfig)
    """The training loop"""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the model is spread over ranks"""

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints"""

    bad_steps: BadStepsConfig = field(default_factory=BadStepsConfig)
    """Steps whose loss or gradient is not finite, or whose loss jumps"""

    def __post_init__(self) -> None:
        for key in ("run_dir", "resume", "init_from"):
            if isinstance(value := getattr(self, key), str):
                setattr(self, key, local_path(value, key))

    def engine_config(self, world_size: int) -> EngineConfig:
        """What engines have to know of this run on `world_size` ranks."""
        micro_batch_size = self.train.micro_batch_size
        return EngineConfig(
            self.parallel,
            dtype=self.train.dtype,
            micro_batch_size=micro_batch_size,
            accumulation=self.train.global_batch_size // (micro_batch_size * self.parallel.mesh(world_size).dp),
            max_grad_norm=self.optimizer.max_grad_norm,
            seed=self.train.seed,
            compile=self.train.compile,
        )

    def validate(self, world_size: int, local_size: int | None = None) -> None:
        """Refuse values and combinations with which no run can start, before any process group does.

        Creates `run_dir`, to see that it can be written.

        Args:
            world_size: number of ranks of the run.
            local_size: number of ranks on this host; None where all are on one.

        Raises:
            ValueError: names the keys, their values and a remedy.
        """
        self.data.validate()
        self.train.validate(self.parallel.timeout_s)
        self.optimizer.validate()
        self.schedule.validate(self.optimizer.lr, self.train.steps)
        self.checkpoint.validate()
        self.bad_steps.validate(self.checkpoint.every)
        dp = self.parallel.mesh(world_size).dp
        _check_compiler(self)
        _check_model(self)
        _check_spread(self)
        _check_batches(self, dp)
        _check_reports(self)
        engine = self.engine_config(world_size)
        engine.validate(world_size, local_size)
        check_accelerate(engine, world_size)
        _check_folders(self)


# Combinations with which no run can start


def _check_compiler(config: RunConfig) -> None:
    on_cpu = config.parallel.device == "cpu" or not torch.cuda.is_available()
    if config.train.compile and on_cpu and not any(map(shutil.which, _COMPILERS)):
        raise ValueError(
            f"train.compile=True needs a C++ compiler on a CPU, and the PATH has none of {', '.join(_COMPILERS)}: "
            "install one, or set train.compile=false"
        )


def _check_model(config: RunConfig) -> None:
    model, length = config.model, config.data.sequence_length
    require(model.is_decoder, "model.is_decoder", False, "a causal language model is trained, set it to true")
    if model.bidirectional:
        raise ValueError(
            "model.bidirectional=True with model.is_decoder=True would let every position see the future: "
            "set model.bidirectional=false"
        )
    remedy = "pretraining on text has no encoder to attend to, set it to false"
    require(not model.add_cross_attention, "model.add_cross_attention", True, remedy)
    model_config(model)
    if config.data.packing == "reset" and model.truncation is not None:
        raise ValueError(
            f"data.packing='reset' with model.truncation={model.truncation}: a truncated moving average cannot begin "
            "anew inside a sequence; set model.truncation=null, or data.packing=none or concat"
        )
    _check_lengths(config)
    # Over several sp ranks, a length that is not whole chunks is padded.
    chunk = model.chunk_size
    if model.use_chunking and length % chunk and config.parallel.sp == 1:
        raise ValueError(
            f"model.chunk_size={chunk} does not divide data.sequence_length={length}: use a sequence_length of "
            f"{multiples(chunk, length)}, or a chunk_size of {nearest(divisors(length), chunk)}"
        )
    if model.relative_positional_bias == "simple":
        key, reach = ("model.chunk_size", model.chunk_size) if model.use_chunking else ("data.sequence_length", length)
        if reach > model.max_positions:
            raise ValueError(
                f"{key}={reach} is more than model.max_positions={model.max_positions}, the reach of "
                f"model.relative_positional_bias='simple': set max_positions to at least {reach}, or take the rotary"
            )
    if model.truncation is not None and config.train.sample_every:
        raise ValueError(
            f"model.truncation={model.truncation} leaves the moving average without a state to generate from, but "
            f"train.sample_every={config.train.sample_every}: set sample_every=0, or truncation=null"
        )


def _check_lengths(config: RunConfig) -> None:
    """Lengths of a schedule have whole chunks on every rank, so that nothing is padded."""
    model, sp = config.model, config.parallel.sp
    if config.data.lengths is None or not model.use_chunking:
        return
    whole = sp * model.chunk_size
    for length in config.data.lengths.lengths:
        if length % whole:
            raise ValueError(
                f"data.length_schedule={config.data.length_schedule!r}: a length of {length} is not a multiple of "
                f"parallel.sp={sp} x model.chunk_size={model.chunk_size} = {whole}: use {multiples(whole, length)}"
            )


def _check_spread(config: RunConfig) -> None:
    check_tensor_parallel(config.model, config.parallel.tp)
    how = config.parallel.checkpointing
    check_segments(config.model, how.segment, how.every, config.parallel.sp)
    check_sequence_parallel(config.model, config.data.sequence_length, config.parallel.sp)


def _check_batches(config: RunConfig, dp: int) -> None:
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    at_once = dp * micro
    if batch % at_once == 0:
        return
    remedy = multiples(at_once, batch)
    if batch % dp == 0:
        remedy += f", or a micro_batch_size of {nearest(divisors(batch // dp), micro, count=3)}"
    raise ValueError(
        f"train.global_batch_size={batch} is not a multiple of {dp} data-parallel ranks x "
        f"train.micro_batch_size={micro} = {at_once} sequences: use a global_batch_size of {remedy}"
    )


def _check_reports(config: RunConfig) -> None:
    if config.train.eval_every and not config.data.validates:
        raise ValueError(
            f"train.eval_every={config.train.eval_every} needs validation text, but data.validation_fraction=0 and no "
            "other is named: set data.validation_fraction, validation_path or validation_split, or train.eval_every=0"
        )


def _check_folders(config: RunConfig) -> None:
    run_dir = Path(config.run_dir)
    create_run_folder(run_dir)
    key = read_key(config.checkpoint.key_file)
    if config.resume is not None and config.resume != "auto":
        try:
            find_checkpoint(run_dir if config.resume == "latest" else Path(config.resume), key)
        except (ValueError, OSError) as error:
            raise ValueError(f"resume={config.resume!r}: {error}") from None
    starts = resume_path(run_dir, config.resume) is None
    if starts and config.init_from is not None and not os.path.isfile(f"{config.init_from}/config.json"):
        raise ValueError(
            f"init_from={config.init_from!r} has no config.json: give the folder of a Hugging Face model or an export "
            "(a run is exported by python launch/export.py RUN FOLDER)"
        )
    check_run_folder(run_dir, config.resume, config.overwrite)


# What a run takes from the folder that it goes on from or starts from
#
# Whatever of the model changes what it computes is the folder's: a key that says otherwise is refused. What only
# training reads, dropout and the spread of initial weights, may be changed.

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
        tokenizer: that lies beside it; None where none can be loaded.
        tokenizer_name: by which a run loads that one.
    """

    source: str
    config: MegaConfig
    tokenizer: "PreTrainedTokenizerBase | None"
    tokenizer_name: str

    def require_model(self, model: Any, names: Collection[str]) -> None:
        """Refuse a model, given by the keys of `model`, that is another function by some of them. Raises ValueError."""
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


def described_by(config: RunConfig, checkpoint: Path | None) -> Described | None:
    """What the folder describes that a run takes its weights from; none where it draws them.

    Raises ValueError where the folder describes no model.
    """
    if checkpoint is None and config.init_from is None:
        return None
    from mega_scale.hub.folder import read_config
    from mega_scale.training.trained_model import read_model, read_own_tokenizer, read_tokenizer

    tokenizer = None
    if checkpoint is not None:
        with contextlib.suppress(ValueError):
            tokenizer = read_own_tokenizer(checkpoint)
        recorded = read_yaml(checkpoint / "config.yaml").get("data", {}).get("tokenizer", config.data.tokenizer)
        return Described(f"resume={config.resume!r}", read_model(checkpoint), tokenizer, recorded)
    folder = str(config.init_from)
    with contextlib.suppress(ValueError):
        tokenizer = read_tokenizer(Path(folder))
    return Described(f"init_from={folder!r}", read_config(Path(folder)), tokenizer, folder)


def require_same(
    config: RunConfig, checkpoint: Path | None, model: MegaConfig, tokenizer: "PreTrainedTokenizerBase"
) -> None:
    """Refuse a model or tokenizer that is not that of the folder from which the weights are taken, if there is one.

    Args:
        config: the run.
        checkpoint: that it goes on from, verified; None where it starts anew.
        model: of the run.
        tokenizer: of the run.
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


def adopt(config: RunConfig, given: Collection[str]) -> RunConfig:
    """Take model and tokenizer from the folder that a run takes its weights from.

    Args:
        config: the run; unchanged where it starts from nothing, or where `validate` refuses what it starts from.
        given: the keys that its user gave, which the folder must agree with.

    Raises:
        ValueError: a key that was given contradicts the folder.
    """
    try:
        path = resume_path(Path(config.run_dir), config.resume)
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


def changes(config: RunConfig, checkpoint: Path, step: int) -> str:
    """Say in one line which keys that decide the numbers differ from those of a checkpoint; empty where none does.

    Args:
        config: the run that goes on from it.
        checkpoint: the folder, verified.
        step: optimizer steps that it has done.
    """
    try:
        there = _flat(read_yaml(checkpoint / "config.yaml"))
    except ValueError as error:
        return f"the keys of the checkpoint cannot be compared: {error}"
    from mega_scale.training.trained_model import read_model

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


# From files and the command line


def load_config(path: str | Path) -> RunConfig:
    """Read a run from one YAML file over the defaults, as `save_config` writes it, or wrote it, or shorter.

    Raises:
        ValueError: the file cannot be read, or a key or value in it is refused.
    """
    config: RunConfig = resolve(RunConfig, [str(path)], [], stored=True)[0]
    return config


def save_config(config: RunConfig, path: Path) -> None:
    """Write a run to a YAML file that `load_config` reads back exactly, as a whole.

    Raises:
        OSError: it cannot be written.
    """
    replace_text(path, to_yaml(config))


def parse(argv: Sequence[str], *, quiet: bool = False) -> RunConfig:
    """Read a run from a command line.

    Without `--config` the run is that of `configs/debug.yaml`, the default job. A run that goes on from a checkpoint or
    starts from an export has its model and tokenizer, and keys that contradict it are refused. `--help` and
    `--print-config` print and exit with code 0; whatever is refused is said in one line, and exits with code 2.

    Args:
        argv: the words after the program's name.
        quiet: print nothing, as ranks other than the first do.

    Returns:
        The run, its keys and types checked, its combinations not: see `RunConfig.validate`.
    """
    try:
        arguments = split_arguments(argv, (section.name for section in dataclasses.fields(RunConfig)))
        if arguments.help:
            if not quiet:
                print(format_help(RunConfig, _DESCRIPTION, _OPTIONS), end="", flush=True)
            raise SystemExit(0)
        config, given = resolve(RunConfig, arguments.configs or [str(DEFAULT_CONFIG)], arguments.overrides)
        # The keys of the default job are nobody's.
        config = adopt(config, given if arguments.configs else {key for key, _ in arguments.overrides})
    except ValueError as error:
        refuse(error, quiet=quiet)
    if arguments.print_config:
        if not quiet:
            print(to_yaml(config), end="", flush=True)
        raise SystemExit(0)
    return config
