"""Settings of training, and what is made of them: the optimizer, and the learning rate as a function of the step."""

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from mega_scale.process import STOP_SIGNALS
from mega_scale.settings import require, require_ranges

if TYPE_CHECKING:
    from mega_scale.config import RunConfig

# Signals with which a process may be asked to end; others stand for faults, or for what Python itself needs.
SIGNALS = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2")

# Minutes and seconds behind another part stay below 60; days are followed by hours.
_DURATION = re.compile(r"(?:(?:(\d+)-)?(\d+):(?=[0-5]?\d:))?(?:(\d+):(?=[0-5]?\d$))?(\d+)", re.ASCII)

# Below three quarters of parallel.timeout_s, ranks can still tell each other where they stand before collectives fail.
_LARGEST_SHARE = 0.75
_DEFAULT_SHARE = 0.5


@dataclass
class TrainConfig:
    """How long to train, how much text a step takes, and how often the run reports."""

    steps: int = 1000
    """Optimizer steps of the whole run, those before a resume included (steps)."""

    global_batch_size: int = 32
    """Sequences in one optimizer step, over all ranks and micro-batches (sequences)."""

    micro_batch_size: int = 8
    """Sequences in one forward pass of one rank (sequences)."""

    seed: int = 0
    """Seed of the initial weights, of dropout and of generated samples (no unit)."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format of forward and backward; master weights and EMA parameters are fp32 in either (no unit)."""

    compile: bool | None = None
    """Whether torch.compile compiles each block, which takes minutes at the first start; none means on GPUs
    (no unit)."""

    fp8: bool = False
    """Whether blocks multiply in 8 bits, weights and sums staying as they are: by torchao, with parallel.engine=fsdp,
    train.dtype=bf16 and parallel.tp=1, on GPUs since compute capability 8.9 (no unit)."""

    weight_average: float = 0.0
    """Decay of an exponential average of the weights, such as 0.9999, kept in fp32 beside them, evaluated and saved;
    launch/export.py --average exports it; 0 keeps none (0 to below 1)."""

    log_every: int = 10
    """Steps between two console lines and TensorBoard points (steps)."""

    eval_every: int = 0
    """Steps between two evaluations on the validation text; 0 evaluates only at the end (steps)."""

    eval_batches: int = 0
    """Global batches in one evaluation of each validation set; 0 takes the whole text (batches)."""

    eval_command: str | None = None
    """Command run beside the training, on the first rank's machine, with a fresh export: {model} stands for its folder,
    {average} for that of the weights' average, {output} for a path to write to, {step} for its step. Numbers of the
    JSON that it writes there, or prints last, go to the trackers; "lm_eval --model hf --model_args pretrained={model}
    --tasks piqa --output_path {output}", say."""

    eval_command_every: int = 0
    """Steps between two runs of eval_command, for each of which a checkpoint is written; one is left out while another
    runs; 0 runs it at the end only, as every value does (steps)."""

    eval_command_timeout_s: float = 3600.0
    """Longest that an export with its eval_command may take before it is ended, also at the end of a run (seconds)."""

    sample_every: int = 0
    """Steps between two generated samples; 0 generates none (steps)."""

    sample_tokens: int = 200
    """Length of a generated sample, without its prompt (tokens)."""

    sample_prompt: str = "def "
    """Text that a generated sample continues (text)."""

    tensorboard: bool = True
    """Whether to write TensorBoard events to the tensorboard folder in run_dir (no unit)."""

    trackers: list[str] = field(default_factory=list)
    """Trackers beside TensorBoard: wandb, trackio, or a reporter of yours as MODULE:CLASS or FILE.py:CLASS (names)."""

    tracker_project: str | None = None
    """Project in which W&B and trackio keep the run; null takes WANDB_PROJECT, or mega_scale (name)."""

    callbacks: list[str] = field(default_factory=list)
    """Callbacks of yours that every rank calls after steps, evaluations and saves, as MODULE:CLASS or FILE.py:CLASS
    (names)."""

    stop_signals: list[str] = field(default_factory=lambda: list(STOP_SIGNALS))
    """Signals, on any one rank, after which the run finishes its step, saves and ends with exit code 85; after Ctrl-C
    (SIGINT), a second one ends it at once (names)."""

    max_time: int | str | None = None
    """Save and end with exit code 85 before this much has passed since the start: 13800, or "3:50:00" (seconds)."""

    hang_timeout_s: float = -1.0
    """Without progress for so long, ranks print their stacks and end; 0 never, -1 parallel.timeout_s / 2 (seconds)."""

    slow_rank_factor: float = 2.0
    """Name ranks that wait for data or compute longer than this many times the median rank; 0 for not (no unit)."""

    def hang_timeout(self, timeout_s: float) -> float:
        """Seconds without progress after which the run ends, 0 for never; `timeout_s` is `parallel.timeout_s`."""
        return _DEFAULT_SHARE * timeout_s if self.hang_timeout_s == -1 else self.hang_timeout_s

    def validate(self, timeout_s: float) -> None:
        """Refuse values that cannot be meant; `timeout_s` is `parallel.timeout_s`."""
        require_ranges(
            "train",
            self,
            positive=(
                "steps",
                "global_batch_size",
                "micro_batch_size",
                "log_every",
                "sample_tokens",
                "eval_command_timeout_s",
            ),
            not_negative=("seed", "eval_every", "eval_batches", "eval_command_every", "sample_every"),
            shares=("weight_average",),
        )
        if others := [name for name in self.stop_signals if name not in SIGNALS]:
            remedy = f"{others[0]} cannot ask a run to stop, choose among {', '.join(SIGNALS)}"
            require(False, "train.stop_signals", self.stop_signals, remedy)
        if self.max_time is not None:
            seconds_of(self.max_time)
        longest = _LARGEST_SHARE * timeout_s
        possible = self.hang_timeout_s == -1 or 0 <= self.hang_timeout_s <= longest
        remedy = (
            f"give at most {longest:g}, so that ranks can say where they stand before the others give up waiting after "
            f"parallel.timeout_s={timeout_s:g}, -1 for half of that, 0 for never, or raise parallel.timeout_s"
        )
        require(possible, "train.hang_timeout_s", self.hang_timeout_s, remedy)
        possible = self.slow_rank_factor == 0 or 1 < self.slow_rank_factor < math.inf
        require(possible, "train.slow_rank_factor", self.slow_rank_factor, "give more than 1, or 0 for no reports")


