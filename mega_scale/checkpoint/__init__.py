"""Checkpoints of a run: verified, atomic, written in the background, read in any layout."""
