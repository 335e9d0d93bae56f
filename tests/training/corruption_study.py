"""How many damaged checkpoints are noticed: ours, plain torch.distributed.checkpoint's, plain DeepSpeed's.

    python tests/training/corruption_study.py --trials 500

A small model is trained and saved twice by each; then, again and again, the newest checkpoint (or what points to it) is
damaged in a way drawn from a seed, and loaded into an engine whose state is known.
"""

import argparse
import contextlib
import io
import logging
import random
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import damage
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
import state_folder
import tiny_run

from mega_scale.config import RunConfig, save_config
from mega_scale.data import load_tokenizer
from mega_scale.parallel import Engine, ParallelConfig, World
from mega_scale.training.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    Saver,
    choose_checkpoint,
    load_checkpoint,
)
from mega_scale.training.restore import describe_model

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
    found = {f"{kind}/{name}": t.clone() for name, held in state.held.items() for kind, t in held.tensors.items()}
    found |= {f"buffer/{name}": buffer.clone() for name, buffer in state.buffers.items()}
    return found | {f"step/{i}": step.clone() for i, step in enumerate(state.steps)}


def restore(engine: Engine, values: dict[str, Tensor]) -> None:
    """Put a copy back."""
    state = engine.state()
    with torch.no_grad():
        for name, held in state.held.items():
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


def describe(folder: Path) -> None:
    """A real `config.yaml` and `model/`."""
    save_config(RunConfig(), folder / "config.yaml")
    describe_model(folder / "model", tiny_run.tiny_config(**SIZES), load_tokenizer("byte"))


class Ours:
    """A run with two checkpoints, and an engine that holds neither.

    Args:
        folder: an empty one, for all that is written.
        world: of one rank.
        key: to sign with.
    """

    name = "mega_scale"

    def __init__(self, folder: Path, world: World, key: bytes | None = None) -> None:
        self.world, self.key, self._folder = world, key, folder
        self.engine = tiny_run.make_engine(world, {"engine": "fsdp"}, **SIZES)
        self.run = folder / "run"
        saver = Saver(self.run, self.engine, world, describe, CheckpointConfig(asynchronous=False), key)
        self.saved, self.random = {}, {}
        for step in (OLDER, NEWER):
            tiny_run.train(self.engine, world, range(2))
            torch.manual_seed(step)
            (ended,) = saver.save(step, trainer_state(step))
            assert ended.folder is not None, ended.problem
            self.saved[step], self.random[step] = snapshot(self.engine), torch.get_rng_state()
        tiny_run.train(self.engine, world, range(2))
        self.known = snapshot(self.engine)
        torch.manual_seed(99)
        self.known_random = torch.get_rng_state()

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
        lines: list[str] = []
        try:
            chosen = choose_checkpoint(run, self.world, self.key, lines.append)
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
            choose_checkpoint(folder, self.world, self.key, print)
        except CheckpointError:
            return None if self.unchanged() else "state changed"
        return "a damaged checkpoint was taken when it was named"

    def trial(self, draw: random.Random) -> Trial | None:
        """One damage; none where the one drawn changes nothing."""
        run = self.copy()
        newer, older = (run / "checkpoints" / f"step-{step:08d}" for step in (NEWER, OLDER))
        name = draw.choice(damage.files(newer))
        kind = draw.choice([*damage.OF_ONE_FILE, *_OURS])
        names: list[str] | None = [name]
        expected: int | None = OLDER
        before = (newer / name).read_bytes()
        if kind in damage.OF_ONE_FILE:
            damage.OF_ONE_FILE[kind](newer / name, draw)
            if (newer / name).is_file() and (newer / name).read_bytes() == before:
                return None
        elif kind == "link":
            damage.link(newer / name, draw)
        elif kind == "folder of that name":
            damage.make_folder(newer / name, draw)
        elif kind == "manifest edited":
            name = "manifest.json"
            kind, names = f"manifest: {damage.edit_manifest(newer / name, draw)}", [name]
        elif kind == "pointer damaged":
            name, names, expected = "latest", ["latest"], NEWER
            _damage_pointer(newer.parent / "latest", draw)
        elif kind == "stale pointer":
            name, names, expected = "latest", ["latest"], NEWER
            (newer.parent / "latest").write_bytes(damage.STALE)
        elif kind == "folder damaged":
            name = draw.choice(sorted(_FOLDERS))
            names, expected = _FOLDERS[name](newer, older)
        else:
            names = _swap(kind, newer, name, older, draw)
        if names is None:
            return None
        outcome, said = self.resume(run, names, expected)
        if outcome == FOUND and expected == OLDER and newer.is_dir():
            problem = self.refuse(newer)
            outcome, said = (outcome, said) if problem is None else (WRONG, problem)
        return Trial(kind, name, outcome, said)


_OURS = (
    "two files swapped", "file of the older checkpoint", "extra entry", "link", "folder of that name",
    "manifest edited", "manifest edited", "pointer damaged", "stale pointer", "folder damaged",
)  # fmt: skip


def _swap(kind: str, newer: Path, name: str, older: Path, draw: random.Random) -> list[str] | None:
    if kind == "two files swapped":
        return damage.two_swapped(newer, name, draw)
    if kind == "file of the older checkpoint":
        return damage.of_older(newer, name, older)
    return damage.extra(newer, name, draw)


