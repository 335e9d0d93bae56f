"""Processes that read steps ahead of the training loop."""

import os
import signal
import threading
from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset


class Feed:
    """Results of a function of the step, computed ahead by worker processes and delivered in order.

    Steps are dealt out in turns. Which worker computes a step changes nothing, so neither does their number.

    Args:
        read: Computes a step; forked workers have a copy of everything that it refers to.
        workers: Number of processes, at least 1.
        prefetch: Steps that each computes ahead.
        pin_memory: Put tensors in page-locked memory.
    """

    def __init__(self, read: Callable[[int], Any], workers: int, prefetch: int, pin_memory: bool) -> None:
        self._steps = _Steps(read)
        self._workers, self._prefetch, self._pin = workers, prefetch, pin_memory
        self._results: Any = None
        self._next = 0

    def take(self, step: int) -> Any:
        """Wait for the result of a step; any but the one after the last starts the workers anew.

        Args:
            step: Steps done before.

        Returns:
            What the function gave.

        Raises:
            ValueError: The function refused the step.
            RuntimeError: The function failed, or a worker ended; says how.
        """
        if self._results is None or step != self._next:
            self.close()
            self._results = self._start(step)
        try:
            found = next(self._results)
        except Exception as error:
            self.close()
            if not (isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")):
                raise
            raise RuntimeError(
                f"a process that reads data ended before step {step} was read: {error}; one that was killed may have "
                "run out of memory, then lower data.workers or data.prefetch; data.workers=0 reads in the run itself"
            ) from error
        self._next = step + 1
        if isinstance(found, ValueError):
            self.close()
            raise found
        return found

    def close(self) -> None:
        """End the workers."""
        if self._results is not None:
            # Torch ends them when nobody refers to them any more, but an error's traceback may.
            self._results._shutdown_workers()
        self._results = None

    def _start(self, step: int) -> Any:
        loader: DataLoader[Any] = DataLoader(
            self._steps,
            batch_size=None,
            sampler=count(step),
            num_workers=self._workers,
            collate_fn=_as_it_is,
            pin_memory=self._pin,
            prefetch_factor=self._prefetch,
            # It draws a seed for its workers, which draw nothing: not from the random state that checkpoints hold.
            generator=torch.Generator(),
            # Forked, they share the mapped files and the tokenizer, and start at once.
            multiprocessing_context="fork",
            worker_init_fn=_leave_signals_to_the_run,
        )
        return iter(loader)


class _Steps(Dataset[Any]):
    """The function, as torch's workers call it."""

    def __init__(self, read: Callable[[int], Any]) -> None:
        self._read = read

    def __getitem__(self, step: int) -> Any:
        try:
            return self._read(step)
        except ValueError as error:  # what is refused is said by the run, in one sentence
            return error


def _as_it_is(found: Any) -> Any:
    return found


def _leave_signals_to_the_run(worker: int) -> None:
    """Survive the signals that the run itself answers: a terminal, launchers and Slurm send them to all of a job.

    A worker that they killed would take the run with it, in the middle of what it does to end well. The run still ends
    its workers by SIGTERM; that one is told from others by its sender.
    """
    for number in signal.valid_signals() - {signal.SIGCHLD, signal.SIGTERM}:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_IGN)
    if callable(signal.getsignal(signal.SIGTERM)):
        # Blocked before the first thread starts, it is blocked in all of them.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_by_parent_only, args=(os.getppid(),), daemon=True).start()


def _end_by_parent_only(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
