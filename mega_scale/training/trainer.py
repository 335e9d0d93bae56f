"""One run on one rank, from its settings to its last checkpoint, for every engine; read `Trainer` from the top down."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mega_scale.checkpoint.folder import find_checkpoint, read_key, read_state, verify_outline
from mega_scale.checkpoint.run_folder import RunFolder, end_without_folder, resume_path
from mega_scale.checkpoint.saver import Saved, Saver, describe_model
from mega_scale.config import RunConfig, model_config, require_same
from mega_scale.data import Loader, load_datasets
from mega_scale.data.tokenizer import as_trained, load_tokenizer, unlike_training
from mega_scale.files import replace_text
from mega_scale.model import causal_lm_class
from mega_scale.parallel import Engine, Place, Placement, World, layout_changes, parallelize
from mega_scale.parallel.model_parallel import ParallelizeError, run_self_test
from mega_scale.parallel.shard import Values, seeded_values
from mega_scale.process import NOT_WRITTEN, REFUSED, STOPPED, StopSignals, refuse, write_stderr
from mega_scale.settings import to_yaml
from mega_scale.training.config import Schedule, build_optimizer, seconds_of
from mega_scale.training.console import Reporters, changes, describe_run, end_line, header, save_line
from mega_scale.training.metrics import SlowRanks, Throughput, memory_bytes
from mega_scale.training.reporters import Reporter, Run, TensorBoard, find_trackers
from mega_scale.training.stopping import (
    EndOfRunError,
    OutOfMemory,
    Progress,
    RunStatus,
    Stopping,
    StopRun,
    Watchdog,
    after_bad_step,
)

if TYPE_CHECKING:
    from mega_scale.training.callbacks import Callback
    from mega_scale.training.eval_command import EvalCommand
    from mega_scale.training.profiler import Profiler


class StepResult(NamedTuple):
    """What an optimizer step found."""

    loss: float  # of the global batch (nats per token)
    norm: float  # of its gradient
    lr: float  # learning rate
    tokens: int  # of the global batch
    waited: float  # for data, by this rank (seconds)
    length: int  # of its sequences (tokens)
    shares: Tensor  # (micro-batches,) losses of this rank's
    problem: str | None  # why it was not taken; None for a good step


class Trainer:
    """A run: making it checks all that a rank can check alone; `run` joins the other ranks, and trains.

    `trackers`, by name, and `callbacks` come beside those that the settings name. Raises ValueError where it cannot
    start, OSError where a file that it needs cannot be read.
    """

    world: World
    watchdog: Watchdog
    stopping: Stopping
    eval_command: "EvalCommand | None" = None  # of the first rank, whose machine needs the program
    profiler: "Profiler | None" = None  # of a run with steps to trace

    def __init__(
        self,
        config: RunConfig,
        placement: Placement,
        signals: StopSignals,
        trackers: Mapping[str, Callable[[Run], Reporter]] | None = None,
        callbacks: Sequence["Callback"] = (),
    ) -> None:
        self.config, self.rank, self.signals = config, placement.rank, signals
        self.began = time.monotonic()
        own: dict[str, Callable[[Run], Reporter]] = {"TensorBoard": TensorBoard} if config.train.tensorboard else {}
        self.trackers = own | find_trackers(config.train.trackers) | dict(trackers or {})
        self.callbacks = list(callbacks)
        if config.train.callbacks:
            from mega_scale.training.callbacks import load_callbacks

            self.callbacks = [*load_callbacks(config.train.callbacks), *callbacks]
        self.run_dir, self.remote = config.folder, config.remote()
        self.mesh = config.parallel.mesh(placement.size)
        self.readers, self.reader = self.mesh.dp, self.mesh.dp_rank(self.rank)  # ranks that read different rows
        self.key = read_key(config.checkpoint.key_file)
        self.origin, self.checkpoint = resume_path(self.run_dir, config.resume), None
        if self.origin is not None:
            self.checkpoint, _ = find_checkpoint(self.origin, self.key, proof=verify_outline)
        tokenizer = load_tokenizer(config.data.tokenizer)
        self.model_config = model_config(config.model, tokenizer)
        require_same(config, self.checkpoint, self.model_config, tokenizer)
        self.values = seeded_values(self.model_config, config.train.seed)
        if self.checkpoint is None and config.init_from is not None:
            from mega_scale.hub.folder import open_folder

            tensors = open_folder(config.init_from)[1]
            self.values = lambda name, owner, local_name: tensors[name]
        data, train = config.data, config.train
        if train.eval_command is not None and self.rank == 0:
            from mega_scale.training.eval_command import words_of

            words_of(train.eval_command, train.weight_average > 0)
        self.tokenizer = as_trained(tokenizer, data.add_bos)
        if train.sample_every:
            from mega_scale.training.trained_model import check_sample

            check_sample(self.model_config, self.tokenizer, train.sample_prompt, train.sample_tokens)
        if line := unlike_training(tokenizer, data.add_bos):
            self.log(line)
        dataset, self.validation = load_datasets(data, tokenizer, self.log)
        self.loader = Loader(
            dataset,
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            rank=self.reader,
            world_size=self.readers,
            seed=data.seed,
            shuffle=data.shuffle,
            workers=data.workers,
            prefetch=data.prefetch,
            pin_memory=torch.cuda.is_available() and config.parallel.device != "cpu",
            lengths=data.lengths,
        )
        if self.checkpoint is not None:  # refused where it has seen other data
            self.loader.check(read_state(self.checkpoint)["data"])

    def log(self, line: str) -> None:
        """Print a line, on the first rank."""
        if self.rank == 0:
            print(f"mega_scale | {line}", flush=True)

    # From joining the ranks to the exit code

    def run(self) -> int:
        """Join the other ranks, take the run folder, and train; returns the exit code, the same on all ranks.

        Raises SystemExit where the folder is refused, or where this rank, perhaps alone, cannot build its engine.
        """
        try:
            with World.start(self.config.parallel) as self.world:
                locks = () if self.remote is None else (self.remote.lock(end_without_folder),)
                options = self.config.resume, self.config.overwrite
                self.folder = RunFolder(self.run_dir, *options, end_without_folder, *locks)
                try:
                    problem = self.folder.take(self.world, self.checkpoint is None, self.log)
                    code = 0 if problem else self.run_with_watchdog()
                    if self.remote is not None and self.rank == 0 and not problem:
                        try:
                            self.remote.upload_beside()
                        except OSError as error:
                            self.log(f"status and metrics are not in {self.remote.url}: {error}")
                except ParallelizeError:
                    quiet = self.world.store.add("refused", 1) > 1  # one of those that are refused says so
                    raise
                finally:
                    self.folder.release()
        except ParallelizeError as error:
            refuse(f"rank {self.rank}: {error}", quiet=quiet)
        self.signals.ignore()
        if problem:
            refuse(problem, quiet=self.rank != 0)
        return code

    def run_with_watchdog(self) -> int:
        """Train on all ranks, watch the progress, and keep `status.json`; collective. Returns the exit code."""
        config = self.config
        status = RunStatus(self.run_dir, self.rank)
        limit_s = math.inf if config.train.max_time is None else seconds_of(config.train.max_time)
        self.stopping = Stopping(self.world, self.signals, limit_s)

        def end(verdict: str) -> None:
            status.write("failed", self.watchdog.step, verdict, last=True)
            self.folder.release()

        with Watchdog(self.world, config.train.hang_timeout(config.parallel.timeout_s), end) as self.watchdog:
            begin = 0 if self.checkpoint is None else read_state(self.checkpoint)["step"]
            status.write("running", begin)
            try:
                self.check_ranks_agree()
                if self.origin is not None:
                    self.checkpoint = self.choose_checkpoint(self.origin)
                with _explain_out_of_memory(self):
                    self.set_up()
                try:
                    with _explain_out_of_memory(self):
                        stopped = self.train()
                finally:
                    if self.eval_command is not None:
                        self.eval_command.end("the run failed")
                    self.loader.close()
                    self.engine.close()
            except EndOfRunError as error:
                status.write("failed", self.watchdog.step, str(error))
                if self.rank == 0:
                    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
                return error.code
            except StopRun:
                # Before it began to train: nothing was done that is not in its checkpoint.
                status.write("stopped", begin, self.stopping.reason())
                return STOPPED
            except OutOfMemory as error:
                status.write("failed", self.watchdog.step, str(error))
                write_stderr(f"error: {error}")
                raise
            except BaseException as error:
                status.write("failed", self.watchdog.step, f"{type(error).__name__}: {error}")
                raise
            status.write("finished" if stopped is None else "stopped", self.progress.step, stopped or "")
        return 0 if stopped is None else STOPPED

    # What all ranks agree on

    def check_stop(self, phase: str) -> None:
        """Tell the watchdog what is done now, and stop if any rank was asked to; collective. Raises StopRun."""
        self.watchdog.beat(phase)
        if self.stopping.agreed():
            raise StopRun

    def check_ranks_agree(self) -> None:
        """See that all ranks mean the same run, and test the layout if that is wanted; collective.

        Raises EndOfRunError where they do not, StopRun where a run that is resumed is to stop before it begins.
        """
        world, config = self.world, self.config
        for own, problem in (
            (self.loader.dataset.fingerprint, "read different text: give all machines the same files and tokenizer"),
            (str(self.checkpoint), f"find different checkpoints in {config.run_dir}: give all machines that folder"),
        ):
            if not world.all_agree(world.broadcast(own) == own):
                raise EndOfRunError(REFUSED, f"the ranks {problem}")
        hurry = self.stopping.agreed()
        if hurry and self.checkpoint is not None:  # a fresh run saves before it ends
            raise StopRun
        if config.parallel.self_test and not hurry:
            self.watchdog.beat("testing the layout")
            compared, error = run_self_test(self.model_config, config.engine_config(world.size), world)
            self.log(
                f"self-test: loss and {compared} gradients of a tiny model in this layout equal those of one "
                f"process, largest relative difference {error:.1e}"
            )

    def choose_checkpoint(self, path: Path) -> Path:
        """The checkpoint to go on from, proven by all ranks together; collective.

        Raises EndOfRunError where there is none, or it is of another model, tokenizer or data.
        """
        config, found, problem = self.config, path, None
        try:
            found, notes = find_checkpoint(path, self.key, world=self.world)
            for line in notes:
                self.log(line)
            state = read_state(found)
            self.loader.check(state["data"])
            if found != self.checkpoint:  # whose state is damaged: an older one is taken
                require_same(config, found, self.model_config, self.tokenizer)
        except ValueError as error:
            problem = f"{found}: {error}"
        if problem := self.world.first(problem):
            raise EndOfRunError(REFUSED, problem)
        changed = layout_changes(state["layout"], config.parallel.layout(self.world.size))
        self.log(f"resumed from {found}" + (f", in another layout: {changed}" if changed else ""))
        if self.rank == 0 and (line := changes(config, found, state["step"])):
            self.log(line)
        done, steps = state["step"], config.train.steps
        if done >= steps:
            self.log(f"nothing to do: {done} steps are done and train.steps={steps}; raise train.steps to go on")
        return found

    # Set-up

    def set_up(self) -> None:
        """Build the engine, load the checkpoint, begin the run folder, and make what reports and saves; collective."""
        config, train, world = self.config, self.config.train, self.world
        self.watchdog.beat("building the model")
        with torch.device("meta"):
            model = causal_lm_class(self.model_config)(self.model_config)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        self.engine = build_engine(model, self.values, config, world)
        self.watchdog.beat("starting")
        # Whatever was drawn until here, for workers or by libraries, is none of the run's.
        torch.manual_seed(train.seed)
        self.progress, self.schedule = Progress(config.bad_steps), Schedule(config)
        if self.checkpoint is not None:
            from mega_scale.checkpoint.state import load_checkpoint

            self.watchdog.beat("loading")
            state = load_checkpoint(self.checkpoint, self.engine, world)
            self.progress = Progress.resume(config.bad_steps, self.checkpoint, state)
        self.layout = config.parallel.layout(world.size)
        described: dict[str, bytes] = {}  # what a checkpoint holds beside its state: settings, model and tokenizer
        if self.rank == 0:
            text = to_yaml(replace(config, resume=None, overwrite=False))
            described = {"config.yaml": text.encode(), **describe_model(self.model_config, self.tokenizer)}
            self.begin_folder()
            try:
                replace_text(self.run_dir / "config.yaml", text)
            except OSError as error:
                self.log(f"{self.run_dir / 'config.yaml'} is not written: {error.strerror}")
        names = dict(self.engine.module.named_parameters())
        self.parameters_per_rank = sum(self.engine.local_tensor(name).numel() for name in names)
        for line in header(self, parameters):
            self.log(line)
        run = describe_run(self, parameters) if self.rank == 0 else Run(self.run_dir)
        self.reporter = Reporters(run, self.rank, self.trackers)
        self.throughput = Throughput(self.model_config, world.device, train.dtype, world.size)
        self.slow_ranks = SlowRanks(world, train.slow_rank_factor if world.size > 1 else 0.0)
        checkpoint = config.checkpoint, self.key, self.schedule.stable_step
        self.saver = Saver(self.run_dir, self.engine, world, described, *checkpoint, self.remote)
        self.saver.on_wait = self.show_save
        if train.eval_command is not None and self.rank == 0:
            from mega_scale.training.eval_command import EvalCommand

            limit_s, key_file = train.eval_command_timeout_s, config.checkpoint.key_file
            outlets = self.saver.held, self.reporter.log, self.reporter.values
            self.eval_command = EvalCommand(train.eval_command, limit_s, self.run_dir, key_file, *outlets)
        if config.profile.steps:
            from mega_scale.training.profiler import Profiler

            profiled = self.run_dir, config.profile, self.rank, world.device
            self.profiler = Profiler(*profiled, self.reporter.log, self.throughput)
        for callback in self.callbacks:
            callback.on_start(self)

    def begin_folder(self) -> None:
        """Make the folder, and what the object store has of it, this run's own; first rank."""
        remote, checkpoint = self.remote, self.checkpoint
        self.folder.begin(checkpoint, self.key, 0 if remote is None else remote.next_serial())
        if remote is None:
            return
        if checkpoint is None:
            remote.clear()  # the run that is overwritten, if there is one
        elif checkpoint.is_relative_to(self.run_dir):
            remote.complete(checkpoint)  # it may have become the newest

    # The loop

    def train(self) -> str | None:
        """Train from where the run is to its end, or until it is asked to stop; collective.

        Returns why it stopped before its end, None at its end; there is a checkpoint of either. Raises EndOfRunError
        where that could not be written, or after too many bad steps in a row, of which nothing is saved.
        """
        progress, steps = self.progress, self.config.train.steps
        stopped = None
        try:
            while progress.step < steps:
                profiled = None if self.profiler is None else self.profiler.step(progress.step + 1)
                with profiled or contextlib.nullcontext():
                    result = self.train_step()
                self.after_step(result)
            if progress.evaluation is None:  # it was asked to stop in its last evaluation
                self.evaluate()
        except StopRun:
            stopped = self.stopping.reason()
            self.reporter.log(f"step {progress.step} | asked to stop: {stopped}")
        ended = []
        if progress.saved != progress.step:
            self.watchdog.beat("saving")
            ended = self.save(self.loader.state_dict(progress.position))
        self.log_saves([*ended, *self.saver.finish()])
        if progress.saved != progress.step:
            last = "there is none" if progress.folder is None else f"the last one is {progress.folder}"
            self.reporter.close()
            raise EndOfRunError(NOT_WRITTEN, f"the checkpoint of step {progress.step} could not be written; {last}")
        if self.profiler is not None:
            self.profiler.finish(progress.step)
        if self.config.train.eval_command is not None:
            from mega_scale.training.eval_command import finish_command

            finish_command(self, stopped)
        for callback in self.callbacks:
            callback.on_end(self, stopped)
        self.watchdog.beat("closing trackers")
        self.reporter.close()
        self.log(end_line(self.config.run_dir, progress, steps, stopped, self.began))
        return stopped

    def train_step(self) -> StepResult:
        """Do the next optimizer step, unless it is bad; collective. Raises StopRun before it computes."""
        progress = self.progress
        self.watchdog.beat("waiting for data", progress.step + 1)
        began = time.perf_counter()
        batches = self.loader.batches(progress.position)
        waited = time.perf_counter() - began
        self.watchdog.beat("computing")
        result = take_step(
            self.engine,
            self.world,
            (self.readers, self.reader),
            batches,
            sum(int((batch["shift_labels"] != -100).sum()) for batch in batches),
            progress.step,
            self.schedule.lr(progress.step),
            stopping=self.stopping,
            find_problem=progress.problem,
            before_update=None if self.saver.under_way is None else self.saver.wait_copied,
        )
        self.stopping.step_s = max(self.stopping.step_s, time.perf_counter() - began)
        return result._replace(waited=waited)

    def after_step(self, result: StepResult) -> None:
        """Count a step, and report, evaluate, sample and save when that is due; collective.

        Raises EndOfRunError, see `train`, and StopRun where what was due is not complete.
        """
        progress, train = self.progress, self.config.train
        self.throughput.add(result.tokens, result.waited, result.length)
        if self.reporter.shown:
            self.reporter.advance()
        progress.count(result.tokens, result.loss, taken=result.problem is None)
        for callback in self.callbacks:
            callback.on_step(self, progress.step, result)
        if result.problem is not None and after_bad_step(self, result):
            return  # rolled back: nothing to log
        step, last = progress.step, progress.step == train.steps
        if step % train.log_every == 0 or last:
            self.log_step(result)
        paused = time.perf_counter()
        if self.saver.under_way is not None:
            self.show_save()
            self.log_saves(self.saver.poll())
        if self.eval_command is not None:
            self.eval_command.poll()
        if last or (train.eval_every and step % train.eval_every == 0):
            self.evaluate()
        if train.sample_every and step % train.sample_every == 0:
            self.sample()
        # A state whose last steps were bad is none to go back to.
        every = self.config.checkpoint.every
        due = (bool(every) and step % every == 0) or step == self.schedule.stable_step
        due |= train.eval_command is not None and self.runs_command(step)
        if due and progress.bad.in_a_row == 0:
            self.watchdog.beat("saving")
            self.log_saves(self.save(self.loader.state_dict(progress.position)))
        self.throughput.since += time.perf_counter() - paused

    def runs_command(self, step: int) -> bool:
        """Whether `train.eval_command`, which there is, is run on the checkpoint of a step."""
        every = self.config.train.eval_command_every
        return step == self.config.train.steps or (every > 0 and step % every == 0)

    # Reports and saves

    def log_step(self, result: StepResult) -> None:
        """Report the steps since the last report; collective."""
        progress = self.progress
        for line in self.slow_ranks.report(*self.throughput.per_step()):
            self.reporter.log(f"step {progress.step} | {line}")
        values = {
            "loss": result.loss,
            "grad_norm": result.norm,
            "lr": result.lr,
            "memory_bytes": memory_bytes(self.world.device),
            "tokens": progress.tokens,
            "bad_steps": progress.bad.total,
            **self.throughput.report(self.config.train.steps - progress.step),
            **self.loader.report(progress.position),
        }
        self.reporter.step(progress.step, values)

    def evaluate(self) -> None:
        """Compute the loss on the validation text, if there is one, with weights and average; collective.

        Raises StopRun.
        """
        if self.validation is None:
            return
        from mega_scale.training.trained_model import evaluate_run

        found = evaluate_run(self, self.validation)
        self.progress.evaluation = found
        for callback in self.callbacks:
            callback.on_evaluation(self, self.progress.step, found)

    def sample(self) -> None:
        """Generate a text; collective. Raises StopRun."""
        from mega_scale.training.trained_model import generate_sample

        self.watchdog.beat("generating text")
        self.reporter.sample(self.progress.step, generate_sample(self))

    def save(self, data: dict[str, Any]) -> list[Saved]:
        """Begin a checkpoint, or write it where saves are not asynchronous; collective. Returns saves that ended.

        `data` is what `Loader.state_dict` says of the steps so far.
        """
        progress = self.progress
        state = {"step": progress.step, "tokens": progress.tokens, "bad_steps": asdict(progress.bad)}
        if progress.evaluation is not None:
            state["validation"] = progress.evaluation
        state |= {"data": data, "layout": self.layout}
        progress.saved, self.save_began = progress.step, time.monotonic()
        return self.saver.save(progress.step, state)

    def show_save(self) -> None:
        """Say how far this rank's part of the checkpoint under way is."""
        done, total = self.saver.written / 1e6, self.saver.total / 1e6
        self.reporter.progress(self.progress.step, "saving", done, total, "MB", since=self.save_began)

    def log_saves(self, ended: list[Saved]) -> None:
        """Say how saves ended, and remember the last checkpoint."""
        progress = self.progress
        for saved in ended:
            for callback in self.callbacks:
                callback.on_save(self, saved)
            self.reporter.log(save_line(self.config.run_dir, saved))
            if saved.folder is None:
                if progress.saved == saved.step:
                    progress.saved = None
                continue
            progress.folder = saved.folder
            self.stopping.save_s = max(self.stopping.save_s, saved.write_s)
            if self.eval_command is not None and self.runs_command(saved.step):
                self.eval_command.start(saved.step, saved.folder, last=saved.step == self.config.train.steps)


