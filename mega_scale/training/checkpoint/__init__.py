"""Checkpoints of a run: verified, atomic, written in the background, read in any layout."""

from mega_scale.training.checkpoint.config import CheckpointConfig
from mega_scale.training.checkpoint.folder import (
    STATE,
    checkpoints,
    find_checkpoint,
    newest_first,
    read_state,
    verify,
)
from mega_scale.training.checkpoint.manifest import CheckpointError, read_key
from mega_scale.training.checkpoint.restore import choose_checkpoint, load_checkpoint, verify_together
from mega_scale.training.checkpoint.saver import Saved, Saver

__all__ = [
    "STATE",
    "CheckpointConfig",
    "CheckpointError",
    "Saved",
    "Saver",
    "checkpoints",
    "choose_checkpoint",
    "find_checkpoint",
    "load_checkpoint",
    "newest_first",
    "read_key",
    "read_state",
    "verify",
    "verify_together",
]