def _damage_pointer(pointer: Path, draw: random.Random) -> None:
    before = pointer.read_bytes()
    while pointer.exists() and pointer.read_bytes() == before:
        kind = draw.choice([*damage.OF_ONE_FILE, "another word", "another word"])
        if kind == "another word":
            pointer.write_bytes(draw.choice(damage.POINTERS))
        else:
            damage.OF_ONE_FILE[kind](pointer, draw)


def _renamed(newer: Path, older: Path) -> tuple[list[str], int | None]:
    newer.rename(newer.with_name("step-00000009"))
    return ["manifest.json"], OLDER


def _unnamed(newer: Path, older: Path) -> tuple[list[str], int | None]:
    newer.rename(newer.with_name("step-6"))
    return ["latest"], OLDER


def _gone(newer: Path, older: Path) -> tuple[list[str], int | None]:
    shutil.rmtree(newer)
    return ["latest"], OLDER


def _older_again(newer: Path, older: Path) -> tuple[list[str], int | None]:
    shutil.rmtree(newer)
    shutil.copytree(older, newer)
    return ["manifest.json"], OLDER


def _exchanged(newer: Path, older: Path) -> tuple[list[str], int | None]:
    aside = newer.with_name("aside")
    newer.rename(aside)
    older.rename(newer)
    aside.rename(older)
    return ["manifest.json"], None


def _tensors_gone(newer: Path, older: Path) -> tuple[list[str], int | None]:
    shutil.rmtree(newer / "state")
    return ["state/"], OLDER


def _a_file(newer: Path, older: Path) -> tuple[list[str], int | None]:
    shutil.rmtree(newer)
    newer.write_text("a file")
    return ["latest"], OLDER


_FOLDERS: dict[str, Callable[[Path, Path], tuple[list[str], int | None]]] = {
    "renamed to another step": _renamed,
    "renamed to no checkpoint's name": _unnamed,
    "deleted": _gone,
    "replaced by the older one": _older_again,
    "exchanged with the older one": _exchanged,
    "its state folder deleted": _tensors_gone,
    "replaced by a file": _a_file,
}


class Dcp:
    """The same tensors, saved by torch.distributed.checkpoint as it comes."""

    name = "DCP"

    def __init__(self, folder: Path, ours: Ours) -> None:
        self.run, self.saved = folder / "run", ours.saved
        for step in (OLDER, NEWER):
            torch.distributed.checkpoint.save(dict(self.saved[step]), checkpoint_id=self.run / f"step-{step:08d}")

    def load(self, run: Path) -> dict[str, Tensor] | None:
        """Tensors of the newest checkpoint; none where nothing was loaded."""
        tensors = {name: torch.full_like(tensor, -7) for name, tensor in self.saved[NEWER].items()}
        torch.distributed.checkpoint.load(tensors, checkpoint_id=run / f"step-{NEWER:08d}")
        return tensors


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
        _damage_pointer(pointer, draw)
    elif kind == "stale pointer":
        name = "latest"
        pointer.write_bytes(damage.STALE)
    elif kind in damage.OF_ONE_FILE:
        before = (newer / name).read_bytes()
        damage.OF_ONE_FILE[kind](newer / name, draw)
        if (newer / name).exists() and (newer / name).read_bytes() == before:
            return None
    elif _swap(kind, newer, name, older, draw) is None:
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


def trials(once: Callable[[random.Random], Trial | None], count: int, seed: int) -> Iterator[Trial]:
    """So many damages that changed something."""
    draw, done = random.Random(seed), 0
    while done < count:
        found = once(draw)
        if found is not None:
            done += 1
            yield found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the lines that DeepSpeed and DCP print at every load."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def study(count: int, seed: int, folder: Path, plain: bool = True) -> dict[str, list[Trial]]:
    """Every contender's trials, by its name.

    Args:
        count: of each.
        seed: of what is damaged.
        folder: an empty one.
        plain: whether DCP and DeepSpeed take part.
    """
    with quiet(), World.start(ParallelConfig(device="cpu")) as world:
        ours = Ours(folder / "ours", world)
        found = {ours.name: list(trials(ours.trial, count, seed))}
        for make in (
            (lambda: Dcp(folder / "dcp", ours), lambda: DeepSpeed(folder / "deepspeed", world)) if plain else ()
        ):
            contender = make()
            place = folder / f"{contender.name}-trials"
            once = lambda draw, contender=contender, place=place: plain_trial(contender, place, draw)  # noqa: E731
            found[contender.name] = list(trials(once, count, seed))
    return found


def table(found: dict[str, list[Trial]]) -> str:
    """Rows of kinds: how many were noticed, how many loaded as something else without an error."""
    lines = ["| damage | " + " | ".join(found) + " |", "| --- |" + " --- |" * len(found)]
    kinds = sorted({trial.kind for of_one in found.values() for trial in of_one})
    kinds = [kind for kind in kinds if not kind.startswith("manifest")] + ["manifest", ""]
    for kind in kinds:
        cells = []
        for of_one in found.values():
            mine = [trial for trial in of_one if trial.kind.startswith(kind)]
            count = Counter(trial.outcome for trial in mine)
            text = f"{count[FOUND]} of {len(mine)} found, {count[WRONG]} loaded wrong, {count[HARMLESS]} unharmed"
            cells.append(text if mine else "")
        lines.append(f"| {kind or 'all'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """The command; exit code 1 where one of our damaged checkpoints was not found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=500, help="of each contender (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="of what is damaged (default: 0)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = study(args.trials, args.seed, Path(folder))
    print(table(found))
    missed = [trial for trial in found[Ours.name] if trial.outcome != FOUND]
    for trial in missed:
        print(f"NOT FOUND: {trial}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
