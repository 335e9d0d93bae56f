"""Pretrains a Mega causal language model; starts under deepspeed, torchrun, accelerate launch, or plain python.

deepspeed --num_accelerators 2 launch/pretrain.py --config configs/debug.yaml train.steps=200
"""

# ruff: noqa: E402
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # Python puts launch/ itself there, not what holds it.
from launch.stop_signals import StopSignals

SIGNALS = StopSignals()
if __name__ == "__main__":
    SIGNALS.listen()  # before imports that take seconds
from mega_scale.streams import keep_streams

if __name__ == "__main__":
    keep_streams()

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from launch.machine import keep_freed_memory, return_freed_memory
from mega_scale.config import RunConfig, changes, model_config, parse, refuse, require_same, save_config
from mega_scale.data import (
    Loader,
    PackedDataset,
    as_trained,
    load_datasets,
    load_tokenizer,
    text_size,
    unlike_training,
    validation_batches,
)
from mega_scale.file_lock import STALE_S
from mega_scale.hub import open_folder
from mega_scale.model import MegaConfig, MegaForCausalLM
from mega_scale.model.flops import training_flops_per_token
from mega_scale.parallel import (
    Engine,
    Placement,
    Values,
    World,
    describe,
    difference,
    parallelize,
    per_block,
    placement,
    seeded_values,
    self_test,
)
from mega_scale.parallel.monitor import PEER_LOST, write_stderr
from mega_scale.training.bad_steps import DIVERGED, BadStepsError
from mega_scale.training.checkpoint import (
    choose_checkpoint,
    find_checkpoint,
    load_checkpoint,
    read_key,
    read_state,
)
from mega_scale.training.evaluate import Evaluation, evaluate
from mega_scale.training.loop import NOT_SAVED, NotSavedError, Run, Trained, train
from mega_scale.training.metrics import peak_flops
from mega_scale.training.optimizer import build_optimizer
from mega_scale.training.preemption import STOPPED, Stopping, StopRun, TimeLimit, seconds_of
from mega_scale.training.progress import Progress
from mega_scale.training.restore import describe_model, values_from
from mega_scale.training.run_folder import RunFolder, to_go_on_from
from mega_scale.training.sample import check_sample, generate_text
from mega_scale.training.schedule import learning_rate
from mega_scale.training.status import RunStatus
from mega_scale.training.watchdog import Watchdog

REFUSED = 2
"""Exit code of a run that is refused."""


class RefusedError(Exception):
    """The ranks, which have met, cannot run together, or not from the checkpoint that there is; raised on all."""


ENDS = {RefusedError: REFUSED, BadStepsError: DIVERGED, NotSavedError: NOT_SAVED}
"""Errors that all ranks raise alike, which end the run in one line, by exit code."""


@dataclass(frozen=True)
class Prepared:
    """What a rank needs before it meets the others; making it refuses what cannot run."""

    config: RunConfig
    model: MegaConfig
    values: Values
    tokenizer: PreTrainedTokenizerBase
    validation: PackedDataset | None
    loader: Loader
    resumed: Path | None


