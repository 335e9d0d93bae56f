"""Kills two-rank runs at random moments, resumes them, and says in a table what came of it.

    PYTHONPATH=tests/support python tests/campaigns/kill_study.py --kills 100          about 20 minutes on two cores

Half of the kills are of all ranks, half of one of them, which the other one has to notice. Most kills wait for a save
and come at a random moment of it, the others at any moment of the run. Fails if anything is not as it should be.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import forks


def main() -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="number of kills, shared by the cells")
    parser.add_argument("--cells", type=int, default=8, help="so many of the ways to run, from the first")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments and victims")
    parser.add_argument("--json", type=Path, help="file for the findings")
    options = parser.parse_args()
    forks.prepare()
    import kills  # noqa: PLC0415  its imports count as the ranks' own
    from launching import write_sources  # noqa: PLC0415

    began = time.monotonic()
    found = []
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        text = write_sources(Path(folder) / "text.jsonl", 20)
        cells = kills.CELLS[: options.cells]
        for number, cell in enumerate(cells):
            share = options.kills // len(cells) + (number < options.kills % len(cells))
            if share:
                found.append(kills.study(cell, share, text, Path(folder) / cell.name, options.seed))
                line = table(found, kills.PHASES).splitlines()[-1]
                print("\n".join([f"{time.monotonic() - began:.0f} s {line}", *found[-1].problems]), flush=True)
    summary = summarize(found)
    print(table(found, kills.PHASES))
    print(json.dumps(summary), f"in {time.monotonic() - began:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(summary))
    return 1 if summary["problems"] else 0


def summarize(found: list) -> dict:
    """All cells together, as plain JSON; `during_a_save` counts kills that found an unfinished checkpoint."""
    kills = [kill for findings in found for kill in findings.kills]
    times = [kill.other_s for kill in kills if kill.other_s is not None]
    return {
        "kills": len(kills),
        "victims": Counter(kill.victims for kill in kills),
        "phases": Counter(kill.phase for kill in kills),
        "during_a_save": sum(kill.phase in ("writing", "committing") for kill in kills),
        "resumes": sum(findings.resumes for findings in found),
        "killed_again_in_start_up": sum(findings.cut for findings in found),
        "steps_lost": sum(kill.lost for kill in kills),
        "most_steps_lost": max((kill.lost for kill in kills), default=0),
        "longest_until_the_other_ended_s": round(max(times, default=0.0), 2),
        "chains": sum(findings.chains for findings in found),
        "bit_equal": sum(findings.equal for findings in found),
        "problems": [problem for findings in found for problem in findings.problems],
    }


def table(found: list, phases: tuple[str, ...]) -> str:
    """One line a cell."""
    heads = ["", "kills", "rank 0", "rank 1", "all", *phases, "resumes", "cut", "lost", "most", "other s", "chains"]
    lines = [[*heads, "bit-equal"]]
    for findings in found:
        figures = summarize([findings])
        lines.append([
            findings.cell.name, figures["kills"], *(figures["victims"][name] for name in ("rank 0", "rank 1", "all")),
            *(figures["phases"][name] for name in phases), figures["resumes"], figures["killed_again_in_start_up"],
            figures["steps_lost"], figures["most_steps_lost"], figures["longest_until_the_other_ended_s"],
            figures["chains"], "yes" if figures["bit_equal"] == figures["chains"] else "NO",
        ])  # fmt: skip
    return "\n".join("| " + " | ".join(str(value) for value in line) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
