"""A run that is killed again and again at random moments, and what must hold after each kill and at the end."""

import random
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import forks
from launching import TINY
from same_runs import metric_problems, rows, state_problems

from mega_scale.checkpoint.folder import CheckpointError, checkpoints, verify
from mega_scale.process import PEER_LOST

STEPS, KEEP, KILLS_IN_A_CHAIN = 12, 2, 5
TIMEOUT_S = 60
"""parallel.timeout_s: within it the monitor has to end a rank whose peer is dead, and it waits so long for one that was
killed before it came to the meeting, of which nobody knows that it lives."""
LIMIT_S = 180
SHARE_AT_SAVES = 0.6
# 2.6 million parameters: 31 MB of weights and moments.
SETTINGS = [
    *TINY, "model.hidden_size=256", "model.num_hidden_layers=3", "model.intermediate_size=512", "model.vocab_size=260",
    "model.nffn_hidden_size=512", "model.shared_representation_size=128", "model.ema_projection_size=8",
    "data.source=json", "data.validation_fraction=0", "train.global_batch_size=4", "train.micro_batch_size=1",
    f"train.steps={STEPS}", f"checkpoint.keep={KEEP}", f"parallel.timeout_s={TIMEOUT_S}",
]  # fmt: skip
PHASES = ("start-up", "training", "writing", "committing", "deleting")
"""What a run does when it is killed; in a save it is writing, or committing: the manifest is there, the name is not."""
SAVING = ("writing", "committing")


class Cell(NamedTuple):
    """One way to run."""

    engine: str
    stage: int
    asynchronous: bool
    every: int
    workers: int = 0

    @property
    def name(self) -> str:
        """For people and folders."""
        kind = "async" if self.asynchronous else "sync"
        return f"{self.engine}-{self.stage}-{kind}-every-{self.every}" + ("-workers" if self.workers else "")

    def arguments(self, text: Path, run_dir: Path) -> list[str]:
        """Of the command."""
        return [
            *SETTINGS, f"data.path={text}", f"run_dir={run_dir}", f"parallel.engine={self.engine}",
            f"parallel.zero_stage={self.stage}", f"checkpoint.every={self.every}", f"data.workers={self.workers}",
            f"checkpoint.asynchronous={str(self.asynchronous).lower()}",
        ]  # fmt: skip


CELLS = (
    Cell("fsdp", 3, True, 2),
    Cell("deepspeed", 1, True, 3),
    Cell("fsdp", 2, False, 1),
    Cell("deepspeed", 3, False, 2, workers=2),
    Cell("fsdp", 2, True, 1, workers=2),
    Cell("deepspeed", 3, True, 1),
    Cell("fsdp", 3, False, 3),
    Cell("deepspeed", 1, False, 2),
)


class Kill(NamedTuple):
    """One kill and what came of it.

    Args:
        victims: rank 0, rank 1, or all.
        phase: see `PHASES`.
        committed: step of the newest checkpoint afterwards; 0 without one.
        lost: steps that had been done and reported since then.
        other_s: until the rank that was not killed had ended (seconds); None where the two had not met, or both died.
    """

    victims: str
    phase: str
    committed: int
    lost: int
    other_s: float | None


@dataclass
class Findings:
    """What a cell showed.

    Args:
        cell: how it ran.
        kills: all of them.
        resumes: attempts after a kill that said from which step they go on, or start anew.
        cut: attempts after a kill that were killed before they could say so.
        chains: runs that came to their end.
        equal: those of them that equal the uninterrupted run to the bit.
        problems: whatever should not be.
    """

    cell: Cell
    kills: list[Kill] = field(default_factory=list)
    resumes: int = 0
    cut: int = 0
    chains: int = 0
    equal: int = 0
    problems: list[str] = field(default_factory=list)


class Reference(NamedTuple):
    """An uninterrupted run, and its times in seconds: until its first step began, in all, and of one save."""

    run_dir: Path
    start_s: float
    whole_s: float
    save_s: float


