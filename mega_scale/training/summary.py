"""A run in a table of eight lines at its start, in facts for its trackers, and in one line at its end."""

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from mega_scale.config import RunConfig, load_config, section_of
from mega_scale.settings import values_of
from mega_scale.training.metrics import memory_bytes
from mega_scale.training.reporters import Run, versions
from mega_scale.training.schedule import schedule_changes
from mega_scale.training.stopping import Progress

if TYPE_CHECKING:
    from mega_scale.training.trainer import Trainer

# Keys by which runs are told apart even where they have the defaults.
_ALWAYS = ("optimizer.lr", "train.steps", "train.global_batch_size", "train.seed", "data.sequence_length")
_FIGURES = 3
# Keys by which the same run would have other numbers; of those of `parallel`, another line tells.
_NUMBERS: tuple[str, ...] = ("model.", "data.", "optimizer.", "schedule.", "bad_steps.", "parallel.ds_config")
_NUMBERS += tuple(
    f"train.{key}" for key in ("steps", "global_", "micro_", "seed", "dtype", "compile", "eval_batches", "weight_")
)
_SILENT = ("data.workers", "data.prefetch", "data.cache_dir")
_LONGEST = 80  # characters of a value in a line


def short(count: float) -> str:
    """A large number in a few digits: 672K, 1.38B."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= unit:
            return f"{count / unit:.{_FIGURES}g}{name}"
    return f"{count:g}"


def gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def describe_run(trainer: "Trainer", parameters: int) -> Run:
    """The run as its trackers are told of it."""
    config = trainer.config
    packages = {"deepspeed": ("deepspeed",), "fsdp": ()}[config.parallel.engine]
    defaults = values_of(RunConfig()) | values_of(type(config.model)(), "model.") | {"model.type": "mega"}
    differing = {key: value for key, value in values_of(config).items() if key in _ALWAYS or value != defaults[key]}
    facts = {
        "parameters": parameters,
        "parameters_per_rank": trainer.parameters_per_rank,
        "training_tokens": trainer.loader.dataset.tokens,
        "tokens_per_step": config.train.global_batch_size * config.data.sequence_length,
        "ranks": trainer.world.size,
        "device": _device(trainer.world.device),
        "layout": trainer.layout,
        "versions": versions(*packages),
    }
    return Run(
        trainer.run_dir,
        trainer.progress.step,
        config.train.steps,
        trainer.checkpoint is not None,
        dataclasses.asdict(config),
        differing,
        facts,
        config.train.tracker_project,
    )


def table(trainer: "Trainer", parameters: int) -> dict[str, str]:
    """What runs, in eight rows."""
    config, model, world, progress = trainer.config, trainer.model_config, trainer.world, trainer.progress
    train, data, length = config.train, config.data, config.data.sequence_length
    dataset, micro, dp = trainer.loader.dataset, config.train.micro_batch_size, trainer.mesh.dp
    tokens = train.global_batch_size * length
    validation = "" if trainer.validation is None else f", {short(trainer.validation.tokens)} to validate"
    total = f"{train.steps:,} steps = {short(train.steps * tokens)} tokens"
    if dataset.tokens:
        total += f" ({train.steps * tokens / dataset.tokens:.{_FIGURES}g} epochs)"
    known = "a stream of" if dataset.tokens is None else short(dataset.tokens)
    layout, ranks = trainer.layout, f"{world.size} rank{'s' if world.size > 1 else ''}"
    axes = " x ".join(f"{name} {size}" for name, size in zip(trainer.mesh._fields, trainer.mesh, strict=True))
    state = _state_bytes(trainer, parameters)
    trackers = ["metrics.jsonl", *trainer.trackers]
    if "TensorBoard" in trackers:
        trackers[-1] += f"; tensorboard --logdir {trainer.run_dir}"
    begun = "a new run" if trainer.checkpoint is None else f"{trainer.checkpoint}"
    if trainer.checkpoint is None and config.init_from is not None:
        begun += f" with the weights of {config.init_from}"
    every = f"a checkpoint every {config.checkpoint.every} steps" if config.checkpoint.every else "one checkpoint"
    return {
        "model": f"{model.model_type}, {short(parameters)} parameters ({model.num_hidden_layers} layers of "
        f"{model.hidden_size}, vocabulary {model.vocab_size:,}), {train.dtype}",
        "data": f"{_source(data)}, tokenizer {data.tokenizer}: {known} tokens{validation}, in rows of "
        f"{data.length_schedule if data.lengths else f'{length:,}'}",
        "batch": f"{train.global_batch_size} rows, {short(tokens)} tokens a step ({dp} x {micro} rows x "
        f"{train.global_batch_size // (micro * dp)} accumulated); {total}",
        "layout": f"{ranks} ({axes}), {layout['engine']} ZeRO-{layout['zero_stage']}, {_device(world.device)}",
        "memory": f"{gib(state)} a rank for weights, gradients and moments of {short(trainer.parameters_per_rank)} "
        f"parameters, activations not counted; {gib(memory_bytes(world.device))} in use of {gib(_total(world.device))}",
        "run folder": f"{config.run_dir}, {every}",
        "trackers": ", ".join(trackers),
        "resume": f"from step {progress.step} of {train.steps}: {begun}",
    }


def end_line(run_dir: str, progress: Progress, steps: int, stopped: str | None, began: float) -> str:
    """What was reached, where it lies, and what to do next; `began` is a time of `time.monotonic`."""
    place = None if progress.folder is None else f"{run_dir}/checkpoints/{progress.folder.name}"
    reached = f"step {progress.step} of {steps} in {duration(time.monotonic() - began)}"
    if progress.evaluation is not None:
        reached += f", validation loss {progress.evaluation['loss']:.4f}"
    if stopped is not None:
        return f"stopped at {reached} ({stopped}); it lies in {place}; go on: the same command with --resume"
    export = Path("exports") / Path(run_dir).name
    return f"finished {reached}; it lies in {place}; next: python launch/export.py {run_dir} {export}"


def _source(data: Any) -> str:
    named = data.path or data.hub_name
    return f"{data.source} {', '.join(named) if isinstance(named, list) else named}" if named else str(data.source)


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _total(device: torch.device) -> int:
    """Memory of a GPU, or of this machine for all its ranks (bytes)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def _state_bytes(trainer: "Trainer", parameters: int) -> float:
    """What this rank keeps of weights, gradients and moments, in fp32, as the ZeRO stage shards them (bytes)."""
    stage, mesh = trainer.config.parallel.zero_stage, trainer.mesh
    whole = parameters / mesh.tp
    sharded = whole / (mesh.dp_shard * mesh.sp)
    gradients, moments = (sharded if stage >= least else whole for least in (2, 1))
    average = moments if trainer.engine.averages else 0
    return 4 * (trainer.parameters_per_rank + gradients + 2 * moments + average)


def changes(config: RunConfig, checkpoint: Path, step: int) -> str:
    """Say in one line which keys that decide the numbers differ from those of a checkpoint; empty where none does.

    `checkpoint` is verified; `step` is the number of optimizer steps that it has done.
    """
    from mega_scale.training.trained_model import read_model  # takes a second, which a new run does without

    try:
        before = dataclasses.replace(load_config(checkpoint / "config.yaml"), model=section_of(read_model(checkpoint)))
    except ValueError as error:
        return f"the keys of the checkpoint cannot be compared: {error}"
    differing = []
    earlier = values_of(before)
    for key, now in values_of(config).items():
        then = earlier.get(key)
        if key.startswith(_NUMBERS) and key not in _SILENT and now != then:
            texts = (text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..." for text in (str(now), str(then)))
            differing.append("{}={} (was {})".format(key, *texts))
    if not differing:
        return ""
    line = f"resumed with other keys: {', '.join(differing)}"
    return "; ".join(filter(None, (line, schedule_changes(config, before, step))))
