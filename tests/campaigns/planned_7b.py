"""Megalodon 7B on 1,024 ranks: what plans of three layouts take, in both engines; all blocks beside two depths.

Each plan is a process of its own, which follows the first, a middle or the last rank.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path

from mega_scale.config import parse
from mega_scale.parallel.devices import Device
from mega_scale.planner.trace import Cluster, prepare, rehearse

ROOT = Path(__file__).parents[2]
NODES, PER_NODE = 128, 8
LAYOUTS = ("parallel.sp=8", "parallel.dp_replicate=8 parallel.sp=8", "parallel.sp=4 parallel.tp=8")
RANKS = (0, 517, NODES * PER_NODE - 1)
SECONDS = {"fsdp": 60.0, "deepspeed": 180.0}  # of CPU time, imports included
BYTES = 1e9
NEAR = 1e-3  # of all blocks and two numbers of them


def plan(engine: str, layout: str, rank: int, full: bool, changes: list[str]) -> None:
    """Print, as JSON, what a rank holds, sends and does, and what that took."""
    warnings.simplefilter("ignore")
    cluster = Cluster(NODES, PER_NODE, Device.named("h100"), compiled=True)
    words = [
        "--config",
        str(ROOT / "configs/megalodon-7b.yaml"),
        f"parallel.engine={engine}",
        *layout.split(),
        *changes,
    ]
    trace = rehearse(*prepare(parse(words), cluster), cluster, rank, full=full)
    found = {"peak": trace.peak, "evaluation": trace.evaluation, "written": trace.written}
    found["step"] = trace.places["optimizer"]
    for what in ("kernels", "flops"):
        found[what] = sum(sum(phases.values()) for phases in getattr(trace, what).values())
    for what in ("calls", "sent"):
        for phases in getattr(trace, what).values():
            for key, number in phases.items():
                axis = f"{what} of {key.split()[2]}"
                found[axis] = found.get(axis, 0.0) + number
    took = {"cpu": time.process_time(), "bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    print(json.dumps({"found": found, "took": took}))


def start(engine: str, layout: str, rank: int, changes: list[str], full: bool = False) -> dict[str, dict[str, float]]:
    """The same in a process of its own."""
    words = [*changes, "--one", engine, layout, str(rank), *(["full"] if full else [])]
    ended = subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True)
    found: dict[str, dict[str, float]] = json.loads(ended.stdout.splitlines()[-1])
    return found


def _peak(one: dict[str, dict[str, float]]) -> str:
    return f"peak {one['found']['peak'] / 2**30:.3f} GiB, evaluation {one['found']['evaluation'] / 2**30:.3f} GiB"


def main() -> None:
    """Plan; exit code 1 where one takes too long or too much, or disagrees with one of all blocks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", choices=list(SECONDS), action="append", help="one of the two")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="of the run, as optimizer.name=muon")
    args = parser.parse_args()
    if args.one:
        engine, layout, rank, *full = args.one
        plan(engine, layout, int(rank), bool(full), args.changes)
        return
    sound = True
    for engine in args.engine or SECONDS:
        for layout in LAYOUTS:
            print(f"{engine}, {layout.replace('parallel.', '')}", flush=True)
            for rank in RANKS:
                one = start(engine, layout, rank, args.changes)
                cpu, size = one["took"]["cpu"], one["took"]["bytes"]
                within = cpu <= SECONDS[engine] and size <= BYTES
                sound &= within
                much = "" if within else ", TOO MUCH"
                print(f"  rank {rank:4d}: {cpu:6.1f} s of CPU, {size / 1e9:.3f} GB{much} | {_peak(one)}", flush=True)
                if engine == "fsdp" and rank == RANKS[0]:
                    whole = start(engine, layout, rank, args.changes, full=True)
                    keys = one["found"].keys() | whole["found"].keys()
                    apart = {key: one["found"].get(key, 0.0) / whole["found"].get(key, 1e-9) - 1 for key in keys}
                    worst = max(apart, key=lambda key: abs(apart[key]))
                    near = abs(apart[worst]) <= NEAR
                    sound &= near
                    far = "" if near else ", TOO FAR"
                    print(
                        f"  all blocks: {whole['took']['cpu']:6.1f} s of CPU, {whole['took']['bytes'] / 1e9:.3f} GB | "
                        f"{_peak(whole)} | of {len(keys)} figures, most apart: {worst} by {apart[worst]:+.1e}{far}",
                        flush=True,
                    )
    raise SystemExit(not sound)


if __name__ == "__main__":
    main()
