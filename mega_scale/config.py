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
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from mega_scale.checkpoint import folder as store
from mega_scale.checkpoint.run_folder import check_run_folder, create_run_folder, resume_path
from mega_scale.data.config import DataConfig, cache_folder
from mega_scale.files import is_url, local_path, shipped
from mega_scale.model import CONFIGURATIONS
from mega_scale.model.configuration_mega import BATCH_NORMS, BaseConfig, MegaConfig
from mega_scale.model.configuration_megalodon import MegalodonConfig
from mega_scale.parallel import mesh
from mega_scale.parallel.config import EngineConfig, ParallelConfig, check_accelerate
from mega_scale.process import log_to_stderr, refuse
from mega_scale.settings import read_yaml, require, resolve, split_arguments, to_yaml
from mega_scale.training.config import BadStepsConfig, OptimizerConfig, ProfileConfig, ScheduleConfig, TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mega_scale.checkpoint.remote import RemoteRun

DEFAULT_CONFIG = shipped("configs") / "debug.yaml"

_DESCRIPTION = """Every key can stand in a YAML file (as sections) and on the command line, as train.steps=200,
--train.steps=200 or --train.steps 200. Command line beats files, a later file beats an earlier one, files beat the
defaults. A key that is unknown is refused."""
_OPTIONS = {
    "--config FILE": "YAML file of keys, or a recipe in configs/ by its name, as enwik8-39m; may come several times; "
    "without it, debug (path)",
    "--print-config": "Print the resolved run as YAML, which runs again as it is, and exit",
    "--rehearse": "Plan the run and start nothing; takes the options of launch/plan.py, as --nodes 16 --gpu h100",
    "--max-time TIME": "The same as train.max_time=TIME (seconds, or H:MM:SS)",
    "--local-rank N": "Accepted from launchers, and ignored",
}
_COMPILERS = ("c++", "g++", "clang++")


# The `model` section: one kind for each family of models, with the keys of its configuration
#
# A kind is made from the configuration's fields, types and docstring, so that a key has one name, meaning and default.

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


# The run


