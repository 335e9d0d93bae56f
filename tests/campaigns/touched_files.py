"""Counts the files and functions of this project that a run of configs/debug.yaml goes through.

    python tests/campaigns/touched_files.py
    python tests/campaigns/touched_files.py --list step parallel.engine=fsdp

A reader who follows one optimizer step has to open the files that it names. The run has one process and three steps:
the second one counts, as the first makes what is made but once, and the last is followed by an evaluation. A save lasts
from `Trainer.save` until all ranks and threads have written it; the line that reports it belongs to the log.
"""

import argparse
import ast
import runpy
import sys
import tempfile
import threading
from collections import defaultdict
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).parents[2]
OWN = (str(ROOT / "mega_scale"), str(ROOT / "launch"))
# At most so many files and functions; an import touches a file, and is no function. A file that only says what its
# folder is for is not counted: there is nothing in it to follow. A start took 40 before there were two model families,
# trackers and a table of the run, a step 95 functions before ops chose their forms by a device that may be another than
# the tensors': both are to come back to that.
BOUNDS = {"start-up": (42, None), "step": (21, 117), "save": (8, None)}
# Code that a reader sees no function in.
NO_FUNCTIONS = ("<module>", "<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>")


class Tracer:
    """Notes which code runs in which phase; the phase follows from the trainer's methods that begin.

    Attributes:
        seen: by phase, the code that ran.
    """

    def __init__(self) -> None:
        self.seen: dict[str, set[CodeType]] = defaultdict(set)
        self._phase, self._steps = "start-up", 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if threading.current_thread().name == "file lock":  # beats by the clock, in whichever phase that is
            return
        if event == "call" and code.co_filename.startswith(OWN) and _has_statements(code.co_filename):
            if code.co_qualname == "Trainer.train_step":
                self._steps += 1
                self._phase = "step" if self._steps == 2 else ""
            elif code.co_qualname == "Trainer.save":
                self._phase = "save"
            elif code.co_qualname == "Trainer.log_saves":  # all is written: the line that says so is the log's
                self._phase = ""
            self.seen[self._phase].add(code)


@cache
def _has_statements(path: str) -> bool:
    """Whether a file holds more than a docstring."""
    return any(not isinstance(node, ast.Expr) for node in ast.parse(Path(path).read_text(encoding="utf-8")).body)


def run(changes: list[str], run_dir: str) -> Tracer:
    """Train three steps in this process, and save."""
    tracer = Tracer()
    sys.argv = ["launch/pretrain.py", "--config", str(ROOT / "configs/debug.yaml"), f"run_dir={run_dir}"]
    sys.argv += ["train.steps=3", "train.sample_every=0", "train.eval_batches=1", "checkpoint.every=0", *changes]
    threading.setprofile(tracer)  # a checkpoint is written by a thread
    sys.setprofile(tracer)
    try:
        runpy.run_path(str(ROOT / "launch/pretrain.py"), run_name="__main__")
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return tracer


def main() -> None:
    """Trace, print; exit code 1 if a phase touches more than it may."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", choices=list(BOUNDS), help="also name the files and functions of a phase")
    parser.add_argument("changes", nargs="*", help="settings of the run, KEY=VALUE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tracer = run(args.changes, folder)
    exceeded = False
    for phase, (most_files, most_functions) in BOUNDS.items():
        functions = defaultdict(set)
        for code in tracer.seen[phase]:
            own = functions[str(Path(code.co_filename).relative_to(ROOT))]
            if code.co_name not in NO_FUNCTIONS:
                own.add(code.co_qualname)
        count = sum(len(names) for names in functions.values())
        exceeded |= len(functions) > most_files or (most_functions is not None and count > most_functions)
        words = f"{count} functions" + ("" if most_functions is None else f" (at most {most_functions})")
        print(f"{phase}: {len(functions)} files (at most {most_files}), {words}")
        if phase == args.list:
            for file, names in sorted(functions.items()):
                print(f"  {file}: {', '.join(sorted(names))}")
    raise SystemExit(exceeded)


if __name__ == "__main__":
    main()
