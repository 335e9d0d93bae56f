"""Processes forked from one that has imported everything: they begin at once, where an interpreter takes six seconds.

What they run is what it would be in an interpreter of its own; that nothing is different there is for the tests that
start real launchers to see.
"""

import gc
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from multiprocessing.context import ForkServerProcess
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What a run imports once it knows its model, its data, its engine and its reporters comes after what it always imports.
IMPORTED = [
    "deepspeed", "launch.pretrain", "mega_scale.training.trainer",
    "mega_scale.model.modeling_mega", "mega_scale.model.modeling_megalodon", "mega_scale.model.cache",
    "mega_scale.data.readers", "mega_scale.training.trained_model", "mega_scale.ops.ema.native",
    "torch.utils.cpp_extension", "mega_scale.parallel.deepspeed", "deepspeed.runtime.engine",
    "deepspeed.module_inject.auto_ep_layer", "deepspeed.runtime.superoffload.superoffload_stage3",
    "torch.utils.tensorboard", "tensorboard.plugins.hparams.api_pb2", "numpy.ma", "torch.profiler._cupti_monitor",
]  # fmt: skip
os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # a fork would lack the thread that pyarrow starts
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(IMPORTED)
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def variables(rank: int, size: int, port: int) -> dict[str, str]:
    """What a launcher tells a rank, in place of what is set here; a size of 0: there is no launcher."""
    own = {name: value for name, value in os.environ.items() if name not in _VARIABLES}
    values = (rank, size, rank, "127.0.0.1", port)
    return own | ({name: str(value) for name, value in zip(_VARIABLES, values, strict=True)} if size else {})


def set_variables(environment: dict[str, str]) -> None:
    """Those of this process become the given ones: a forked process has those of its server.

    Collecting garbage leaves out what the server imported: else it takes 0.3 s each time, and DeepSpeed does it often.
    """
    gc.freeze()
    os.environ.clear()
    os.environ.update(environment)


@cache
def start_server() -> None:
    """Have the process from which others are forked import what it has to, so that nothing else waits for that."""
    process = CONTEXT.Process(target=int)
    process.start()
    process.join()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end(processes: Sequence[ForkServerProcess], timeout_s: float) -> list[int]:
    """Wait until processes have ended; those that have not in time are killed, and their numbers returned."""
    deadline = time.monotonic() + timeout_s
    try:
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
    finally:
        late = [number for number, process in enumerate(processes) if process.is_alive()]
        for number in late:
            processes[number].kill()
            processes[number].join()
    return late


def run_script(
    script: str,
    arguments: Sequence[str],
    ranks: int,
    timeout_s: float,
    environment: dict[str, str] | None = None,
    tasks: Sequence[dict[str, str]] = ({},),
    until: str | None = None,
    folder: Path = ROOT,
) -> tuple[int | None, str]:
    """Run a script of this project as `python SCRIPT ARGUMENTS...` does, or as a launcher does on so many ranks.

    Args:
        script: its path in this project, or a whole one.
        arguments: of the command.
        ranks: 0 for a process without a launcher.
        timeout_s: then the processes are killed.
        environment: more variables.
        tasks: where there are no ranks, variables of each process of its own, as a job scheduler sets them.
        until: text at which all of them get SIGKILL.
        folder: in which they run.

    Returns:
        The first exit code that is not 0, or 0, or none if time ran out; and what all of them printed.
    """
    port = free_port()
    with tempfile.NamedTemporaryFile() as output:
        processes = [
            CONTEXT.Process(
                target=_script,
                args=(
                    script,
                    list(arguments),
                    output.name,
                    variables(rank, ranks, port) | (environment or {}) | own,
                    folder,
                ),
            )
            for rank, own in enumerate([{}] * ranks or tasks)
        ]
        for process in processes:
            process.start()
        while until is not None and not (seen := until in Path(output.name).read_text(errors="replace")):
            if not all(process.is_alive() for process in processes):
                break
            time.sleep(0.002)
        late = end(processes, 0.0 if until is not None and seen else timeout_s)
        codes = [process.exitcode for process in processes]
        text = Path(output.name).read_text(encoding="utf-8", errors="replace")
    return (None if late else next((code for code in codes if code), 0)), text


def _script(script: str, arguments: list[str], output: str, environment: dict[str, str], folder: Path = ROOT) -> None:
    set_variables(environment)
    os.chdir(folder)
    handle = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout.reconfigure(line_buffering=True)
    sys.argv = [script, *arguments]
    runpy.run_path(str(ROOT / script), run_name="__main__")
