"""Ranks forked from one process that has imported everything: they start in a second, where a launcher takes fifteen.

They run the real main() of launch/pretrain.py, with the variables that a launcher sets. What warm.py forks is
like them, but here the process that forks is the ranks' own parent, which sees within milliseconds that one ended. It
must itself have no threads and no process group, so studies that use this are commands of their own, not tests that
pytest runs in its process. It is also the one to which orphans of its ranks come, so that nothing they start is lost
sight of.
"""

import ctypes
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import warm

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LOOK_S = 0.002
ORPHANS_S = 15
"""Time within which processes that a killed rank started, such as those that read data, notice it (seconds)."""


class StillRunningError(Exception):
    """Ranks did not end in time, and were killed."""


def prepare() -> None:
    """Import all that ranks need, and become the parent of their orphans; call it once, before anything else.

    Raises:
        RuntimeError: an import started threads, which a fork would not have.
    """
    os.environ.update(SETTINGS)
    sys.path.insert(0, str(ROOT))
    for name in warm.IMPORTED:
        importlib.import_module(name)
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise RuntimeError(f"{threads} threads run after the imports: ranks that are forked now would lack them")
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class Ranks:
    """The ranks of one run, started by `start`.

    Args:
        pids: by rank.
        output: files with what each rank prints.
    """

    def __init__(self, pids: list[int], output: list[Path]) -> None:
        self.pids, self._output = pids, output
        self.began = time.monotonic()
        self.codes: dict[int, int] = {}
        self.ended: dict[int, float] = {}

    def running(self) -> list[int]:
        """Ranks that have not ended; takes note of how and when the others did."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.codes[rank], self.ended[rank] = os.waitstatus_to_exitcode(status), time.monotonic()
        return [rank for rank in range(len(self.pids)) if rank not in self.codes]

    def kill(self, ranks: Iterable[int]) -> None:
        """Send SIGKILL."""
        for rank in ranks:
            if rank not in self.codes:  # not waited for, so the number is still its own
                os.kill(self.pids[rank], signal.SIGKILL)

    def wait(self, limit_s: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Wait until all ranks have ended, or something else is so.

        Args:
            limit_s: after so many seconds they are killed.
            until: looked at every few milliseconds.

        Returns:
            Whether it was `until`.

        Raises:
            StillRunningError: they did not end.
        """
        deadline = time.monotonic() + limit_s
        while running := self.running():
            if until():
                return True
            if time.monotonic() > deadline:
                self.kill(running)
                self.wait(10)
                raise StillRunningError(f"ranks {running} still run after {limit_s:.0f} s:\n{self.text()[-3000:]}")
            time.sleep(_LOOK_S)
        return False

    def text(self) -> str:
        """What all ranks have printed so far, one after the other."""
        return "\n".join(path.read_text(errors="replace") for path in self._output)


def start(
    arguments: Sequence[str], size: int, folder: Path, before: Callable[[int], None] | None = None, name: str = "out"
) -> Ranks:
    """Start `launch/pretrain.py` with a command line on some ranks, at a fresh port.

    Args:
        arguments: of the command.
        size: number of ranks.
        folder: for their output.
        before: is called in each rank before main(), with its number.
        name: of the files of output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = warm.free_port()
    output = [folder / f"{name}-{rank}.txt" for rank in range(size)]
    for path in output:
        path.write_text("")
    sys.stdout.flush()
    sys.stderr.flush()
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            _run(list(arguments), rank, size, port, output[rank], before)
        pids.append(pid)
    return Ranks(pids, output)


def survivors(limit_s: float = ORPHANS_S) -> list[str]:
    """Command names of processes that ranks started and that still run after a while; they are killed then.

    Call it when all ranks have ended.
    """
    deadline = time.monotonic() + limit_s
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return []
        if time.monotonic() > deadline:
            pids = [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
            names = [Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode() for pid in pids]
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            return names
        time.sleep(_LOOK_S)


def _run(
    arguments: list[str], rank: int, size: int, port: int, output: Path, before: Callable[[int], None] | None
) -> None:
    """The life of a rank; does not return."""
    code = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        handle = os.open(output, os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        warm.set_variables(warm.variables(rank, size, port))
        if before is not None:
            before(rank)
        importlib.import_module("launch.pretrain").main(arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