def prepare(config: RunConfig, place: Placement) -> Prepared:
    """Check the run, read its text and open its weights; starts nothing.

    Args:
        config: the run.
        place: where this process stands among its ranks.

    Returns:
        What this rank trains with.

    Raises:
        ValueError: the run cannot start.
    """
    config.validate(place.size, place.local_size)
    mesh = config.parallel.mesh(place.size)
    resumed, path = None, to_go_on_from(Path(config.run_dir), config.resume)
    if path is not None:
        resumed, _ = find_checkpoint(path, read_key(config.checkpoint.key_file))
    tokenizer = load_tokenizer(config.data.tokenizer)
    model = model_config(config.model, tokenizer)
    require_same(config, resumed, model, tokenizer)
    values = seeded_values(model, config.train.seed)
    if resumed is None and config.init_from is not None:
        values = values_from(open_folder(config.init_from)[1])
    models_tokenizer = as_trained(tokenizer, config.data.add_bos)
    if config.train.sample_every:
        check_sample(model, models_tokenizer, config.train.sample_prompt, config.train.sample_tokens)
    if place.rank == 0 and (line := unlike_training(tokenizer, config.data.add_bos)):
        print(f"mega_scale | {line}", flush=True)

    def say(line: str) -> None:
        if place.rank == 0:
            print(f"mega_scale | {line}", flush=True)

    training, validation = load_datasets(config.data, tokenizer, say)
    loader = Loader(
        training,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        rank=mesh.dp_rank(place.rank),
        world_size=mesh.dp,
        seed=config.data.seed,
        shuffle=config.data.shuffle,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        pin_memory=torch.cuda.is_available() and config.parallel.device != "cpu",
        lengths=config.data.lengths,
    )
    if resumed is not None:
        loader.check(read_state(resumed)["data"])
    return Prepared(config, model, values, models_tokenizer, validation, loader, resumed)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; what is refused is said in one line, with exit code 2."""
    try:
        place = placement()
    except ValueError as error:
        refuse(error)
    config = parse(sys.argv[1:] if arguments is None else arguments, quiet=place.rank != 0)
    try:
        prepared = prepare(config, place)
        # Only now are the values known to be good; until here, a signal is remembered in any case.
        if __name__ == "__main__":
            SIGNALS.listen(config.train.stop_signals)
    except (ValueError, OSError) as error:
        refuse(error, quiet=place.rank != 0)
    with World.start(config.parallel) as world:
        if config.parallel.activation_checkpoint_segment:
            return_freed_memory()
        elif world.device.type == "cpu":
            keep_freed_memory()
        folder = RunFolder(Path(config.run_dir), config.resume, config.overwrite, end_without_folder)
        try:
            problem = hold(folder, prepared, world)
            code = watched(prepared, world, folder) if problem is None else 0
        finally:
            folder.release()
    SIGNALS.ignore()
    if problem is not None:
        refuse(problem, quiet=place.rank != 0)
    if code:
        raise SystemExit(code)


def hold(folder: RunFolder, prepared: Prepared, world: World) -> str | None:
    """Take the run folder for this job; collective.

    Returns:
        Why this job cannot have it, the same on all ranks; None where it has it.
    """
    config, waited = prepared.config, False
    while True:
        held, problem = False, None
        if world.rank == 0:
            try:
                held = folder.attempt(afresh=prepared.resumed is None)
            except ValueError as error:
                problem = str(error)
            except OSError as error:
                reason = error.strerror or error
                problem = (
                    f"run_dir={config.run_dir!r} cannot be written ({reason}): choose a folder that can be written"
                )
            if not (held or problem or waited):
                print(
                    f"mega_scale | {config.run_dir} is held by another job ({folder.owner}): waiting for up to "
                    f"{STALE_S:.0f} s to see whether it lives",
                    flush=True,
                )
        # The others take part in every look, so that none of them waits for longer than it may.
        held, problem = world.broadcast([held, problem])
        if held or problem:
            return problem
        waited = True
        time.sleep(1.0)


def end_without_folder(reason: str) -> None:
    """End this process, and so the run: the folder belongs to another job."""
    write_stderr(f"error: {' '.join(reason.split())}: this one ends, and saves nothing more\n")
    os._exit(PEER_LOST)


def watched(prepared: Prepared, world: World, folder: RunFolder) -> int:
    """Train on all ranks, watch the progress, and keep `status.json`; collective.

    Args:
        prepared: what this rank trains with.
        world: all ranks.
        folder: the run's, held by this job.

    Returns:
        The exit code.
    """
    config = prepared.config
    status = RunStatus(Path(config.run_dir), world.rank)
    limit = None if config.train.max_time is None else TimeLimit(seconds_of(config.train.max_time))
    stopping = Stopping(world, SIGNALS.asked, limit)
    timeout_s = config.train.hang_timeout(config.parallel.timeout_s)

    def lost(verdict: str) -> None:
        status.write("failed", watchdog.step, verdict, last=True)
        folder.release()

    with Watchdog(world, timeout_s, lost) as watchdog:
        begin = 0 if prepared.resumed is None else read_state(prepared.resumed)["step"]
        status.write("running", begin)
        try:
            trained = pretrain(prepared, world, stopping, watchdog, folder)
        except tuple(ENDS) as error:
            status.write("failed", watchdog.step, str(error))
            if world.rank == 0:
                print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
            return ENDS[type(error)]
        except StopRun:
            # Before it began to train: nothing was done that is not in its checkpoint.
            status.write("stopped", begin, stopping.reason())
            return STOPPED
        except BaseException as error:
            status.write("failed", watchdog.step, f"{type(error).__name__}: {error}")
            raise
        status.write("finished" if trained.stopped is None else "stopped", trained.step, trained.stopped or "")
    return 0 if trained.stopped is None else STOPPED


def pretrain(prepared: Prepared, world: World, stopping: Stopping, watchdog: Watchdog, folder: RunFolder) -> Trained:
    """Train on all ranks; collective. Raises StopRun and RefusedError as `meet` and `resume` do."""
    config, train_config, model = prepared.config, prepared.config.train, prepared.model
    run_dir = Path(config.run_dir)
    mesh = config.parallel.mesh(world.size)
    meet(prepared, world, stopping, watchdog)
    key = read_key(config.checkpoint.key_file)
    checkpoint = None if prepared.resumed is None else resume(prepared, world, key)
    watchdog.beat("building the model")
    with torch.device("meta"):
        module = MegaForCausalLM(model)
    engine = parallelize(
        module,
        prepared.values,
        config.parallel,
        dtype=train_config.dtype,
        micro_batch_size=train_config.micro_batch_size,
        accumulation=train_config.global_batch_size // (train_config.micro_batch_size * mesh.dp),
        max_grad_norm=config.optimizer.max_grad_norm,
        build_optimizer=lambda sharded: build_optimizer(sharded, config.optimizer),
        world=world,
        seed=train_config.seed,
        compile_gates=train_config.compile,
    )
    watchdog.beat("starting")
    engine.module.train()
    # Whatever was drawn until here, for workers or by libraries, is none of the run's.
    torch.manual_seed(train_config.seed)
    progress = Progress.begin(config.bad_steps)
    if checkpoint is not None:
        watchdog.beat("loading")
        state = load_checkpoint(checkpoint, engine, world)
        progress = Progress.resume(checkpoint, state, config.bad_steps)
    describe_config = partial(save_config, replace(config, resume=None, overwrite=False))
    if world.rank == 0:
        folder.begin(checkpoint, key)
        try:
            describe_config(run_dir / "config.yaml")
        except OSError as error:
            print(f"mega_scale | {run_dir / 'config.yaml'} is not written: {error.strerror}", flush=True)
        announce(prepared, world, progress.step, engine_parameters(engine))

    def go_on(phase: str) -> Callable[[], None]:
        def look() -> None:
            watchdog.beat(phase)
            stopping.check()

        return look

    def describe_run(folder: Path) -> None:
        describe_config(folder / "config.yaml")
        describe_model(folder / "model", model, prepared.tokenizer)

    def evaluation() -> Evaluation:
        assert prepared.validation is not None
        dataset = prepared.validation
        rows = train_config.eval_batches * train_config.global_batch_size or len(dataset)
        rank = mesh.dp_rank(world.rank)
        batches = validation_batches(dataset, rows, train_config.micro_batch_size, rank, mesh.dp)
        ratio = dataset.tokens_per_byte(rows, partial(text_size, prepared.tokenizer))
        return evaluate(engine.module, engine.forward, batches, ratio, world, go_on("evaluating"))

    def sample(step: int) -> str:
        return generate_text(
            engine.module,
            prepared.tokenizer,
            train_config.sample_prompt,
            max_new_tokens=train_config.sample_tokens,
            seed=train_config.seed + step,
            every_token=go_on("generating text"),
        )

    lengths, length = config.data.lengths, config.data.sequence_length
    run = Run(
        run_dir=run_dir,
        engine=engine,
        world=world,
        data=prepared.loader,
        learning_rate=lambda step: learning_rate(step, config.schedule, config.optimizer.lr, train_config.steps),
        evaluate=evaluation if prepared.validation is not None else None,
        sample=sample,
        describe=describe_run,
        flops_per_token=lambda step: training_flops_per_token(model, lengths.at(step) if lengths else length),
        peak_flops=peak_flops(world.device, train_config.dtype),
        key=key,
        facts={"layout": describe(config.parallel, world.size)},
        stopping=stopping,
        watchdog=watchdog,
    )
    try:
        return train(run, train_config, config.checkpoint, progress)
    finally:
        prepared.loader.close()
        engine.close()


def resume(prepared: Prepared, world: World, key: bytes | None) -> Path:
    """The proven checkpoint to go on from, whose data this run has; collective.

    Raises:
        RefusedError: there is none, or it is of another model, tokenizer or data.
    """
    path = to_go_on_from(Path(prepared.config.run_dir), prepared.config.resume)
    assert path is not None

    def say(line: str) -> None:
        print(f"mega_scale | {line}", flush=True)

    try:
        found = choose_checkpoint(path, world, key, say)
    except ValueError as error:
        raise RefusedError(str(error)) from None
    problem = None
    try:
        state = read_state(found)
        prepared.loader.check(state["data"])
        if found != prepared.resumed:  # whose state is damaged: an older one is taken
            require_same(prepared.config, found, prepared.model, prepared.tokenizer)
    except ValueError as error:
        problem = str(error)
    if problem := world.first(problem):
        raise RefusedError(f"{found}: {problem}")
    if world.rank == 0:
        changed = difference(state["layout"], describe(prepared.config.parallel, world.size))
        say(f"resumed from {found}" + (f", in another layout: {changed}" if changed else ""))
        if line := changes(prepared.config, found, state["step"]):
            say(line)
        if state["step"] >= (steps := prepared.config.train.steps):
            say(f"nothing to do: {state['step']} steps are done and train.steps={steps}; raise train.steps to go on")
    return found


def meet(prepared: Prepared, world: World, stopping: Stopping, watchdog: Watchdog) -> None:
    """See that all ranks mean the same run; collective.

    Raises:
        RefusedError: they do not.
        StopRun: a run that is resumed is to stop before it begins.
    """
    config = prepared.config
    same_text = world.broadcast(prepared.loader.dataset.fingerprint) == prepared.loader.dataset.fingerprint
    if not world.all_agree(same_text):
        raise RefusedError("the ranks read different text: give every machine the same files, tokenizer and Python")
    same_start = str(prepared.resumed)
    if not world.all_agree(world.broadcast(same_start) == same_start):
        raise RefusedError(
            f"the ranks find different checkpoints in {config.run_dir}: give all machines the same folder"
        )
    hurry = asked_already(stopping)
    if hurry and prepared.resumed is not None:
        raise StopRun
    if config.parallel.self_test and not hurry:
        watchdog.beat("testing the layout")
        found = self_test(prepared.model, config.parallel, world)
        if world.rank == 0:
            print(
                f"mega_scale | self-test: loss and {found.parameters} gradients of a tiny model in this layout equal "
                f"those of one process, largest relative difference {found.error:.1e}",
                flush=True,
            )


def asked_already(stopping: Stopping) -> bool:
    """Whether the run was asked to stop while it started; collective."""
    try:
        stopping.check()
    except StopRun:
        return True
    return False


def engine_parameters(engine: Engine) -> int:
    """Numbers of the model that this rank holds."""
    return sum(engine.held(name).numel() for name in dict(engine.module.named_parameters()))


def announce(prepared: Prepared, world: World, start: int, own_parameters: int) -> None:
    """Say in a few lines what runs, in which layout, and what that layout sends."""
    config = prepared.config
    with torch.device("meta"):
        parameters = sum(p.numel() for p in MegaForCausalLM(prepared.model).parameters())
    facts: dict[str, Any] = {
        "parameters": parameters,
        "parameters_per_rank": own_parameters,
        **describe(config.parallel, world.size),
        "device": str(world.device),
        "dtype": config.train.dtype,
        "training_tokens": prepared.loader.dataset.tokens,
        "tokens_per_step": config.train.global_batch_size * config.data.sequence_length,
        **({"length_schedule": config.data.length_schedule} if config.data.lengths else {}),
        "from_step": start,
    }
    print(f"mega_scale | {json.dumps(facts)}", flush=True)
    for sends in per_block(
        prepared.model,
        config.parallel,
        world.shape,
        rows=config.train.micro_batch_size,
        tokens=config.data.sequence_length,
        dtype=config.train.dtype,
    ):
        print(
            f"mega_scale | a block sends over {sends.axis}, per rank and micro-batch: {sends.forward:,} bytes forward, "
            f"{sends.backward:,} backward ({sends.formula})",
            flush=True,
        )
    validation = [] if prepared.validation is None else prepared.validation.tally.lines()
    for line in [*prepared.loader.dataset.tally().lines(), *(f"validation text: {line}" for line in validation)]:
        print(f"mega_scale | {line}", flush=True)


if __name__ == "__main__":
    main()
