"""Settings of the training loop: how long, how much a step, how often it reports."""

from dataclasses import dataclass
from typing import Literal


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

    log_every: int = 10
    """Steps between two console lines and TensorBoard points (steps)."""

    eval_every: int = 0
    """Steps between two evaluations on the validation text; 0 evaluates only at the end (steps)."""

    eval_batches: int = 0
    """Global batches in one evaluation; 0 takes the whole validation text (batches)."""

    sample_every: int = 0
    """Steps between two generated samples; 0 generates none (steps)."""

    sample_tokens: int = 200
    """Length of a generated sample, without its prompt (tokens)."""

    sample_prompt: str = "def "
    """Text that a generated sample continues (text)."""

    tensorboard: bool = True
    """Whether to write TensorBoard events to the tensorboard folder in run_dir (no unit)."""
