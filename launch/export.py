"""Turns a training checkpoint, of either engine and any number of ranks, into one Hugging Face folder.

python launch/export.py runs/debug exports/debug
"""

import signal

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # imports take seconds; run_command unblocks it

from mega_scale.export import main
from mega_scale.process import run_command

if __name__ == "__main__":
    run_command(main)
