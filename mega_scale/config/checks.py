"""Combinations with which no run can start, refused before any process group does."""

import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mega_scale.config.model_section import model_config
from mega_scale.parallel.accelerate import check_accelerate
from mega_scale.parallel.mesh import divisors, multiples, nearest
from mega_scale.parallel.model_checks import (
    check_segments,
    check_sequence_parallel,
    check_tensor_parallel,
)
from mega_scale.training.checkpoint import find_checkpoint, read_key
from mega_scale.training.run_folder import check_run_folder, to_go_on_from

if TYPE_CHECKING:
    from mega_scale.config.run_config import RunConfig


_COMPILERS = ("c++", "g++", "clang++")


def check(config: "RunConfig", world_size: int, local_size: int | None = None) -> None:
    """Refuse a run that cannot start.

    Args:
        config: the run; its `run_dir` is created if it does not exist.
        world_size: number of ranks.
        local_size: number of ranks on this host; None where all are on one.

    Raises:
        ValueError: names the keys, their values and a remedy.
    """
    config.data.validate()
    _check_numbers(config)
    config.train.validate(config.parallel.timeout_s)
    config.bad_steps.validate(config.checkpoint.every)
    _check_schedule(config)
    dp = config.parallel.mesh(world_size).dp
    _check_model(config)
    _check_spread(config)
    _check_batches(config, dp)
    _check_reports(config)
    _check_engine(config, dp, world_size, local_size)
    _check_folders(config)


def _require(good: bool, key: str, value: object, remedy: str) -> None:
    if not good:
        raise ValueError(f"{key}={value!r} is not possible: {remedy}")


def _check_numbers(config: "RunConfig") -> None:
    train, optimizer, schedule = config.train, config.optimizer, config.schedule
    positive = {
        "train.steps": train.steps,
        "train.global_batch_size": train.global_batch_size,
        "train.micro_batch_size": train.micro_batch_size,
        "train.log_every": train.log_every,
        "train.sample_tokens": train.sample_tokens,
        "optimizer.lr": optimizer.lr,
        "optimizer.eps": optimizer.eps,
    }
    for key, value in positive.items():
        _require(0 < value < math.inf, key, value, "it must be above 0")
    not_negative = {
        "train.seed": train.seed,
        "train.eval_every": train.eval_every,
        "train.eval_batches": train.eval_batches,
        "train.sample_every": train.sample_every,
        "optimizer.weight_decay": optimizer.weight_decay,
        "optimizer.max_grad_norm": optimizer.max_grad_norm,
        "schedule.warmup_steps": schedule.warmup_steps,
        "schedule.min_lr": schedule.min_lr,
        "schedule.warmup_init_lr": schedule.warmup_init_lr,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep": config.checkpoint.keep,
    }
    for key, value in not_negative.items():
        _require(0 <= value < math.inf, key, value, "it must be 0 or above")
    for key, value in {"optimizer.beta1": optimizer.beta1, "optimizer.beta2": optimizer.beta2}.items():
        _require(0 <= value < 1, key, value, "it must be 0 or above and below 1")
    on_cpu = config.parallel.device == "cpu" or not torch.cuda.is_available()
    if train.compile and on_cpu and not any(map(shutil.which, _COMPILERS)):
        raise ValueError(
            f"train.compile=True needs a C++ compiler on a CPU, and the PATH has none of {', '.join(_COMPILERS)}: "
            "install one, or set train.compile=false"
        )
    _require(train.dtype in ("fp32", "bf16"), "train.dtype", train.dtype, "choose fp32 or bf16")


def _check_schedule(config: "RunConfig") -> None:
    schedule, lr, steps = config.schedule, config.optimizer.lr, config.train.steps
    remedy = "choose cosine, linear or constant"
    _require(schedule.decay in ("cosine", "linear", "constant"), "schedule.decay", schedule.decay, remedy)
    remedy = "give a whole number of steps, or a share of train.steps that is below 1"
    _require(
        schedule.warmup_steps < 1 or schedule.warmup_steps % 1 == 0,
        "schedule.warmup_steps",
        schedule.warmup_steps,
        remedy,
    )
    if schedule.warmup_steps > steps:
        raise ValueError(
            f"schedule.warmup_steps={schedule.warmup_steps} is more than train.steps={steps}: "
            f"warm up for at most {steps} steps, or a share of them as in schedule.warmup_steps=0.1, or train longer"
        )
    for key, value in {"min_lr": schedule.min_lr, "warmup_init_lr": schedule.warmup_init_lr}.items():
        if value > lr:
            raise ValueError(
                f"schedule.{key}={value} is more than optimizer.lr={lr}: set schedule.{key} to at most {lr}, as in "
                f"schedule.{key}={lr / 10:g}, or raise optimizer.lr"
            )


