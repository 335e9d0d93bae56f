"""Starts ranks as processes of their own, with a hard limit on their time."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import warm


class RankFailedError(Exception):
    """Some ranks raised, died, or ran out of time; `reports` has their traces."""

    def __init__(self, reports: dict[int, str]) -> None:
        super().__init__("\n".join(f"rank {rank}: {report}" for rank, report in reports.items()))
        self.reports = reports


def run_ranks(
    function: Callable[..., Any], size: int, folder: Path, *args: Any, timeout_s: float = 300, launched: bool = True
) -> list[Any]:
    """Call `function(*args)` on every rank, as a launcher (or none) would start it; returns what the ranks returned."""
    folder.mkdir(parents=True, exist_ok=True)
    port = warm.free_port()
    processes = [
        warm.CONTEXT.Process(
            target=_rank,
            args=(function, rank, folder, args, warm.variables(rank, size if launched else 0, port)),
            daemon=True,
        )
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    late = warm.end(processes, timeout_s)
    reports = {}
    for rank, process in enumerate(processes):
        trace = folder / f"error-{rank}.txt"
        if rank in late:
            reports[rank] = f"still running after {timeout_s} s"
        elif trace.exists():
            reports[rank] = trace.read_text()
        elif process.exitcode != 0:
            reports[rank] = f"exit code {process.exitcode}"
    if reports:
        raise RankFailedError(reports)
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(size)]


def _rank(
    function: Callable[..., Any], rank: int, folder: Path, args: tuple[Any, ...], environment: dict[str, str]
) -> None:
    warm.set_variables(environment)
    torch.set_num_threads(1)
    try:
        torch.save(function(*args), folder / f"result-{rank}.pt")
    except Exception:
        (folder / f"error-{rank}.txt").write_text(traceback.format_exc())
        raise SystemExit(1) from None
