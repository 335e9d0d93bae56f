"""Checkpoints of a run: verified, atomic, written in the background, read in any layout."""

from mega_scale.training.checkpoint.config import CheckpointConfig
from mega_scale.training.checkpoint.convert import convert
from mega_scale.training.checkpoint.folder import (
    STATE,
    checkpoints,
    find_checkpoint,
    is_checkpoint,
    look,
    make_newest,
    others,
    read_state,
    run_lock,
    verify,
)
from mega_scale.training.checkpoint.manifest import CheckpointError, claimed_serial, own_files, read_key, strays
from mega_scale.training.checkpoint.restore import choose_checkpoint, load_checkpoint, verify_together
from mega_scale.training.checkpoint.retention import prune
from mega_scale.training.checkpoint.saver import Saved, Saver

__all__ = [
    "STATE",
    "CheckpointConfig",
    "CheckpointError",
    "Saved",
    "Saver",
    "checkpoints",
    "choose_checkpoint",
    "claimed_serial",
    "convert",
    "find_checkpoint",
    "is_checkpoint",
    "load_checkpoint",
    "look",
    "make_newest",
    "others",
    "own_files",
    "prune",
    "read_key",
    "read_state",
    "run_lock",
    "strays",
    "verify",
    "verify_together",
]