def _check_model(config: "RunConfig") -> None:
    model, length = config.model, config.data.sequence_length
    _require(model.is_decoder, "model.is_decoder", False, "a causal language model is trained, set it to true")
    if model.bidirectional:
        raise ValueError(
            "model.bidirectional=True with model.is_decoder=True would let every position see the future: "
            "set model.bidirectional=false"
        )
    remedy = "pretraining on text has no encoder to attend to, set it to false"
    _require(not model.add_cross_attention, "model.add_cross_attention", True, remedy)
    model_config(model)
    _check_documents(config)
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


def _check_documents(config: "RunConfig") -> None:
    model, data = config.model, config.data
    if data.packing == "reset" and model.truncation is not None:
        raise ValueError(
            f"data.packing='reset' with model.truncation={model.truncation}: a truncated moving average cannot begin "
            "anew inside a sequence; set model.truncation=null, or data.packing=none or concat"
        )


def _check_lengths(config: "RunConfig") -> None:
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


def _check_spread(config: "RunConfig") -> None:
    check_tensor_parallel(config.model, config.parallel.tp)
    how = config.parallel.recomputation
    check_segments(config.model, how.segment, how.every, config.parallel.sp)
    check_sequence_parallel(config.model, config.data.sequence_length, config.parallel.sp)


def _check_batches(config: "RunConfig", dp: int) -> None:
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


def _check_reports(config: "RunConfig") -> None:
    if config.train.eval_every and not config.data.validates:
        raise ValueError(
            f"train.eval_every={config.train.eval_every} needs validation text, but data.validation_fraction=0 and no "
            "other is named: set data.validation_fraction, validation_path or validation_split, or train.eval_every=0"
        )


def _check_engine(config: "RunConfig", dp: int, world_size: int, local_size: int | None) -> None:
    micro = config.train.micro_batch_size
    accumulation = config.train.global_batch_size // (dp * micro)
    config.parallel.validate(
        dtype=config.train.dtype,
        micro_batch_size=micro,
        accumulation=accumulation,
        max_grad_norm=config.optimizer.max_grad_norm,
        world_size=world_size,
        local_size=local_size,
    )
    check_accelerate(
        config.parallel,
        world_size,
        dtype=config.train.dtype,
        compiled=config.train.compile,
        accumulation=accumulation,
        max_grad_norm=config.optimizer.max_grad_norm,
    )


def _check_folders(config: "RunConfig") -> None:
    run_dir = Path(config.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"run_dir={config.run_dir!r} cannot be created ({error.strerror}): choose a folder that can be written"
        ) from None
    _require(os.access(run_dir, os.W_OK | os.X_OK), "run_dir", config.run_dir, "choose a folder that can be written")
    saved = run_dir / "checkpoints"
    _require(
        saved.is_dir() or not os.path.lexists(saved), "run_dir", config.run_dir, f"{saved} is no folder, move it away"
    )
    key = read_key(config.checkpoint.key_file)
    if config.resume is not None and config.resume != "auto":
        try:
            find_checkpoint(run_dir if config.resume == "latest" else Path(config.resume), key)
        except (ValueError, OSError) as error:
            raise ValueError(f"resume={config.resume!r}: {error}") from None
    starts = to_go_on_from(run_dir, config.resume) is None
    if starts and config.init_from is not None and not os.path.isfile(f"{config.init_from}/config.json"):
        raise ValueError(
            f"init_from={config.init_from!r} has no config.json: give the folder of a Hugging Face model or an export "
            "(a run is exported by python launch/export.py RUN FOLDER)"
        )
    check_run_folder(run_dir, config.resume, config.overwrite)