@dataclass
class RunConfig:
    """The run"""

    run_dir: str = "runs/debug"
    """Folder for checkpoints, TensorBoard events and the resolved configuration, or a place in an object store such as
    s3://bucket/run, for which each host has a folder in data.cache_dir (path)."""

    resume: str | None = None
    """Checkpoint to continue from: "latest" in run_dir, "auto" the same if any, or a checkpoint's folder or URL (path).
    Model and tokenizer are the checkpoint's; a `model` key that is given must agree, unless it is one of dropout."""

    overwrite: bool = False
    """Whether a run that lies in run_dir is replaced, its checkpoints deleted, once the new one begins (no unit)."""

    init_from: str | None = None
    """Folder of an export or a Hugging Face model from which the initial weights are taken (path). Model and
    tokenizer are that folder's, as for resume."""

    model: MegaSection | MegalodonSection = field(default_factory=MegaSection)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: store.CheckpointConfig = field(default_factory=store.CheckpointConfig)
    bad_steps: BadStepsConfig = field(default_factory=BadStepsConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        for key in ("run_dir", "resume", "init_from"):
            if isinstance(value := getattr(self, key), str) and not (key != "init_from" and is_url(value)):
                setattr(self, key, local_path(value, key))

    @property
    def folder(self) -> Path:
        """Where this host has the run: `run_dir`, or the folder for a run in an object store."""
        if not is_url(self.run_dir):
            return Path(self.run_dir)
        from mega_scale.checkpoint.remote import work_folder

        return work_folder(self.run_dir, cache_folder(self.data.cache_dir))

    def remote(self) -> "RemoteRun | None":
        """The run in its object store, if it is in one. Raises ValueError where that cannot be used."""
        if not is_url(self.run_dir):
            return None
        from mega_scale.checkpoint.remote import RemoteRun

        return RemoteRun(self.run_dir, cache_folder(self.data.cache_dir), store.read_key(self.checkpoint.key_file))

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
            fp8=self.train.fp8,
            weight_average=self.train.weight_average,
        )

    def validate(self, world_size: int, local_size: int | None = None, *, here: bool = True) -> None:
        """Refuse (ValueError) what no run can start with; creates `run_dir`, to see that it can be written.

        `local_size` is the number of ranks on this host, None where all are on one. A run that is not to be `here` is
        refused for nothing that this machine's folders lack, except a checkpoint or export to start from.
        """
        self.data.validate(here=here)
        self.train.validate(self.parallel.timeout_s)
        self.optimizer.validate()
        self.schedule.validate(self.optimizer.lr, self.train.steps)
        self.checkpoint.validate()
        self.bad_steps.validate(self.checkpoint.every)
        self.profile.validate(self.train.steps, world_size)
        dp = self.parallel.mesh(world_size).dp
        self._check_model()
        self._check_training(dp)
        engine = self.engine_config(world_size)
        engine.validate(world_size, local_size)
        if here:
            check_accelerate(engine, world_size)
            create_run_folder(self.folder)
        self._check_origin()
        if here:
            check_run_folder(self.folder, self.resume, self.overwrite)

    def _check_model(self) -> None:
        model, data, tp, sp = model_config(self.model), self.data, self.parallel.tp, self.parallel.sp
        length, chunk = data.sequence_length, model.attention_chunk
        if chunk is not None:
            # In a schedule, every rank has whole chunks, so that nothing is padded.
            whole = sp * chunk
            for short in data.lengths.lengths if data.lengths else ():
                units = f"parallel.sp={sp} x model.chunk_size={chunk} = {whole}"
                remedy = f"{short} is not a multiple of {units}, use {mesh.multiples(whole, short)}"
                require(short % whole == 0, "data.length_schedule", data.length_schedule, remedy)
            remedy = (
                f"it does not divide data.sequence_length={length}, use a sequence_length of "
                f"{mesh.multiples(chunk, length)}, or a chunk_size of {mesh.nearest(mesh.divisors(length), chunk)}"
            )
            padded = sp > 1
            require(length % chunk == 0 or padded, "model.chunk_size", chunk, remedy)
        for rule in _FAMILY_RULES.get(self.model.type, lambda run: ())(self):
            require(*rule)
        mesh.check_tensor_parallel(model, tp)
        mesh.check_segments(model, self.parallel.activation_checkpoint_segment, self.parallel.activation_checkpoint, sp)
        mesh.check_sequence_parallel(model, length, sp)

    def _check_training(self, dp: int) -> None:
        train, batch = self.train, self.train.global_batch_size
        on_cpu, micro = self.parallel.device == "cpu" or not torch.cuda.is_available(), train.micro_batch_size
        sizes = f"global_batch_size of {mesh.multiples(dp * micro, batch)}"
        if batch % dp == 0:
            sizes += f", or a micro_batch_size of {mesh.nearest(mesh.divisors(batch // dp), micro, count=3)}"
        for rule in (
            (not (train.compile and on_cpu) or any(map(shutil.which, _COMPILERS)), "train.compile", True,
             f"a CPU needs a C++ compiler ({', '.join(_COMPILERS)}) in the PATH, install one, or set it to false"),
            (batch % (dp * micro) == 0, "train.global_batch_size", batch,
             f"it is not a multiple of {dp} data-parallel ranks x train.micro_batch_size={micro} = {dp * micro} "
             f"sequences, use a {sizes}"),
            (not train.eval_every or self.data.validates, "train.eval_every", train.eval_every,
             "it needs validation text, but data.validation_fraction=0 and no other is named: set that, "
             "data.validation_path or data.validation_split, or train.eval_every=0"),
        ):  # fmt: skip
            require(*rule)

    def _check_origin(self) -> None:
        run_dir = self.folder
        key = store.read_key(self.checkpoint.key_file)
        if self.resume is not None and self.resume != "auto":
            try:
                newest = run_dir if self.resume == "latest" else Path(self.resume)
                store.find_checkpoint(newest, key, proof=store.verify_outline)
            except (ValueError, OSError) as error:
                raise ValueError(f"resume={self.resume!r}: {error}") from None
        starts = resume_path(run_dir, self.resume) is None
        described = self.init_from is None or os.path.isfile(f"{self.init_from}/config.json")
        remedy = (
            "it has no config.json, give the folder of a Hugging Face model or an export (a run is exported by python "
            "launch/export.py RUN FOLDER)"
        )
        require(described or not starts, "init_from", self.init_from, remedy)


def _mega_rules(run: RunConfig) -> Iterable[tuple[bool, str, Any, str]]:
    """What a Mega may be and a run cannot train: whether it is not so, and the key, value and remedy."""
    model, data, train = run.model, run.data, run.train
    key, reach = ("model.chunk_size", model.chunk_size)
    if not model.use_chunking:
        key, reach = "data.sequence_length", data.sequence_length
    return (
        (model.is_decoder, "model.is_decoder", False, "a causal language model is trained, set it to true"),
        (not model.add_cross_attention, "model.add_cross_attention", True,
         "pretraining on text has no encoder to attend to, set it to false"),
        (data.packing != "reset" or model.truncation is None, "data.packing", "reset",
         f"with model.truncation={model.truncation}, a moving average cannot begin anew inside a sequence: set "
         "model.truncation=null, or data.packing=none or concat"),
        (model.relative_positional_bias != "simple" or reach <= model.max_positions, key, reach,
         f"model.relative_positional_bias='simple' reaches model.max_positions={model.max_positions}: set that to "
         f"at least {reach}, or take the rotary"),
        (model.truncation is None or not train.sample_every, "model.truncation", model.truncation,
         f"it leaves no state to generate from, but train.sample_every={train.sample_every}: set sample_every=0, "
         "or truncation=null"),
    )  # fmt: skip


