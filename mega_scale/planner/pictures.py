"""Two pictures of a plan: memory over one step, and a step's time by part. They need matplotlib."""

import importlib.util
from pathlib import Path
from typing import Any

from mega_scale.planner.times import Memory
from mega_scale.planner.trace import Trace
from mega_scale.settings import require

_POINTS = 4000
_COLORS = {"forward": "C0", "backward": "C1", "recompute": "C2", "optimizer": "C3"}
GIB = 2**30


def draw(path: Path, trace: Trace, memory: Memory, time: dict[str, Any]) -> None:
    """Draw both into one file. Raises ValueError where that is not possible."""
    missing = importlib.util.find_spec("matplotlib") is None
    require(not missing, "--plot", str(path), "it needs matplotlib: pip install 'mega_scale[plot]'")
    remedy = "choose a name that ends in .png, .pdf or .svg"
    require(path.suffix in (".png", ".pdf", ".svg"), "--plot", str(path), remedy)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14.0, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    every = max(1, len(trace.timeline) // _POINTS)
    for phase, color in _COLORS.items():
        places = [at for at, (name, _) in enumerate(trace.timeline) if name == phase][::every]
        heights = [trace.timeline[at][1] / GIB for at in places]
        left.scatter(places, heights, s=3, color=color, label=phase, linewidths=0)
    left.set_title(f"live tensors over one step (peak of all blocks: {memory.peak / GIB:.2f} GiB)", loc="left")
    left.set_xlabel("operators of the blocks that were followed")
    left.set_ylabel("GiB")
    left.legend(fontsize="small", frameon=False, markerscale=3)
    parts = {name: time[name] for name in ("kernels", "exposed", "network", "host")}
    names = {"network": "sharding"}
    right.barh([names.get(name, name) for name in parts], [1e3 * value for value in parts.values()], color="C0")
    right.set_title("a step by part: the slowest of (kernels + exposed), sharding and host counts", loc="left")
    right.set_xlabel("ms")
    right.invert_yaxis()
    figure.savefig(path, dpi=150)