# What a rank computes, in its order; a plan goes through the same


def build_engine(model: Any, values: Values, config: RunConfig, world: World) -> Engine:
    """The engine of a run around its model on the meta device; collective. Raises ParallelizeError."""

    def optimizer(sharded: Any) -> Any:
        return build_optimizer(sharded, config.optimizer, config.train.dtype)

    engine = parallelize(model, values, config.engine_config(world.size), world, optimizer)
    engine.module.train()
    return engine


def take_step(
    engine: Engine,
    world: World,
    readers: tuple[int, int],
    batches: Sequence[Mapping[str, Tensor]],
    labelled: int,
    step: int,
    lr: float,
    *,
    stopping: Stopping | None = None,
    find_problem: Callable[[float], str | None] = lambda loss: None,
    before_update: Callable[[], object] | None = None,
) -> StepResult:
    """Do the optimizer step after `step` others on this rank's micro-batches, unless it is bad; collective.

    `readers` are how many ranks read different rows, and this rank's number among them. A micro-batch has `input_ids`
    and `shift_labels` (B, L) int64, and perhaps `document_starts` (B, L) bool; `labelled` counts the labels of all.
    `find_problem` says what is wrong with the loss, and `before_update` is called before weights change. Raises
    StopRun, before it computes, where a rank is `stopping`.
    """
    # One sum says how many tokens there are, and whether the step is to be done at all.
    alike = world.axes["sp"].rank or world.axes["tp"].rank
    own = [0 if alike else labelled, 0 if stopping is None else int(stopping.wanted())]
    sums = world.sum(torch.tensor(own, device=world.device))
    seen, wanting = world.numbers(sums, unknown=[readers[0] * labelled, 0])
    if stopping is not None and stopping.agreed(wanting):
        raise StopRun
    loss, shares = torch.zeros((), device=world.device), []
    for i, batch in enumerate(batches):
        given = {name: tensor.to(world.device, non_blocking=True) for name, tensor in batch.items()}
        inputs, labels, starts = given["input_ids"], given["shift_labels"], given.get("document_starts")
        # The rows of a global batch lie micro-batch by micro-batch, and in each of them rank by rank.
        place = Place(step, (i * readers[0] + readers[1]) * len(inputs))
        share = engine.forward(inputs, labels, seen, place, starts)
        engine.backward(share, last=i == len(batches) - 1)
        shares.append(share.detach())
        loss += shares[-1]
    total = world.number(world.sum(loss, alike=("tp",)))
    problem = find_problem(total)
    if before_update is not None:
        before_update()
    norm = engine.step(lr, skip=problem is not None)
    if problem is None and not math.isfinite(norm):
        problem = f"the gradient norm is {norm}"
    return StepResult(total, norm, lr, seen, 0.0, inputs.shape[1], torch.stack(shares), problem)


@contextlib.contextmanager
def _explain_out_of_memory(trainer: Trainer) -> Iterator[None]:
    """Turn an error of memory that runs out into `OutOfMemory`, after a report is written into the run folder."""
    try:
        yield
    except Exception:
        from mega_scale.training.profiler import explain_out_of_memory

        with explain_out_of_memory(trainer):
            raise