def uninterrupted(cell: Cell, text: Path, folder: Path) -> Reference:
    """Run a cell without a kill."""
    run_dir = folder / "whole"
    ranks = forks.start(cell.arguments(text, run_dir), 2, folder / "whole-output")
    begun: list[float] = []
    seen: dict[str, list[float]] = {}

    def look() -> bool:
        now = time.monotonic()
        for name in _unfinished(run_dir):
            seen.setdefault(name, [now, now])[1] = now
        if not begun and "from step" in ranks.text():
            begun.append(now)
        return False

    ranks.wait(LIMIT_S, look)
    if set(ranks.codes.values()) != {0}:
        raise RuntimeError(f"{cell.name} fails without any kill:\n{ranks.text()[-6000:]}")
    saves = sorted(last - first for first, last in seen.values())
    return Reference(
        run_dir, begun[0] - ranks.began, max(ranks.ended.values()) - ranks.began, saves[len(saves) // 2] if saves else 0
    )


def study(cell: Cell, kills: int, text: Path, folder: Path, seed: int) -> Findings:
    """Kill runs of a cell so many times; every chain of kills ends in a run that ends by itself, and is compared.

    A run that fails without a kill, or does not end after one, is a problem that ends the study of its cell.
    """
    found = Findings(cell)
    reference = uninterrupted(cell, text, folder)
    while len(found.kills) < kills:
        run_dir = folder / f"chain-{found.chains}"
        try:
            _chain(found, min(KILLS_IN_A_CHAIN, kills - len(found.kills)), text, run_dir, reference, seed)
        except (RuntimeError, forks.StillRunningError) as error:
            found.problems.append(str(error))
            break
        shutil.rmtree(run_dir)
    return found


def _chain(found: Findings, kills: int, text: Path, run_dir: Path, reference: Reference, seed: int) -> None:
    arguments = found.cell.arguments(text, run_dir)
    after_kill, ended, attempt = False, False, 0
    while not ended:
        committed = _committed(run_dir)
        newest = _step(committed[-1]) if committed else 0
        output = run_dir.parent / f"{run_dir.name}-output"
        ranks = forks.start(
            [*arguments, "--resume=auto"], 2, output, name=f"attempt-{attempt}"
        )  # fmt: skip
        chance = random.Random(f"{seed} {found.cell.name} {found.chains} {attempt}")
        where = f"{found.cell.name} chain {found.chains} attempt {attempt}"
        ended = attempt >= kills or not _kill(found, ranks, run_dir, newest, reference, chance, where)
        if ended:
            ranks.wait(LIMIT_S)
        left = forks.survivors()
        found.problems += [f"{where}: still ran: {name}" for name in left]
        if after_kill:
            _check_resume(found, ranks.text(), newest, where)
        if ended and set(ranks.codes.values()) != {0}:
            raise RuntimeError(f"{where}: it failed without a kill:\n{ranks.text()[-6000:]}")
        after_kill, attempt = True, attempt + 1
    final = f"checkpoints/step-{STEPS:08d}"
    differ = metric_problems(reference.run_dir, run_dir, STEPS)
    differ += state_problems(reference.run_dir / final, run_dir / final)
    found.problems += [f"{found.cell.name} chain {found.chains}: at the end {text}" for text in differ[:4]]
    found.chains, found.equal = found.chains + 1, found.equal + (not differ)


def _kill(
    found: Findings, ranks: forks.Ranks, run_dir: Path, newest: int, times: Reference, chance: random.Random, where: str
) -> bool:
    """Kill a run at a random moment, and check what it left; false where it ended before."""
    if not _wait_for_moment(ranks, run_dir, newest, times, chance):
        return False
    victims = chance.choice([[0], [1], [0, 1], [0, 1]])
    before = _committed(run_dir)
    phase = _phase(ranks, run_dir)
    if len(ranks.running()) < 2:
        return False
    ranks.kill(victims)
    killed = time.monotonic()
    ranks.wait(TIMEOUT_S + 20)
    others = [rank for rank in (0, 1) if rank not in victims]
    other_s = max(ranks.ended[rank] - killed for rank in others) if others else None
    if "did not come to" in ranks.text():
        other_s = None  # ranks.wait has said that it ended in time
    for rank in others:
        if ranks.codes[rank] not in (PEER_LOST, 0):
            found.problems.append(f"{where}: rank {rank} ended with {ranks.codes[rank]}:\n{ranks.text()[-1500:]}")
    after = _committed(run_dir)
    kept = {path.name for path in after[-KEEP:]}
    for path in before:
        if not path.exists() and len(kept) < KEEP:
            found.problems.append(f"{where}, {phase}: {path.name} is gone, and only {sorted(kept)} are left")
    for path in after:
        try:
            verify(path)
        except CheckpointError as error:
            found.problems.append(f"{where}, {phase}: {error}")
    step = _step(after[-1]) if after else 0
    if before and step < _step(before[-1]):
        found.problems.append(f"{where}, {phase}: {before[-1].name} was the newest, now it is step {step}")
    found.problems += [f"{where}, {phase}: {text}" for text in metric_problems(times.run_dir, run_dir, step)[:4]]
    done = max((row["step"] for row in rows(run_dir)), default=0)
    kind = "all" if len(victims) == 2 else f"rank {victims[0]}"
    found.kills.append(Kill(kind, phase, step, max(done - step, 0), other_s))
    return True


def _wait_for_moment(ranks: forks.Ranks, run_dir: Path, newest: int, times: Reference, chance: random.Random) -> bool:
    """Any moment of what the run has left to do, or one in one of its next saves; false where it ended before."""
    if chance.random() > SHARE_AT_SAVES:
        left = times.start_s + (times.whole_s - times.start_s) * (STEPS - newest) / STEPS
        delay = chance.uniform(0, left)
        return ranks.wait(LIMIT_S, lambda: time.monotonic() - ranks.began > delay)
    number, delay = chance.randint(1, 2), chance.uniform(0, times.save_s)
    seen: dict[str, float] = {}

    def in_save() -> bool:
        nonlocal number, delay
        there = _unfinished(run_dir) if seen or _has_stepped(ranks) else []  # before, an earlier kill's may lie there
        for name in there:
            seen.setdefault(name, time.monotonic())
        if len(seen) < number:
            return False
        name, began = list(seen.items())[number - 1]
        if name not in there:  # it was shorter than that: the next one
            number, delay = len(seen) + 1, chance.uniform(0, times.save_s)
            return False
        return time.monotonic() - began >= delay

    return ranks.wait(LIMIT_S, in_save)


def _phase(ranks: forks.Ranks, run_dir: Path) -> str:
    if not _has_stepped(ranks):
        return "start-up"
    folders = [run_dir / "checkpoints" / name for name in _unfinished(run_dir)]
    if folders:
        return "committing" if (folders[0] / "manifest.json").exists() else "writing"
    committed = _committed(run_dir)
    if len(committed) > KEEP or list(run_dir.glob("checkpoints/*.deleted")):
        return "deleting"
    return "training"


def _check_resume(found: Findings, text: str, newest: int, where: str) -> None:
    said = re.search(r"from step (\d+) of", text)
    if said is None:
        found.cut += 1
        return
    found.resumes += 1
    if int(said[1]) != newest:
        found.problems.append(f"{where}: it went on from step {said[1]}, not from {newest}")
    if "is no valid checkpoint" in text:
        found.problems.append(f"{where}: it met a checkpoint that is not valid:\n{text[-1500:]}")


def _has_stepped(ranks: forks.Ranks) -> bool:
    return re.search(rf"^step +\d+/{STEPS} ", ranks.text(), re.MULTILINE) is not None


def _unfinished(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.glob("checkpoints/step-*.unfinished"))


def _committed(run_dir: Path) -> list[Path]:
    return sorted(checkpoints(run_dir), key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
