"""Measure what we build against its peers, after checking that all of them compute the same.

`python launch/benchmark --help` lists the commands, `python launch/benchmark COMMAND --help` a command's options.
README.md says what was measured with them.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# By command: what it measures, and the module that is imported for it, which has its options as COMMAND in capitals and
# run_COMMAND, which measures and prints.
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
    "kernels": ("ema", "Triton kernels compiled for GPUs that need not be here: registers, shared memory, spills"),
    "bandwidth": ("ema", "the moving average on a GPU as a share of a copy's bandwidth"),
    "mfu": ("step", "training steps of a large model on a GPU, against a Llama of its size"),
}


def load(module: str) -> Any:
    """A module of this folder.

    `python launch/benchmark` puts the folder on Python's path, not the folder that holds it, and so knows no package:
    it is loaded from its place.
    """
    if not __package__ and "benchmark" not in sys.modules:
        spec = importlib.util.spec_from_file_location("benchmark", Path(__file__).with_name("__init__.py"))
        assert spec is not None and spec.loader is not None
        sys.modules["benchmark"] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{__package__ or 'benchmark'}.{module}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line, of this process if not given; `run` of the result is the command's function."""
    lines = [f"  {name:<12}{words}" for name, (_, words) in COMMANDS.items()]
    top = argparse.ArgumentParser(
        prog="benchmark",
        description=(__doc__ or "").splitlines()[0],
        epilog="\n".join(["commands:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("command", choices=list(COMMANDS), metavar="COMMAND", help="what to measure")
    top.add_argument("options", nargs=argparse.REMAINDER, help="see COMMAND --help")
    chosen = top.parse_args(arguments)
    name, words = COMMANDS[chosen.command]
    module = load(name)
    parser = argparse.ArgumentParser(
        prog=f"benchmark {chosen.command}",
        description=f"Measure {words}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    load("harness").add_options(parser, getattr(module, chosen.command.upper()))
    parser.set_defaults(command=chosen.command, run=getattr(module, f"run_{chosen.command}"))
    return parser.parse_args(chosen.options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns 2, after one line on standard error, when something is wrong."""
    # A worker under a peer's Python, which lacks them, comes not here.
    import torch

    from mega_scale.settings import local_paths

    args = parse(arguments)
    torch.set_num_threads(args.threads)
    try:
        local_paths(args)
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        load("harness").serve(*sys.argv[2:])
    else:
        from mega_scale.process import run_command

        run_command(lambda: sys.exit(main()))