_FAMILY_RULES = {"mega": _mega_rules}


# What a run takes from the folder that it goes on from or starts from
#
# Whatever of the model changes what it computes is the folder's: a key that says otherwise is refused. What only
# training reads, dropout and the spread of initial weights, may be changed.


class Described(NamedTuple):
    """A model as a folder describes it."""

    source: str  # the key that names the folder, with its value
    model: Any  # the `model` section
    tokenizer: "PreTrainedTokenizerBase | None"  # None where none can be loaded
    tokenizer_name: str  # by which a run loads it

    def require_model(self, model: Any, names: Collection[str]) -> None:
        """Refuse a model, given by the keys of `model`, that is another function by some of them."""
        there = self.model
        if "type" in names and model.type != there.type:
            names = ["type"]
        wrong = []
        for name in names:
            value = getattr(model, name)
            if not hasattr(there, name):
                wrong.append(f"model.{name}={value!r} (there: model.type={there.type!r}, which has no such key)")
            elif name not in TRAINING_ONLY and value != getattr(there, name):
                wrong.append(f"model.{name}={value!r} (there: {getattr(there, name)!r})")
        if wrong:
            raise ValueError(
                f"{self.source} holds another model than the run describes: {', '.join(wrong)}; leave those keys out "
                "to take the folder's"
            )


def described_by(config: RunConfig, checkpoint: Path | None) -> Described | None:
    """The model of the folder that a run takes its weights from, if any; raises ValueError where it describes none."""
    if checkpoint is None and config.init_from is None:
        return None
    from mega_scale.hub.folder import read_config
    from mega_scale.training.trained_model import read_model, read_own_tokenizer, read_tokenizer

    tokenizer = None
    if checkpoint is not None:
        with contextlib.suppress(ValueError):
            tokenizer = read_own_tokenizer(checkpoint)
        recorded = read_yaml(checkpoint / "config.yaml").get("data", {}).get("tokenizer", config.data.tokenizer)
        return Described(f"resume={config.resume!r}", section_of(read_model(checkpoint)), tokenizer, recorded)
    folder = str(config.init_from)
    with contextlib.suppress(ValueError):
        tokenizer = read_tokenizer(Path(folder))
    return Described(f"init_from={folder!r}", section_of(read_config(Path(folder))), tokenizer, folder)


def require_same(
    config: RunConfig, checkpoint: Path | None, model: BaseConfig, tokenizer: "PreTrainedTokenizerBase"
) -> None:
    """Refuse a model or tokenizer that is not that of the folder from which the weights are taken, if there is one.

    A run that goes on takes them from `checkpoint`, which is verified.
    """
    if (described := described_by(config, checkpoint)) is None:
        return
    ids = FROM_TOKENIZER[1:]  # follow the tokenizer
    described.require_model(section_of(model), [f.name for f in dataclasses.fields(config.model) if f.name not in ids])
    if described.tokenizer is not None and tokenizer.get_vocab() != described.tokenizer.get_vocab():
        raise ValueError(
            f"data.tokenizer={config.data.tokenizer!r} has another vocabulary than the tokenizer that "
            f"{described.source} was trained with: set data.tokenizer={described.tokenizer_name}, or leave it out"
        )


def _type_of_folder(values: dict[str, Any]) -> dict[str, Any]:
    """`model.type` where a run takes its weights from a folder, of which `values` of keys tell; else nothing."""
    config = RunConfig(**{key: values[key] for key in ("run_dir", "resume", "init_from") if key in values})
    if "model.type" in values or config.resume is config.init_from is None:
        return {}
    config.data.cache_dir, config.checkpoint.key_file = (
        values.get(key) for key in ("data.cache_dir", "checkpoint.key_file")
    )
    from mega_scale.hub.folder import read_config
    from mega_scale.training.trained_model import read_model

    try:
        config = bring(config, lambda line: None)  # what there is to say is said when the run is brought
        checkpoint = _checkpoint_of(config)
        if checkpoint is None and config.init_from is None:
            return {}
        model = read_config(Path(str(config.init_from))) if checkpoint is None else read_model(checkpoint)
        return {"model.type": model.model_type}
    except (ValueError, OSError):  # refused by `validate`
        return {}


