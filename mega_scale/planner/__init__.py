"""Plans: a run as one of its ranks would do it, on a machine without GPUs, and which layout to give it.

The real model in the real layout takes real steps on tensors that have shapes and no memory, so that no formula for
activations has to be kept up to date. README.md of launch/ shows a planned session.
"""
