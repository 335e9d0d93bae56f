"""Plans a run on a machine without GPUs: memory, collectives and time of a rank, and which layout to choose.

python launch/plan.py --config configs/megalodon-7b.yaml --nodes 16 --gpus-per-node 8 --gpu h100
python launch/plan.py --config configs/megalodon-7b.yaml --nodes 128 --gpus-per-node 8 --gpu h100 --search
"""

import signal

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # imports take seconds; run_command unblocks it

import argparse
import sys
from collections.abc import Sequence

from mega_scale.parallel import check_single
from mega_scale.planner.command import main as plan
from mega_scale.process import run_command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. Raises ValueError or OSError for what is refused."""
    check_single("launch/plan.py", argparse.Namespace())
    plan(sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    run_command(main)
