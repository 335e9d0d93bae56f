"""Muon on the default job: the same losses in every layout, and its validation loss beside AdamW's at the same tokens.

PYTHONPATH=tests/support python tests/campaigns/muon_study.py --steps 200
"""

import argparse
import json
import tempfile
from pathlib import Path

from launching import LAUNCHERS, metrics, start

QUIET = ["train.eval_every=0", "train.sample_every=0", "parallel.self_test=false", "train.log_every=1"]
QUIET += ["train.tensorboard=false", "checkpoint.every=0", "parallel.device=cpu"]
MUON = ["optimizer.name=muon"]
# By name: the launcher, and what differs from the default job.
LAYOUTS = {
    "one": ("python", ["parallel.engine=fsdp"]),
    "fsdp": ("torchrun", ["parallel.engine=fsdp"]),
    "zero-3": ("torchrun", ["parallel.engine=deepspeed"]),
    "tp2": ("torchrun", ["parallel.engine=fsdp", "parallel.tp=2"]),
    "sp2": ("torchrun", ["parallel.engine=fsdp", "parallel.sp=2"]),
}
RATES = (4e-3, 8e-3, 1.6e-2, 3.2e-2)


def run(launcher: str, folder: Path, *changes: str) -> Path:
    """Train; a run that lies there is taken as it is."""
    status = folder / "status.json"
    if not status.is_file() or json.loads(status.read_text())["state"] != "finished":
        code, output = start(LAUNCHERS[launcher], [*QUIET, f"run_dir={folder}", "overwrite=true", *changes], 7200)
        assert code == 0, output[-4000:]
    return folder


def losses_of(folder: Path) -> list[float]:
    return [row["loss"] for _, row in sorted(metrics(folder).items())]


def compare_layouts(folder: Path, steps: int) -> None:
    """Print, for each layout, the largest relative difference of a step's loss from one process's."""
    found = {}
    for name, (launcher, changes) in LAYOUTS.items():
        found[name] = losses_of(run(launcher, folder / name, f"train.steps={steps}", *MUON, *changes))
        assert len(found[name]) == steps, (name, len(found[name]))
        worst = max(abs(a - b) / abs(b) for a, b in zip(found[name], found["one"], strict=True))
        print(f"{name}: loss {found[name][0]:.6f} to {found[name][-1]:.6f}, at most {worst:.1e} from one", flush=True)


def compare_optimizers(folder: Path, steps: int, batch: int) -> None:
    """Print the validation loss of each optimizer at each of its learning rates."""
    for optimizer in ("adamw", "muon"):
        for rate in RATES:
            changes = [f"train.steps={steps}", f"optimizer.name={optimizer}", f"optimizer.lr={rate}"]
            changes += [f"train.global_batch_size={batch}", f"train.micro_batch_size={min(batch, 8)}"]
            changes += [f"schedule.min_lr={rate / 10}", "parallel.engine=fsdp"]
            done = run("python", folder / f"{optimizer}-{rate}", *changes)
            loss = metrics(done, "validation")[steps]["loss"]
            print(f"{optimizer} at {rate:g}: validation loss {loss:.4f}, {steps} steps of {batch} rows", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="of each run")
    parser.add_argument("--batch", type=int, default=16, help="global batch of the runs that compare optimizers")
    parser.add_argument("--folder", type=Path, default=None, help="of runs; those that ended are not done again")
    parser.add_argument("--only", choices=("layouts", "optimizers"), help="half of the study")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="muon-"))
    if args.only != "optimizers":
        compare_layouts(folder, args.steps)
    if args.only != "layouts":
        compare_optimizers(folder, args.steps, args.batch)


if __name__ == "__main__":
    main()
