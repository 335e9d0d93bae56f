"""Measure what we build against its peers, after checking that all of them compute the same.

`python launch/benchmark --help` lists the commands, `python launch/benchmark COMMAND --help` a command's options.
README.md says what was measured with them.
"""

import argparse
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# By command: the module that is imported for it, and what it measures. The module has the command's options as COMMAND
# in capitals, and run_COMMAND, which measures and prints.
COMMANDS = {
    "ema": ("ema", "forward and backward of the damped moving average"),
    "step": ("step", "a training step against peers, by length"),
    "decode": ("decode", "time per token and cache bytes as a text grows"),
    "memory": ("memory", "memory per rank of training one long sequence that ranks share"),
    "long": ("memory", "memory of a training step of a recipe's model on one long sequence"),
    "loader": ("data", "prepared data to batches: tokens/s, memory"),
    "prepare": ("data", "text to prepared data against datasets.map"),
    "reset": ("data", "training with the documents of a row kept apart, against concatenated documents"),
    "checkpoint": ("checkpoint", "how long saves stop training, and what verification costs"),
    "startup": ("startup", "what a rank does before its first step, by the number of ranks"),
    "kernels": ("ema", "Triton kernels compiled for GPUs that need not be here: registers, shared memory, spills"),
    "bandwidth": ("ema", "the moving average on a GPU as a share of a copy's bandwidth"),
    "roofline": ("roofline", "what a step takes on a GPU that need not be here: kernels, ms, MFU, kept memory"),
    "accept": ("accept", "what one GPU has to show before a long run: kernels, steps, launchers, in ten minutes"),
    "mfu": ("step", "training steps of a large model on a GPU, against a Llama of its size"),
}


if not __package__:
    # Python's path has the folder that was started, not the one that holds it: the package is loaded from its place.
    __package__ = "benchmark"
    spec = importlib.util.spec_from_file_location(__package__, Path(__file__).with_name("__init__.py"))
    assert spec is not None
    sys.modules[__package__] = importlib.util.module_from_spec(spec)


def load(name: str) -> Any:
    """A module of this folder."""
    return importlib.import_module(f".{name}", __package__)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line, of this process if not given; `run` of the result is the command's function."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # argparse takes words without a name only side by side.
    given.sort(key=lambda word: re.match(r"\w+\.[\w.]+=", word) is not None)
    top = argparse.ArgumentParser(prog="benchmark", description=(__doc__ or "").splitlines()[0])
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, (module, words) in COMMANDS.items():
        how: Any = {"description": f"Measure {words}.", "formatter_class": argparse.ArgumentDefaultsHelpFormatter}
        parser = commands.add_parser(command, help=words, **how)
        if command in given[:1]:
            load("harness").add_options(parser, getattr(load(module), command.upper()))
            parser.set_defaults(run=getattr(load(module), f"run_{command}"))
    return top.parse_args(given)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. Raises ValueError or OSError where something cannot be measured, or is wrong."""
    # A worker under a peer's Python, which lacks them, comes not here.
    import torch

    from mega_scale.settings import local_paths

    args = parse(arguments)
    torch.set_num_threads(args.threads)
    local_paths(args)
    args.run(args)


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        load("harness").serve(*sys.argv[2:])
    else:
        from mega_scale.process import run_command

        run_command(main)
