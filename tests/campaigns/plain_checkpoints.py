"""Checkpoints that nobody verifies: torch.distributed.checkpoint's and DeepSpeed's, as they come."""

import random
import shutil
from pathlib import Path

import damage
import state_folder
import tiny_run
import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from verified_run import FOUND, HARMLESS, NEWER, OLDER, SIZES, WRONG, Trial, restore, snapshot

from mega_scale.parallel import World


class Dcp:
    """The same tensors, saved by torch.distributed.checkpoint as it comes."""

    name = "DCP"

    def __init__(self, folder: Path, saved: dict[int, dict[str, Tensor]]) -> None:
        self.run, self.saved = folder / "run", saved
        for step in (OLDER, NEWER):
            dcp.save(dict(self.saved[step]), checkpoint_id=self.run / f"step-{step:08d}")

    def load(self, run: Path) -> dict[str, Tensor] | None:
        """Tensors of the newest checkpoint; none where nothing was loaded."""
        tensors = {name: torch.full_like(tensor, -7) for name, tensor in self.saved[NEWER].items()}
        dcp.load(tensors, checkpoint_id=run / f"step-{NEWER:08d}")
        return tensors

    def close(self) -> None:
        """It holds nothing."""


class DeepSpeed:
    """The same model under ZeRO-1, saved and loaded by DeepSpeed as it comes."""

    name = "DeepSpeed"

    def __init__(self, folder: Path, world: World) -> None:
        self.run, self.saved = folder / "run", {}
        self._engine = tiny_run.make_engine(world, {"engine": "deepspeed", "zero_stage": 1}, **SIZES)
        self._plain = self._engine._engine  # type: ignore[attr-defined]
        for step in (OLDER, NEWER):
            tiny_run.train(self._engine, world, range(2))
            self._plain.save_checkpoint(str(self.run), tag=f"step-{step:08d}")
            self.saved[step] = snapshot(self._engine)
        tiny_run.train(self._engine, world, range(2))
        self._known = snapshot(self._engine)

    def load(self, run: Path) -> dict[str, Tensor] | None:
        """Tensors of the newest checkpoint; none where nothing was loaded."""
        restore(self._engine, self._known)
        path, _ = self._plain.load_checkpoint(str(run))
        return None if path is None else snapshot(self._engine)

    def close(self) -> None:
        """Undo what DeepSpeed changed in this process."""
        self._engine.close()


def plain_trial(contender: Dcp | DeepSpeed, folder: Path, draw: random.Random) -> Trial | None:
    """One damage to a checkpoint that nobody verifies; none where the one drawn changes nothing."""
    run = folder / "copy" / "run"
    shutil.rmtree(run.parent, ignore_errors=True)
    shutil.copytree(contender.run, run)
    newer, older = (run / f"step-{step:08d}" for step in (NEWER, OLDER))
    kinds = [*damage.OF_ONE_FILE, "two files swapped", "file of the older checkpoint", "extra entry"]
    pointer = run / "latest"
    kind = draw.choice([*kinds, "pointer damaged", "stale pointer"] if pointer.exists() else kinds)
    # Only what is loaded counts: DeepSpeed also leaves a script beside its checkpoints.
    name = draw.choice([name for name in damage.files(newer) if not name.endswith(".py")])
    if kind == "pointer damaged":
        name = "latest"
        damage.damage_pointer(pointer, draw)
    elif kind == "stale pointer":
        name = "latest"
        pointer.write_bytes(damage.STALE)
    elif kind in damage.OF_ONE_FILE:
        before = (newer / name).read_bytes()
        damage.OF_ONE_FILE[kind](newer / name, draw)
        if (newer / name).exists() and (newer / name).read_bytes() == before:
            return None
    elif damage.swap(kind, newer, name, older, draw) is None:
        return None
    try:
        tensors = contender.load(run)
    except BaseException as error:  # DCP's own error is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return Trial(kind, name, FOUND, f"{type(error).__name__}: {error}"[:200])
    if tensors is None:
        return Trial(kind, name, FOUND, "nothing was loaded")
    different = state_folder.differing(tensors, contender.saved[NEWER])
    return Trial(kind, name, WRONG if different else HARMLESS, ", ".join(different[:3]))
