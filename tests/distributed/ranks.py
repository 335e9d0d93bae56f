"""Starts ranks as processes of their own, with a hard limit on their time."""

import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class RankFailedError(Exception):
    """Some ranks raised, died, or ran out of time; `reports` has their traces."""

    def __init__(self, reports: dict[int, str]) -> None:
        super().__init__("\n".join(f"rank {rank}: {report}" for rank, report in reports.items()))
        self.reports = reports


def run_ranks(
    function: Callable[..., Any], size: int, folder: Path, *args: Any, timeout_s: float = 300, launched: bool = True
) -> list[Any]:
    """Call `function(*args)` on every rank, as a launcher (or none) would start it; returns what the ranks returned."""
    context = multiprocessing.get_context("spawn")
    folder.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    processes = [
        context.Process(target=_rank, args=(function, rank, size, port, folder, args, launched), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout_s
    try:
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
    finally:
        late = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
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
    function: Callable[..., Any], rank: int, size: int, port: int, folder: Path, args: tuple[Any, ...], launched: bool
) -> None:
    torch.set_num_threads(1)
    for name in _LAUNCHER:
        os.environ.pop(name, None)
    if launched:
        values = (rank, size, rank, "127.0.0.1", port)
        os.environ.update({name: str(value) for name, value in zip(_LAUNCHER, values, strict=True)})
    try:
        torch.save(function(*args), folder / f"result-{rank}.pt")
    except Exception:
        (folder / f"error-{rank}.txt").write_text(traceback.format_exc())
        raise SystemExit(1) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
