"""Where time and memory go: traces of chosen steps, snapshots of a GPU's memory, and a report when it runs out."""

import contextlib
import gc
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

from mega_scale.files import reason, replace_text
from mega_scale.parallel import Engine
from mega_scale.training.config import ProfileConfig
from mega_scale.training.metrics import Throughput
from mega_scale.training.stopping import OutOfMemory

if TYPE_CHECKING:
    from mega_scale.training.trainer import Trainer

_HISTORY = 100_000  # allocations that a snapshot remembers
_LARGEST = 20  # tensors in a report


class Profiler:
    """Traces the steps that the settings name, on the ranks that they name; in all other steps it does nothing."""

    def __init__(
        self,
        run_dir: Path,
        config: ProfileConfig,
        rank: int,
        device: torch.device,
        log: Callable[[str], None],
        throughput: Throughput | None = None,
    ) -> None:
        self._config, self._rank, self._device, self._log = config, rank, device, log
        self._first, self._last = config.steps or (0, 0)
        self._folder = run_dir / "profile" / f"steps-{self._first}-{self._last}"
        self._trace: Any = None
        self._throughput = throughput  # leaves out the time of writing

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Trace an optimizer step if it is to be traced; the last one writes the files."""
        if not self._first <= step <= self._last or not self._first:
            yield
            return
        if self._rank in self._config.ranks:
            if self._trace is None:
                self._start()
            with torch.profiler.record_function(f"ProfilerStep#{step}"):  # by which viewers know steps
                yield
        else:
            yield
        if step == self._last:
            began = time.perf_counter()
            self._write(step)
            if self._throughput is not None:
                self._throughput.since += time.perf_counter() - began

    def _start(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # lines of its own about starting and stopping
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_HISTORY)
        self._trace = torch.profiler.profile(activities=activities, record_shapes=True)
        self._trace.start()

    def finish(self, step: int) -> None:
        """Write what was traced of a run that ends before the last step to trace."""
        if self._trace is not None:
            self._write(step)

    def _write(self, step: int) -> None:
        """Write what was traced; the run goes on where that fails."""
        if self._trace is not None:
            trace, self._trace = self._trace, None
            trace.stop()
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                trace.export_chrome_trace(str(path := _free(self._folder / f"rank-{self._rank}.json")))
                if self._device.type == "cuda":
                    torch.cuda.memory._dump_snapshot(str(path.with_suffix(".memory.pickle")))
                    torch.cuda.memory._record_memory_history(enabled=None)
            except (OSError, RuntimeError) as error:
                self._log(f"step {step} | the profile of rank {self._rank} is not written: {reason(error)}")
                return
        shown = "https://ui.perfetto.dev shows them"
        if self._device.type == "cuda":
            shown += ", https://pytorch.org/memory_viz the memory"
        ranks = ", ".join(map(str, self._config.ranks))
        steps = f"steps {self._first} to {min(step, self._last)}"
        self._log(f"step {step} | traces of {steps}, ranks {ranks}: {self._folder}; {shown}")


def _free(path: Path) -> Path:
    """A name that no file has: the path, or one with a number."""
    numbered = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(2, 1000))
    return next((name for name in (path, *numbered) if not name.exists()), path)


# Memory that runs out


def ran_out(error: BaseException) -> bool:
    """Whether an error says that a GPU, or this machine, has no memory left."""
    on_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or on_cpu


def held_bytes(engine: Engine | None, device: torch.device) -> dict[str, int]:
    """What this rank's memory holds, bytes: weights, gradients and moments, all else, and what is held in reserve."""
    found: dict[str, int] = {}
    seen: set[int] = set()
    for name, tensors in (engine.held_tensors() if engine is not None else {}).items():
        found[name] = sum(_storage_bytes(tensor, seen) for tensor in tensors)
    if device.type == "cuda":
        used = torch.cuda.memory_allocated(device)
        found["activations and others"] = max(used - sum(found.values()), 0)
        found["reserved, not in use"] = torch.cuda.memory_reserved(device) - used
    else:
        used = psutil.Process().memory_info().rss
        found["activations and others"] = max(used - sum(found.values()), 0)
    return found


