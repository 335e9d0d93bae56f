"""The training of a run: `trainer` first; see README.md."""
