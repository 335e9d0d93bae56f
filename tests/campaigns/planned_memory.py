"""Plans beside real ranks: the peak of live tensors and every collective, in 14 runs of two ranks and nine layouts.

Real ranks are processes over gloo, whose tensors a meter counts; a plan follows the same run on tensors without memory.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "planner"))

import layout_study
import planned_study
from ranks import run_ranks

LAYOUT_SIZES = planned_study.SIZES.replace("global_batch_size=4", "global_batch_size=8")


def layout_cases() -> dict[str, str]:
    """The nine layouts of the layout tests, with and without recomputation, in both engines by turns."""
    found = {}
    for number, (name, shape) in enumerate(layout_study.LAYOUTS.items()):
        axes = " ".join(f"parallel.{axis}={size}" for axis, size in shape._asdict().items())
        engine = ("fsdp", "deepspeed")[number % 2]
        for every in (0, 1):
            key = f"{name} {engine}{', recomputed' if every else ''}"
            found[key] = f"parallel.engine={engine} parallel.activation_checkpoint={every} {axes}"
    return found


def compare(cases: dict[str, str], sizes: str, ranks: int) -> bool:
    """Print each case, of the last rank; whether all are within a percent, and send the same."""
    with tempfile.TemporaryDirectory() as folder:
        real = run_ranks(planned_study.real, ranks, Path(folder), cases, sizes, timeout_s=1800)
    sound = True
    for case, words in cases.items():
        began = time.process_time()
        found: dict[str, Any] = real[-1][case]
        planned = asdict(planned_study.planned(words, ranks - 1, sizes, ranks))
        share = planned["peak"] / found["peak"]
        same = all(planned[what] == _of_steps(found[what]) for what in ("calls", "sent"))
        calls = round(sum(sum(part.values()) for part in found["calls"].values()))
        print(
            f"{case:<34} | peak {found['peak'] / 2**20:9.3f} MiB, planned {share:.4f} of it | {calls:4d} collectives "
            f"{'the same' if same else 'DIFFER'} | {time.process_time() - began:.1f} s",
            flush=True,
        )
        sound &= same and abs(share - 1) < 0.01
    return sound


def _of_steps(table: dict[str, Any]) -> dict[str, Any]:
    """Without DeepSpeed's comparison of ranks, once a run."""
    return {part: {key: n for key, n in own.items() if "broadcast" not in key} for part, own in table.items()}


def main() -> None:
    """Compare; exit code 1 where a plan is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=["memory", "layouts"], help="one of the two parts")
    args = parser.parse_args()
    sound = True
    if args.only != "layouts":
        sound &= compare(planned_study.CASES, planned_study.SIZES, 2)
    if args.only != "memory":
        for ranks in (2, 4):
            cases = layout_cases().items()
            own = {name: words for name, words in cases if layout_study.LAYOUTS[name.split()[0]].size == ranks}
            sound &= compare(own, LAYOUT_SIZES, ranks)
    raise SystemExit(not sound)


if __name__ == "__main__":
    main()