def _storage_bytes(tensor: Tensor, seen: set[int]) -> int:
    """Bytes of a tensor's memory, unless another one of that memory was counted."""
    tensor = getattr(tensor, "_local_tensor", tensor)  # a DTensor's part
    storage = tensor.untyped_storage()
    if storage.data_ptr() in seen or not storage.data_ptr():
        return 0
    seen.add(storage.data_ptr())
    return storage.nbytes()


def remedies(config: Any, held: dict[str, int], ranks: int) -> list[str]:
    """Settings that lower what holds most of the memory, cheapest first; `config` is the run's."""
    train, parallel, found = config.train, config.parallel, []
    state = sum(held.get(name, 0) for name in ("weights", "gradients", "moments"))
    if held.get("reserved, not in use", 0) > held["activations and others"]:
        found.append("PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment")
    activations, states = [], []
    if train.micro_batch_size > 1:
        activations.append(f"train.micro_batch_size={train.micro_batch_size // 2}")
    if not parallel.activation_checkpoint:
        activations.append("parallel.activation_checkpoint=1")
    elif not parallel.activation_checkpoint_segment:
        activations.append("parallel.activation_checkpoint_segment")
    if train.dtype == "fp32":
        activations.append("train.dtype=bf16")
    activations.append(f"parallel.sp={2 * parallel.sp}")
    if parallel.zero_stage < 3 and ranks > 1:
        states.append("parallel.zero_stage=3")
    states += [f"parallel.tp={2 * parallel.tp}", "more ranks"]
    both = (states, activations) if state > held["activations and others"] else (activations, states)
    return [*found, *both[0], *both[1]]


@contextlib.contextmanager
def explain_out_of_memory(trainer: "Trainer") -> Iterator[None]:
    """Turn an error of memory that runs out into `OutOfMemory`, after a report is written into the run folder."""
    try:
        yield
    except Exception as error:
        if not ran_out(error):
            raise
        step, rank, device = trainer.watchdog.step, trainer.rank, trainer.world.device
        held = held_bytes(getattr(trainer, "engine", None), device)  # none where it is being built
        snapshot = _write_report(trainer.run_dir, rank, step, device, held, error)
        parts = ", ".join(f"{name} {count / 2**30:.2f} GiB" for name, count in held.items())
        asked = " ".join(str(error).split()).partition(". GPU")[0][:200] or "no memory is left"
        line = (
            f"rank {rank} ran out of memory in step {step} ({asked}); it held {parts}; to lower it, in this order: "
            f"{', '.join(remedies(trainer.config, held, trainer.world.size))}; {snapshot}"
        )
        raise OutOfMemory(line) from None


def _write_report(
    run_dir: Path, rank: int, step: int, device: torch.device, held: dict[str, int], error: Exception
) -> str:
    """Write what there is to say of the memory; returns where it is, in words."""
    path = run_dir / "profile" / f"out-of-memory-rank-{rank}.json"
    largest = sorted(_live_tensors(), key=lambda tensor: -tensor.nbytes)[:_LARGEST]
    tensors = [{"shape": list(t.shape), "dtype": str(t.dtype), "bytes": t.nbytes} for t in largest]
    report = {"step": step, "rank": rank, "error": str(error), "held_bytes": held, "largest_tensors": tensors}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path = _free(path)
        replace_text(path, json.dumps(report, indent=1) + "\n")
        if device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(path.with_suffix(".memory.pickle")))
            return f"{path} and {path.stem}.memory.pickle (https://pytorch.org/memory_viz) say more"
    except (OSError, RuntimeError) as problem:
        return f"no report is written: {reason(problem)}"
    return f"{path} says more"


def _live_tensors() -> Iterable[Tensor]:
    return (found for found in gc.get_objects() if type(found) in (Tensor, torch.nn.Parameter))
