"""Every layout of the layout tests, by both engines, with and without recomputation, for all 20 steps of a family.

    PYTHONPATH=tests/support:tests/distributed python tests/campaigns/layout_steps.py --family megalodon

Prints for each run the largest relative difference of a loss and of a gradient norm from those of one process, and ends
with code 1 where one is above 1e-5.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import layout_study
from layout_study import LAYOUTS, MEGALODON, OTHER_MEGALODON, STEPS
from ranks import run_ranks

from mega_scale.parallel import ParallelConfig, World

# Without and with recomputation, and dropout.
FAMILIES: dict[str, list[dict[str, Any]]] = {
    "mega": [{}, layout_study.DROPOUT],
    "megalodon": [MEGALODON, OTHER_MEGALODON],
}
ENGINES = ("fsdp-3", "zero-3")
LIMIT = 1e-5

Numbers = tuple[list[float], list[float]]


def alone(family: str) -> list[Numbers]:
    with World.start(ParallelConfig()) as world:
        return [_run(world, "fsdp-3", changes, 0) for changes in FAMILIES[family]]


def together(family: str, size: int) -> dict[tuple[str, str, int], Numbers]:
    with World.start(ParallelConfig(timeout_s=300)) as ranks:
        return {
            (name, engine, number): _run(layout_study.lay_out(ranks, shape), engine, changes, number)
            for name, shape in LAYOUTS.items()
            if shape.size == size
            for engine in ENGINES
            for number, changes in enumerate(FAMILIES[family])
        }


def _run(world: World, engine: str, changes: dict[str, Any], recomputed: int) -> Numbers:
    made = layout_study.make_engine(world, engine, changes, recomputed)
    found = layout_study.train(made, world, range(STEPS))
    made.close()
    return found


def difference(found: list[float], expected: list[float]) -> float:
    return max(abs(one - other) / abs(other) for one, other in zip(found, expected, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--family", choices=FAMILIES, default="megalodon")
    family, worst = parser.parse_args().family, 0.0
    with tempfile.TemporaryDirectory() as folder:
        [expected] = run_ranks(alone, 1, Path(folder) / "alone", family, launched=False)
        for size in (2, 4):
            ranks = run_ranks(together, size, Path(folder) / str(size), family, size, timeout_s=3600)
            for key in ranks[0]:
                layout, engine, number = key
                differences = [max(difference(rank[key][i], expected[number][i]) for rank in ranks) for i in range(2)]
                worst = max(worst, *differences)
                how = "dropout, recomputed" if number else "plain"
                print(
                    f"{layout:15} {engine} {how:20} losses {differences[0]:.1e} norms {differences[1]:.1e}", flush=True
                )
    print(f"{STEPS} steps, largest difference {worst:.1e}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
