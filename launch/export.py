"""Turns a training checkpoint, of either engine and any number of ranks, into one Hugging Face folder.

python launch/export.py runs/debug exports/debug
"""

from mega_scale.export import main
from mega_scale.streams import run_command

if __name__ == "__main__":
    run_command(main)
