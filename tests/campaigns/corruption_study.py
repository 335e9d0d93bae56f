"""How many damaged checkpoints are noticed: ours, plain torch.distributed.checkpoint's, plain DeepSpeed's.

    PYTHONPATH=tests/support python tests/campaigns/corruption_study.py --trials 500

The trainer makes a run with two checkpoints on two ranks; the same tensors are saved twice by DCP, and another small
model by DeepSpeed. Then, again and again, the newest checkpoint (or what points to it) is damaged in a way drawn from a
seed, and loaded into an engine whose state is known.
"""

import argparse
import contextlib
import io
import logging
import random
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import damage
from plain_checkpoints import Dcp, DeepSpeed, plain_trial
from verified_run import FOUND, HARMLESS, NEWER, OLDER, WRONG, Ours, Trial

from mega_scale.parallel import ParallelConfig, World

_OURS = (
    "two files swapped", "file of the older checkpoint", "extra entry", "link", "folder of that name",
    "manifest edited", "manifest edited", "pointer damaged", "stale pointer", "folder damaged",
)  # fmt: skip


def trial(ours: Ours, draw: random.Random) -> Trial | None:
    """One damage; none where the one drawn changes nothing."""
    run = ours.copy()
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
        damage.damage_pointer(newer.parent / "latest", draw)
    elif kind == "stale pointer":
        name, names, expected = "latest", ["latest"], NEWER
        (newer.parent / "latest").write_bytes(damage.STALE)
    elif kind == "folder damaged":
        name = draw.choice(sorted(damage.FOLDERS))
        names, older_is_whole = damage.FOLDERS[name](newer, older)
        expected = OLDER if older_is_whole else None
    else:
        names = damage.swap(kind, newer, name, older, draw)
        expected = NEWER if kind == "extra entry" else OLDER  # what nobody reads is named, and voids nothing
    if names is None:
        return None
    outcome, said = ours.resume(run, names, expected)
    if outcome == FOUND and expected == OLDER and newer.is_dir():
        problem = ours.refuse(newer)
        outcome, said = (outcome, said) if problem is None else (WRONG, problem)
    return Trial(kind, name, outcome, said)


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


def study(count: int, seed: int, folder: Path, plain: bool = True, trained: bool = True) -> dict[str, list[Trial]]:
    """Every contender's trials, by its name.

    Args:
        count: of each.
        seed: of what is damaged.
        folder: an empty one.
        plain: whether DCP and DeepSpeed take part.
        trained: whether the real trainer makes our run.
    """
    with quiet(), World.start(ParallelConfig(device="cpu")) as world:
        ours = Ours(folder / "ours", world, trained=trained)
        found = {ours.name: list(trials(partial(trial, ours), count, seed))}
        for make in (
            (lambda: Dcp(folder / "dcp", ours.saved), lambda: DeepSpeed(folder / "deepspeed", world)) if plain else ()
        ):
            with contextlib.closing(make()) as contender:
                place = folder / f"{contender.name}-trials"
                found[contender.name] = list(trials(partial(plain_trial, contender, place), count, seed))
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
