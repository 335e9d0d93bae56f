"""A run with two checkpoints, made by the trainer on two ranks or here on one, and an engine to load them into."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import launching
import state_folder
import tiny_run
import torch
from torch import Tensor

from mega_scale.checkpoint.folder import CheckpointConfig, CheckpointError, find_checkpoint
from mega_scale.checkpoint.saver import Saver, describe_model
from mega_scale.checkpoint.state import load_checkpoint
from mega_scale.config import RunConfig, load_config, model_config
from mega_scale.data import load_tokenizer
from mega_scale.parallel import Engine, EngineConfig, ParallelConfig, World, parallelize, seeded_values
from mega_scale.settings import to_yaml

OLDER, NEWER = 3, 6
# Large enough that most bytes of every checkpoint are numbers of the model.
SIZES = {"hidden_size": 64, "intermediate_size": 96, "nffn_hidden_size": 96, "num_hidden_layers": 2}
_FOLDER_NAMES = (f"step-{NEWER:08d}", "step-00000009")  # the second where the folder was renamed
FOUND, WRONG, HARMLESS = "found", "wrong", "harmless"


class Trial(NamedTuple):
    """One damage, and what came of loading.

    Args:
        kind: of damage.
        file: what was damaged.
        outcome: found, wrong (loaded without an error, and not what was saved) or harmless.
        said: lines or error, or what went wrong.
    """

    kind: str
    file: str
    outcome: str
    said: str


def snapshot(engine: Engine) -> dict[str, Tensor]:
    """A copy of all that an engine's state consists of."""
    state = engine.state()
    found = {f"{kind}/{name}": t.clone() for name, held in state.tensors.items() for kind, t in held.tensors.items()}
    found |= {f"buffer/{name}": buffer.clone() for name, buffer in state.buffers.items()}
    return found | {f"step/{i}": step.clone() for i, step in enumerate(state.steps)}


def restore(engine: Engine, values: dict[str, Tensor]) -> None:
    """Put a copy back."""
    state = engine.state()
    with torch.no_grad():
        for name, held in state.tensors.items():
            for kind, tensor in held.tensors.items():
                tensor.copy_(values[f"{kind}/{name}"])
        for name, buffer in state.buffers.items():
            buffer.copy_(values[f"buffer/{name}"])
        for i, step in enumerate(state.steps):
            step.copy_(values[f"step/{i}"])


def trainer_state(step: int) -> dict[str, Any]:
    """What a run's trainer.json holds."""
    data = {"step": step, "seed": 1, "shuffle": True, "fingerprint": "0" * 32}
    return {"step": step, "tokens": 1000 * step, "data": data, "layout": {"engine": "fsdp", "world_size": 1}}


def described() -> dict[str, bytes]:
    """A real `config.yaml` and `model/`."""
    model = describe_model(tiny_run.tiny_config(**SIZES), load_tokenizer("byte"))
    return {"config.yaml": to_yaml(RunConfig()).encode(), **model}


def train_two_ranks(run: Path, *changes: str) -> str:
    """The real trainer on two ranks, with two checkpoints, the second at its end; returns its output."""
    settings = [f"run_dir={run}", f"train.steps={NEWER}", f"checkpoint.every={OLDER}", "parallel.engine=fsdp"]
    code, output = launching.start(launching.LAUNCHERS["two forked"], [*launching.TINY, *settings, *changes])
    assert code == 0, output[-6000:]
    return output


def engine_of(run: Path, world: World) -> Engine:
    """An engine of one rank for a run's model."""
    config = load_config(run / "config.yaml")
    model = model_config(config.model, load_tokenizer(config.data.tokenizer))
    return parallelize(
        tiny_run.meta_model(model),
        seeded_values(model, 1),
        EngineConfig(ParallelConfig(engine="fsdp")),
        world,
        tiny_run.build_optimizer,
    )


