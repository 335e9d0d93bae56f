"""What one GPU cannot settle, and two can: stages of `accept --gpus 2`.

Ranks are processes without a launcher, so that each one's exit code is seen.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mega_scale.training.callbacks import Callback

ROOT = Path(__file__).resolve().parents[2]
_LONGEST_S = 60  # from the loss of a rank to the end of the other
_WITHIN = {"bf16": 1e-2, "fp32": 1e-5}  # of one process's losses, relative
_LAYOUTS: dict[str, list[str]] = {
    "one": [],
    "dp": [],
    "zero-3": ["parallel.engine=deepspeed"],
    "copies": ["parallel.dp_replicate=2"],
    "sp": ["parallel.sp=2"],
    "tp": ["parallel.tp=2"],
    "tp, waiting": ["parallel.tp=2", "parallel.tp_overlap=false"],
}


class Contexts(Callback):
    """Writes the devices on which this process has a CUDA context, after all background work of the run."""

    def on_end(self, trainer: Any, stopped: str | None) -> None:
        found = []
        if torch.cuda.is_initialized():
            has_context = torch._C._cuda_hasPrimaryContext  # type: ignore[attr-defined]
            found = [device for device in range(torch.cuda.device_count()) if has_context(device)]
        (trainer.run_dir / f"contexts-{trainer.rank}.json").write_text(json.dumps(found))


class Lost(Callback):
    """Rank 1 sends itself the signal that the run folder is named after, after the third step."""

    def on_step(self, trainer: Any, step: int, result: Any) -> None:
        if step == 3 and trainer.rank == 1:
            (trainer.run_dir / "lost").touch()
            os.kill(os.getpid(), signal.Signals[trainer.run_dir.name.upper()])


def _start(size: int, printed: Path, *keys: str) -> list[subprocess.Popen[bytes]]:
    """The ranks of a run, which print into a file."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, str(ROOT / "launch/pretrain.py"), *keys]
    with printed.open("wb") as file:
        return [
            subprocess.Popen(
                command, stdout=file, stderr=file, env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            )
            for rank in range(size)
        ]


def _keys(device: torch.device, dtype: str, steps: int, run_dir: Path, callback: str) -> list[str]:
    return [
        f"run_dir={run_dir}", f"train.callbacks={__file__}:{callback}", f"train.steps={steps}", f"train.dtype={dtype}",
        "train.log_every=1", "train.eval_every=0", "train.eval_batches=1", "train.sample_every=0",
        "schedule.warmup_steps=2", "schedule.decay=constant", "train.global_batch_size=8", "train.micro_batch_size=4",
        "data.sequence_length=256", "parallel.engine=fsdp", f"parallel.device={device.type}",
    ]  # fmt: skip


def layouts(device: torch.device, say: Any) -> None:
    """Five layouts of two ranks in bf16 and fp32, tp with and without overlap, with self-test: the losses of one
    process; a context a process."""
    steps = 20 if device.type == "cuda" else 3
    problems = []
    for dtype, within in _WITHIN.items():
        losses: dict[str, list[float]] = {}
        for name, more in _LAYOUTS.items():
            with tempfile.TemporaryDirectory() as folder:
                run_dir, printed = Path(folder) / "run", Path(folder) / "printed"
                keys = _keys(device, dtype, steps, run_dir, "Contexts")
                keys += ["parallel.self_test=true", f"checkpoint.every={steps // 2}", *more]
                began = time.perf_counter()
                codes = [rank.wait() for rank in _start(1 if name == "one" else 2, printed, *keys)]
                if any(codes):
                    problems.append(f"{name} in {dtype}: exit codes {codes}\n{printed.read_text()[-1000:]}")
                    continue
                rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
                # Whether collectives travel beside products, or why they are waited for.
                tp = [line.split("|")[-1].strip() for line in printed.read_text().splitlines() if "| tp " in line]
                contexts = [json.loads(path.read_text()) for path in sorted(run_dir.glob("contexts-*.json"))]
            losses[name] = [row["loss"] for row in rows if row["part"] == "train"]
            furthest = max(abs(a / b - 1) for a, b in zip(losses[name], losses.get("one", losses[name]), strict=True))
            seconds = time.perf_counter() - began
            facts = {"from_one": furthest, "loss": losses[name][-1], "contexts": contexts, "seconds": seconds}
            say(layout=name, dtype=dtype, **facts, **({"tp": tp[0]} if tp else {}))
            if furthest > within:
                problems.append(f"{name} in {dtype}: losses are {furthest:.1e} from one process's")
            if any(len(one) > 1 for one in contexts):
                problems.append(f"{name} in {dtype}: ranks have contexts on the devices {contexts}")
    if problems:
        raise ValueError("\n".join(problems))


def lost(device: torch.device, say: Any) -> None:
    """A rank that is killed, then one that is stopped under tensor parallelism: the other names it within a minute."""
    for name, more in {"sigkill": [], "sigstop": ["parallel.tp=2", "parallel.timeout_s=60"]}.items():
        with tempfile.TemporaryDirectory() as folder:
            run_dir, file = Path(folder) / name, Path(folder) / "printed"
            ranks = _start(2, file, *_keys(device, "bf16", 10**6, run_dir, "Lost"), *more)
            try:
                while not (run_dir / "lost").exists() and ranks[0].poll() is None:
                    time.sleep(0.1)
                began = time.perf_counter()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    ranks[0].wait(2 * _LONGEST_S)
                took = time.perf_counter() - began
            finally:
                for rank in ranks:
                    rank.kill()
                    rank.wait()
            printed = file.read_text()
        lines = [line for line in printed.splitlines() if "rank 1" in line]
        say(lost=name, seconds=took, exit=ranks[0].returncode, said=lines[-1:])
        if took > _LONGEST_S or ranks[0].returncode != 75 or not lines:
            raise ValueError(
                f"after {name} of rank 1, rank 0 ended with {ranks[0].returncode} after {took:.0f} s\n{printed[-1000:]}"
            )