@dataclass
class OptimizerConfig:
    """AdamW or Muon, and the clipping of gradients."""

    name: Literal["adamw", "muon"] = "adamw"
    """What steps the weights: adamw, or muon for the matrices of blocks and adamw for all else (embeddings, head,
    norms, moving average, biases); Muon's steps are as large, so they share lr and weight_decay (no unit)."""

    lr: float = 3e-4
    """Learning rate at the top of the schedule (absolute)."""

    momentum: float = 0.95
    """Share of the old momentum kept at each step, with name=muon (0 to below 1)."""

    beta1: float = 0.9
    """Share of the old first moment kept at each step (0 to below 1)."""

    beta2: float = 0.95
    """Share of the old second moment kept at each step (0 to below 1)."""

    eps: float = 1e-8
    """Added to the root of the second moment before dividing (absolute)."""

    weight_decay: float = 0.1
    """Decoupled decay of the parameters that `decay` names, per step and unit of learning rate (no unit)."""

    decay: Literal["matrices", "all"] = "matrices"
    """What decays: matrices, the weights of linear layers and embeddings, or all, norms, biases and averages too, as
    Megalodon's authors train; its norms scale by weight + 1, and those of a Mega would decay to zero (no unit)."""

    max_grad_norm: float = 1.0
    """Norm to which the gradient of the whole model is clipped; 0 does not clip (L2 norm)."""

    def validate(self) -> None:
        """Refuse values outside their range."""
        not_negative, shares = ("weight_decay", "max_grad_norm"), ("beta1", "beta2", "momentum")
        require_ranges("optimizer", self, positive=("lr", "eps"), not_negative=not_negative, shares=shares)