class Ours:
    """A run with two checkpoints, and an engine that holds neither.

    Args:
        folder: an empty one, for all that is written.
        world: of one rank.
        key: to sign with, if the run is made here.
        trained: whether the real trainer makes the run.
    """

    name = "mega_scale"

    def __init__(self, folder: Path, world: World, key: bytes | None = None, trained: bool = False) -> None:
        self.world, self.key, self._folder = world, key, folder
        self.run = folder / "run"
        self.saved: dict[int, dict[str, Tensor]] = {}
        self.random: dict[int, Tensor] = {}
        if trained:
            train_two_ranks(self.run)
            self._load(self.run)
        else:
            self._train()
        self.known = {name: tensor + 1 for name, tensor in self.saved[NEWER].items()}
        torch.manual_seed(99)
        self.known_random = torch.get_rng_state()

    def _train(self) -> None:
        self.engine = tiny_run.make_engine(self.world, {"engine": "fsdp"}, **SIZES)
        saver = Saver(self.run, self.engine, self.world, described(), CheckpointConfig(asynchronous=False), self.key)
        for step in (OLDER, NEWER):
            tiny_run.train(self.engine, self.world, range(2))
            torch.manual_seed(step)
            (ended,) = saver.save(step, trainer_state(step))
            assert ended.folder is not None, ended.problem
            self._note(step)

    def _load(self, run: Path) -> None:
        self.engine = engine_of(run, self.world)
        for step in (OLDER, NEWER):
            folder, _ = find_checkpoint(run / "checkpoints" / f"step-{step:08d}", world=self.world)
            load_checkpoint(folder, self.engine, self.world)
            self._note(step)

    def _note(self, step: int) -> None:
        self.saved[step], self.random[step] = snapshot(self.engine), torch.get_rng_state()

    def copy(self) -> Path:
        """A run folder to damage; the copy before is gone."""
        target = self._folder / "copy"
        shutil.rmtree(target, ignore_errors=True)
        for path in self._folder.glob("elsewhere-*"):
            path.unlink()
        shutil.copytree(self.run, target / "run")
        return target / "run"

    def unchanged(self) -> bool:
        """Whether engine and random state are as they were before anything was loaded."""
        same = not state_folder.differing(snapshot(self.engine), self.known)
        return same and torch.equal(torch.get_rng_state(), self.known_random)

    def forget(self) -> None:
        """Bring engine and random state back there."""
        restore(self.engine, self.known)
        torch.set_rng_state(self.known_random)

    def holds(self, step: int) -> bool:
        """Whether engine and random state are those of a checkpoint, bit for bit."""
        same = not state_folder.differing(snapshot(self.engine), self.saved[step])
        return same and torch.equal(torch.get_rng_state(), self.random[step])

    def resume(self, run: Path, names: list[str], expected: int | None) -> tuple[str, str]:
        """Go on from a damaged run as the trainer does.

        Args:
            run: its folder.
            names: what the lines have to name, one of them.
            expected: step of the checkpoint that is to be taken; none where every one is damaged.

        Returns:
            Outcome, and what was said or what went wrong.
        """
        self.forget()
        try:
            chosen, lines = find_checkpoint(run, self.key, world=self.world)
        except CheckpointError as error:
            said = str(error)
            right = expected is None and any(name in said for name in names) and self.unchanged()
            return (FOUND if right else WRONG), said
        said = "; ".join(lines)
        if not self.unchanged():
            return WRONG, f"state changed before anything was proven: {said}"
        load_checkpoint(chosen, self.engine, self.world)
        if expected is None or not self.holds(expected) or chosen.name != f"step-{expected:08d}":
            return WRONG, f"loaded {chosen.name}: {said}"
        if not any(name in said for name in names) or not any(name in said for name in _FOLDER_NAMES):
            return WRONG, f"nothing names {names}: {said}"
        return FOUND, said

    def refuse(self, folder: Path) -> str | None:
        """Have the damaged checkpoint itself refused; returns what was wrong with that."""
        self.forget()
        try:
            find_checkpoint(folder, self.key, world=self.world)
        except CheckpointError:
            return None if self.unchanged() else "state changed"
        return "a damaged checkpoint was taken when it was named"