def _checkpoint_of(config: RunConfig) -> Path | None:
    """The checkpoint that a run goes on from, if any. Raises ValueError where none that is meant can be used."""
    path = resume_path(config.folder, config.resume)
    if path is None:
        return None
    return store.find_checkpoint(path, store.read_key(config.checkpoint.key_file), proof=store.verify_outline)[0]


def adopt(config: RunConfig, given: Collection[str]) -> RunConfig:
    """Take model and tokenizer from the folder that a run takes its weights from.

    A run stays as it is where it starts from nothing, or where `validate` refuses what it starts from. A key in
    `given`, which its user gave, is refused where it contradicts the folder.
    """
    try:
        described = described_by(config, _checkpoint_of(config))
    except (ValueError, OSError):
        return config
    if described is None:
        return config
    section, data = config.model, config.data
    own = [field.name for field in dataclasses.fields(section) if f"model.{field.name}" in given]
    own = [name for name in own if name not in FROM_TOKENIZER or getattr(section, name) is not None]
    described.require_model(section, own)
    model = dataclasses.replace(described.model, **{name: getattr(section, name) for name in own})
    if "data.tokenizer" not in given and described.tokenizer is not None:
        data = dataclasses.replace(data, tokenizer=described.tokenizer_name)
    return dataclasses.replace(config, model=model, data=data)


def bring(config: RunConfig, log: Callable[[str], None]) -> RunConfig:
    """Bring to this host what a run needs of object stores before it starts, its newest checkpoint among it.

    Raises ValueError where a store cannot be used, or has nothing that can be resumed.
    """
    key = "data.path"
    try:
        config.data.bring()
        key = "run_dir"
        if remote := config.remote():
            remote.prepare(log, resumes=config.resume in ("latest", "auto"))
        if is_url(config.resume):
            from mega_scale.checkpoint.remote import localized

            key, secret = "resume", store.read_key(config.checkpoint.key_file)
            path = localized(str(config.resume), cache_folder(config.data.cache_dir), secret, log)
            config = dataclasses.replace(config, resume=str(path))
    except OSError as error:
        raise ValueError(f"{key}: {error}") from None
    return config


# From files and the command line


def find_config(name: str) -> str:
    """The path of what `--config` names: a file, or, by its name alone, a recipe of `configs/`.

    Raises ValueError for a bare name that is neither.
    """
    if Path(name).suffix in (".yaml", ".yml") or os.sep in name or Path(name).exists():
        return name
    recipes = {path.stem: str(path) for path in sorted(shipped("configs").glob("*.yaml"))}
    if name not in recipes:
        raise ValueError(f"--config {name}: there is no such file or recipe: the recipes are {', '.join(recipes)}")
    return recipes[name]


def load_config(path: str | Path) -> RunConfig:
    """Read a run from one YAML file over the defaults, as `to_yaml` writes it, or wrote it, or shorter.

    Raises ValueError where the file cannot be read, or a key or value in it is refused.
    """
    config: RunConfig = resolve(RunConfig, [str(path)], [], stored=True)[0]
    return config


def parse(argv: Sequence[str], *, quiet: bool = False) -> RunConfig:
    """Read a run from a command line.

    Without `--config` the run is that of `configs/debug.yaml`, the default job. A run that goes on from a checkpoint or
    starts from an export has its model and tokenizer. `--help` and `--print-config` exit with code 0, and what is
    refused, in one line, with code 2; `quiet` prints nothing. For combinations of keys see `RunConfig.validate`.
    """
    try:
        configs, overrides, options = split_arguments(argv, (field.name for field in dataclasses.fields(RunConfig)))
        if "help" in options:
            from mega_scale.help import format_help

            text = format_help(RunConfig, _DESCRIPTION, _OPTIONS, options["help"])
            if not quiet:
                print(text, end="", flush=True)
            raise SystemExit(0)
        base = None if configs else str(DEFAULT_CONFIG)
        files = [find_config(name) for name in configs]
        config, given = resolve(RunConfig, files, overrides, base=base, derive=_type_of_folder)
        config = bring(config, lambda line: None if quiet else log_to_stderr(line))
        # The keys of the default job are nobody's.
        config = adopt(config, given if configs else {key for key, _ in overrides})
    except ValueError as error:
        refuse(error, quiet=quiet)
    if "print_config" not in options:
        return config
    if not quiet:
        print(to_yaml(config), end="", flush=True)
    raise SystemExit(0)