@dataclass
class ScheduleConfig:
    """How the learning rate rises to optimizer.lr and falls from there."""

    decay: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Fall from optimizer.lr to min_lr: cosine or linear from the rise to the end, wsd (warmup-stable-decay) over the
    last decay_steps only, constant not at all. A wsd run keeps a checkpoint of where it begins to fall (no unit)."""

    warmup_steps: int | float = 0
    """Length of the linear rise from warmup_init_lr to optimizer.lr, below 1 as a share of train.steps; 0 starts at
    optimizer.lr (steps)."""

    min_lr: float = 0.0
    """Learning rate at which a fall ends (absolute, not a share of optimizer.lr)."""

    warmup_init_lr: float = 0.0
    """Learning rate from which the rise starts (absolute)."""

    decay_steps: int | float = 0.2
    """Length of the fall of wsd, below 1 as a share of train.steps; 0 leaves it to a later run (steps)."""

    decay_shape: Literal["linear", "sqrt", "cosine"] = "sqrt"
    """Shape of the fall of wsd: linear, cosine, or sqrt, which falls as 1 - sqrt(share done) (no unit)."""

    def warmup(self, steps: int) -> int:
        """Steps of the rise of a run of so many steps."""
        return _steps_of(self.warmup_steps, steps)

    def fall(self, steps: int) -> int:
        """Steps of the fall of a wsd run of so many steps."""
        return _steps_of(self.decay_steps, steps)

    def validate(self, lr: float, steps: int) -> None:
        """Refuse what does not fit `optimizer.lr` and `train.steps`."""
        require_ranges("schedule", self, not_negative=("warmup_steps", "decay_steps", "min_lr", "warmup_init_lr"))
        for name in ("warmup_steps", "decay_steps"):
            key, value = f"schedule.{name}", getattr(self, name)
            remedy = "give a whole number of steps, or a share of train.steps that is below 1"
            require(value < 1 or value % 1 == 0, key, value, remedy)
            remedy = f"with train.steps={steps}, give at most {steps}, a share as in {key}=0.1, or more steps"
            require(value <= steps or (name == "decay_steps" and self.decay != "wsd"), key, value, remedy)
        if self.decay == "wsd":
            rise, fall = self.warmup(steps), self.fall(steps)
            remedy = (
                f"with schedule.warmup_steps={self.warmup_steps}, {rise + fall} of train.steps={steps} would rise or "
                f"fall, give at most {steps - rise}, or more steps"
            )
            require(rise + fall <= steps, "schedule.decay_steps", self.decay_steps, remedy)
        for name in ("min_lr", "warmup_init_lr"):
            remedy = f"with optimizer.lr={lr}, give at most {lr}, as in schedule.{name}={lr / 10:g}, or raise that"
            require(getattr(self, name) <= lr, f"schedule.{name}", getattr(self, name), remedy)


def _steps_of(length: int | float, steps: int) -> int:
    """A length in steps, which below 1 is a share of all `steps`."""
    return int(length if length >= 1 else length * steps)


class Schedule:
    """The learning rate of a run, a function of the step, so that nothing about it needs saving.

    Attributes:
        stable_step: the step whose checkpoint a wsd run keeps for other ends, the last one at the full rate; None where
            there is none.
    """

    def __init__(self, config: "RunConfig") -> None:
        schedule, self._steps = config.schedule, config.train.steps
        self._first_lr, self._lr, self._min_lr = schedule.warmup_init_lr, config.optimizer.lr, schedule.min_lr
        self._rise = schedule.warmup(self._steps)  # updates of the rise
        # Updates before the fall, which has a shape unless there is none.
        self._begin, self._shape, self.stable_step = self._rise, str(schedule.decay), None
        if schedule.decay == "wsd":
            self._begin, self._shape = self._steps - schedule.fall(self._steps), schedule.decay_shape
            if 0 < self._begin < self._steps:
                self.stable_step = self._begin

    def lr(self, step: int) -> float:
        """Learning rate of the update after `step` others.

        The first one already lies one step up the rise, so that no update is spent at a rate of zero.
        """
        if step < self._rise:
            return self._first_lr + (self._lr - self._first_lr) * (step + 1) / self._rise
        if step < self._begin or self._shape == "constant":
            return self._lr
        done = min((step - self._begin) / max(self._steps - self._begin, 1), 1.0)
        if self._shape == "cosine":
            left = 0.5 * (1.0 + math.cos(math.pi * done))
        else:
            left = 1.0 - (math.sqrt(done) if self._shape == "sqrt" else done)
        return self._min_lr + (self._lr - self._min_lr) * left


def schedule_changes(now: "RunConfig", before: "RunConfig", step: int) -> str:
    """What other keys do to the learning rate of a run resumed after `step` updates, "" for nothing.

    A cosine or linear fall is stretched over the whole run, so that another `train.steps` changes every rate of it.
    """
    parts = []
    horizons = [run.train.steps for run in (now, before)]
    if now.schedule.decay == before.schedule.decay in ("cosine", "linear") and horizons[0] != horizons[1]:
        parts.append("the {} fall now ends at step {} (was {})".format(now.schedule.decay, *horizons))
    rates = [Schedule(run).lr(step) for run in (now, before)]
    if rates[0] != rates[1]:
        parts.append("the learning rate of step {} is {:.4g} (was {:.4g})".format(step + 1, *rates))
    return "; ".join(parts)


@dataclass
class BadStepsConfig:
    """What happens to steps whose loss or gradient is not finite, or whose loss jumps."""

    in_a_row: int = 5
    """Bad steps, one after the other, after which the run ends, or goes back to its last checkpoint (steps)."""

    rollbacks: int = 0
    """How often the run goes back and leaves out the data of those steps, before it ends; 0 never (times)."""

    spike_deviations: float = 0.0
    """A loss this many standard deviations above the mean of recent ones makes a bad step; 0 for no limit (no unit)."""

    spike_window: int = 100
    """Recent good steps from which that mean and deviation are taken; before as many, none is a spike (steps)."""

    def validate(self, checkpoint_every: int) -> None:
        """Refuse values that cannot be meant; `checkpoint_every` is 0 where no checkpoint is written before the end."""
        require_ranges("bad_steps", self, positive=("in_a_row",), not_negative=("rollbacks", "spike_deviations"))
        require(self.spike_window >= 2, "bad_steps.spike_window", self.spike_window, "it must be at least 2")
        remedy = "checkpoint.every=0 writes nothing to go back to, set checkpoint.every, or rollbacks=0"
        require(not self.rollbacks or checkpoint_every > 0, "bad_steps.rollbacks", self.rollbacks, remedy)


def build_optimizer(model: nn.Module, config: OptimizerConfig, dtype: str = "fp32") -> torch.optim.AdamW:
    """AdamW, or Muon, over every trainable parameter of a model, each once: groups that decay first.

    With `decay="all"` there is one group. Else weights of linear and embedding layers decay: matrices that this keeps
    in bounds. All else has a scale with a meaning of its own: norms, biases, and what the moving average, queries, keys
    and relative positions have. The rule looks at module types and names, never at shapes, so that sharded parameters
    are grouped as whole ones are.

    Muon steps the weights of linear layers inside blocks, orthogonalised in `dtype`, fp32 or bf16. Raises ValueError
    where the model has no trainable parameter, or no blocks for Muon.
    """
    # Tied to a decaying and another place, a parameter decays.
    decaying = _weights(model, nn.Linear | nn.Embedding)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = _matrices_of_blocks(model) if config.name == "muon" else set()
    groups: list[dict[str, Any]] = []
    every = config.decay == "all"
    for muon, decays in ((True, True), (False, True), (False, False)):
        chosen = [p for p in parameters if (p in matrices) == muon and (every or p in decaying) == decays]
        if chosen:
            groups.append({"params": chosen, "weight_decay": config.weight_decay if decays else 0.0, "muon": muon})
    if not groups:
        raise ValueError("the model has no trainable parameter: leave requires_grad on for at least one")
    # Fused, it reads and writes every number once a step.
    options: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps, "fused": True}
    if config.name == "adamw":
        return torch.optim.AdamW(groups, **options)
    from mega_scale.parallel.muon import Muon  # noqa: PLC0415  distributed tensors take a second

    return Muon(groups, momentum=config.momentum, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32, **options)


def _matrices_of_blocks(model: nn.Module) -> set[nn.Parameter]:
    """Weights of the linear layers inside the blocks of a model."""
    blocks: Any = getattr(getattr(model, "base_model", None), "layers", None)
    if blocks is None:
        raise ValueError("optimizer.name='muon' steps the matrices of blocks, of which the model has none: use adamw")
    return _weights(blocks, nn.Linear)


def _weights(model: nn.Module, kinds: Any) -> set[nn.Parameter]:
    """Parameters called weight of modules of some kinds; read as attributes, those of parallel layers are others."""
    layers = (layer for layer in model.modules() if isinstance(layer, kinds))
    return {weight for layer in layers for name, weight in layer.named_parameters(recurse=False) if name == "weight"}


def seconds_of(duration: str | int) -> float:
    """Seconds of a duration: a number, or "50:00" (minutes), "3:50:00" (hours), "1-03:50:00" (days, as Slurm has it).

    Raises ValueError where it is no duration above 0.
    """
    match = _DURATION.fullmatch(str(duration))
    parts = match.groups("0") if match else "0000"
    seconds = sum(int(part) * unit for part, unit in zip(parts, (86400, 3600, 60, 1), strict=True))
    remedy = 'it is no duration, give seconds, or hours as "3:50:00", days as "1-03:50:00"'
    require(seconds > 0, "train.max_time", duration, remedy)
    return float(seconds)


@dataclass
class ProfileConfig:
    """Traces of some steps, by torch.profiler, and what is written when memory runs out."""

    steps: list[int] = field(default_factory=list)
    """First and last optimizer step to trace into the profile folder of run_dir, as [10, 14]; [] for none (steps)."""

    ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that write a trace, and on GPUs a snapshot of their memory (ranks)."""

    def validate(self, steps: int, world_size: int) -> None:
        """Refuse values that cannot be meant; `steps` is `train.steps`."""
        first, last = [*self.steps, 0, 0][:2]
        remedy = f"give the first and the last one, from 1 to train.steps={steps}, as profile.steps=[10, 14]"
        fits = not self.steps or (len(self.steps) == 2 and 1 <= first <= last <= steps)
        require(fits, "profile.steps", self.steps, remedy)
        remedy = f"give some of the {world_size} ranks, 0 to {world_size - 1}"
        fits = bool(self.ranks) and all(0 <= rank < world_size for rank in self.ranks)
        require(fits, "profile.ranks", self.ranks, remedy)
