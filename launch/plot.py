"""Draws the curves of one run, or of several in the same charts, from their metrics.jsonl.

python launch/plot.py runs/debug runs/other --output curves.png
"""

import signal

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # imports take seconds; run_command unblocks it

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mega_scale.files import local_path
from mega_scale.parallel import check_single
from mega_scale.process import run_command
from mega_scale.settings import local_paths, require
from mega_scale.training.reporters import read_charts

# Charts that share a panel, and how its numbers grow.
PANELS = {
    "loss (nats/token)": ("loss/train", "loss/validation"),
    "tokens a second": ("model_throughput/tokens_per_second",),
    "learning rate": ("optimizer/lr",),
    "gradient norm": ("optimizer/grad_norm",),
}
AXES = {"step": "steps", "tokens": "tokens", "hours": "hours since the first report"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. Raises ValueError or OSError for what is refused."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder, or its metrics.jsonl")
    parser.add_argument("--output", type=Path, default=Path("curves.png"), help="picture: png, pdf or svg")
    parser.add_argument("--overwrite", action="store_true", help="replace the picture if there is one")
    parser.add_argument("--x", choices=tuple(AXES), default="step", help="what curves are drawn over (default: step)")
    parser.add_argument("--charts", nargs="+", metavar="CHART", help="one panel each for these, as optimizer/lr")
    args = parser.parse_args(arguments)
    local_paths(args)
    args.runs = [Path(local_path(str(run), "RUN")) for run in args.runs]
    check_single("launch/plot.py", args)
    missing = importlib.util.find_spec("matplotlib") is None
    require(not missing, "launch/plot.py", str(args.output), "it needs matplotlib: pip install matplotlib")
    remedy = "choose a name that ends in .png, .pdf or .svg"
    require(args.output.suffix in (".png", ".pdf", ".svg"), "--output", str(args.output), remedy)
    taken = args.output.exists() and not args.overwrite
    require(not taken, "--output", str(args.output), "it exists: choose another name, or replace it by --overwrite")
    found = {name: read_charts(path) for name, path in _named(args.runs).items()}
    own: dict[str, tuple[str, ...]] = {chart: (chart,) for chart in args.charts or ()}
    drawn = draw(found, own or PANELS, args.x)
    drawn.savefig(args.output, dpi=150)
    print(f"{args.output}: {', '.join(found)}")


def _named(runs: Sequence[Path]) -> dict[str, Path]:
    """Runs by the shortest ends of their paths that tell them apart."""
    folders = [run.parent if run.name == "metrics.jsonl" else run for run in runs]
    for length in range(1, 1 + max(len(folder.absolute().parts) for folder in folders)):
        names = ["/".join(folder.absolute().parts[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            return dict(zip(names, folders, strict=True))
    raise ValueError("a run is given twice: give each of them once")


def draw(runs: dict[str, dict[str, list[dict[str, float]]]], panels: dict[str, tuple[str, ...]], x: str) -> Any:
    """A figure with a panel for each group of charts, in which runs have their colours, and charts their lines."""
    from matplotlib.figure import Figure

    known = sorted({name for charts in runs.values() for name in charts})
    for names in panels.values():
        remedy = f"no run has it, choose among {', '.join(known)}"
        require(any(name in known for name in names) or panels is PANELS, "--charts", names[0], remedy)
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(7.0 * columns, 4.0 * rows), layout="constrained")
    for number, (title, names) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, number + 1)
        for color, (run, charts) in enumerate(runs.items()):
            for name in names:
                points = [point for point in charts.get(name, []) if x in point]
                other = name != names[0]
                axes.plot(
                    [point[x] for point in points], [point["value"] for point in points], color=f"C{color}",
                    linestyle="--" if other else "-", marker="." if other or len(points) < 20 else "",
                    label=f"{run} {name.rpartition('/')[2]}" if len(names) > 1 else run, linewidth=1.2,
                )  # fmt: skip
        axes.set_title(title, loc="left")
        axes.set_xlabel(AXES[x])
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", frameon=False)
    return figure


if __name__ == "__main__":
    run_command(main)
