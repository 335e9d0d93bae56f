"""What timings at several lengths show: how fast time grows with length, as a number and as a picture.

Pictures are drawn by matplotlib, which only they need: the extra `plot` installs it.
"""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

_SUFFIXES = (".png", ".svg")


def exponent(times: Mapping[int, float]) -> float:
    """The power of the length that time grows as: slope of log time over log length, by least squares.

    Args:
        times: of at least two lengths, in any unit.
    """
    x, y = [math.log(length) for length in times], [math.log(time) for time in times.values()]
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True))
    return slope / sum((a - x_mean) ** 2 for a in x)


def check_plot(file: str) -> None:
    """Refuse a picture that could not be drawn, before anything is timed for it.

    Args:
        file: its name.

    Raises:
        ValueError: matplotlib is missing, or the name is of no format or folder that there is.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"--plot {file} needs matplotlib, which is not installed: install mega_scale[plot]")
    if Path(file).suffix not in _SUFFIXES:
        raise ValueError(f"--plot {file}: choose a name that ends in {' or '.join(_SUFFIXES)}")
    if not Path(file).absolute().parent.is_dir():
        raise ValueError(f"--plot {file}: there is no such folder")


def plot_costs(file: str, costs: Mapping[str, Mapping[int, Sequence[float]]], title: str) -> None:
    """Draw the time per token against the length, one line a contender, with bars from its least to its greatest.

    Args:
        file: a name that `check_plot` allows.
        costs: by contender and length: median, least and greatest microseconds a token.
        title: above it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5.5), layout="constrained")
    axes = figure.subplots()
    for name, found in costs.items():
        lengths = sorted(found)
        medians = [found[length][0] for length in lengths]
        below = [found[length][0] - found[length][1] for length in lengths]
        above = [found[length][2] - found[length][0] for length in lengths]
        axes.errorbar(lengths, medians, yerr=(below, above), marker="o", capsize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    every = sorted({length for found in costs.values() for length in found})
    axes.set_xticks(every, labels=[f"{length:,}" for length in every])
    axes.set_xlabel("tokens of the sequence")
    axes.set_ylabel("microseconds a token")
    axes.set_title(title, fontsize="medium")
    axes.grid(True, which="both", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(file, dpi=150)
