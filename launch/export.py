"""Turns a training checkpoint, of either engine and any number of ranks, into one Hugging Face folder.

python launch/export.py runs/debug exports/debug
"""

from mega_scale.export import main

if __name__ == "__main__":
    main()
