"""When checkpoints are written, how, and how many are kept."""

from dataclasses import dataclass

from mega_scale.files import local_path


@dataclass
class CheckpointConfig:
    """When checkpoints are written, and how many are kept; one is always written at the end."""

    every: int = 0
    """Steps between two checkpoints; 0 writes one at the end only (steps)."""

    keep: int = 0
    """Newest checkpoints to keep, older ones are deleted after a new one is proven; 0 keeps all (checkpoints)."""

    keep_every: int = 0
    """Checkpoints of steps that this divides are never deleted; 0 means none of them (steps)."""

    asynchronous: bool = True
    """Whether training goes on while a checkpoint is written, from a copy in host memory (no unit)."""

    key_file: str | None = None
    """File with a secret of at least 16 bytes, with which checkpoints are signed (HMAC-SHA256) against tampering; those
    that are not signed with it are not loaded (path)."""

    def __post_init__(self) -> None:
        if self.key_file is not None:
            self.key_file = local_path(self.key_file, "checkpoint.key_file")
