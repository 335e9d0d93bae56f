"""launch/pretrain.py with faults: what FAULTS lists as JSON happens to it at certain places, on certain ranks.

Each fault has `at` (import, data, forward, evaluate, token, save, write), `rank`, `do` (a signal's or an error's name,
nan, sleep, lock, run), and perhaps `steps` (steps of data, counted from 0; of a write, the checkpoint's) and `times`.

Where HEARD names a folder, every rank leaves a file there: when it heard its first signal, in which phase, when it
ended, and how long each phase took at most.
"""

import ctypes
import errno
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

FAULTS = json.loads(os.environ["FAULTS"])
RANK = int(os.environ.get("RANK", "0"))
now = {"data": -1}
heard = {"at": None, "phase": "", "ended": None, "longest": {}}


def meet(at, step=None):
    """Do what is to be done here; says whether a number is to become NaN."""
    nan = False
    for fault in FAULTS:
        if (
            fault["at"] != at
            or fault["rank"] not in (RANK, "all")
            or (now["data"] if step is None else step) not in fault.get("steps", [now["data"], step])
        ):
            continue
        if fault.setdefault("times", 10**9) == 0:
            continue
        fault["times"] -= 1
        if fault["do"] == "nan":
            nan = True
        elif fault["do"] == "sleep":
            time.sleep(fault.get("seconds", 600))
        elif fault["do"] == "lock":
            ctypes.PyDLL(None).sleep(600)  # keeps the interpreter's lock
        elif fault["do"] == "run":
            subprocess.run(["sh", "-c", fault["command"]], check=True)
        elif hasattr(errno, fault["do"]):
            number = getattr(errno, fault["do"])
            raise OSError(number, os.strerror(number), "a file of the state")
        else:
            for _ in range(fault.get("twice", 1)):
                os.kill(os.getpid(), getattr(signal, fault["do"]))
    return nan


def listen_in():
    """Take down what happens, and when; in the file that HEARD asks for."""
    from mega_scale.process import StopSignals  # noqa: PLC0415
    from mega_scale.training.stopping import Watchdog  # noqa: PLC0415

    now.update(phase="start-up", since=time.monotonic())

    def beat(original, self, phase, step=None):
        seconds = time.monotonic() - now["since"]
        heard["longest"][now["phase"]] = max(seconds, heard["longest"].get(now["phase"], 0.0))
        now.update(phase=phase, since=time.monotonic())
        return original(self, phase, step)

    def ignore(original, self):
        heard["ended"] = time.monotonic()
        (Path(os.environ["HEARD"]) / f"{RANK}.json").write_text(json.dumps(heard))
        return original(self)

    wrap(Watchdog, "beat", beat)
    wrap(StopSignals, "ignore", ignore)


def note(original, self, *args):
    if heard["at"] is None:
        heard.update(at=time.monotonic(), phase=now.get("phase", "imports"))
    return original(self, *args)


class OnImport:
    """Meets the faults of imports, once the program listens."""

    def find_spec(self, name, path=None, target=None):
        if name == "mega_scale.config":
            meet("import")


def wrap(owner, name, before):
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        return before(original, *args, **kwargs)

    setattr(owner, name, wrapped)


def arm():
    from mega_scale.checkpoint import saver  # noqa: PLC0415
    from mega_scale.checkpoint.saver import Saver  # noqa: PLC0415
    from mega_scale.data import Loader  # noqa: PLC0415
    from mega_scale.parallel.deepspeed import DeepSpeedEngine  # noqa: PLC0415
    from mega_scale.parallel.engine import FsdpEngine  # noqa: PLC0415
    from mega_scale.training import trained_model  # noqa: PLC0415

    def batches(original, self, step):
        now["data"] = step
        meet("data")
        return original(self, step)

    def forward(original, self, *args, **kwargs):
        if not self.module.training:
            meet("evaluate")
            return original(self, *args, **kwargs)
        nan = meet("forward")
        loss = original(self, *args, **kwargs)
        return loss * float("nan") if nan else loss

    def write(original, path, *args):
        meet("write", int(path.parents[1].name.removeprefix("step-").removesuffix(".unfinished")))
        return original(path, *args)

    def generate(original, *args, every_token, **options):
        def after_token():
            meet("token")
            every_token()

        return original(*args, every_token=after_token, **options)

    def at(place):
        def before(original, *args, **kwargs):
            meet(place)
            return original(*args, **kwargs)

        return before

    wrap(Loader, "batches", batches)
    for engine in (FsdpEngine, DeepSpeedEngine):
        wrap(engine, "forward", forward)
    wrap(Saver, "save", at("save"))
    wrap(saver, "write_tensors", write)
    wrap(trained_model, "generate_text", generate)


class ArmAfterImport:
    """Arms the faults when launch/pretrain.py imports the trainer's metrics, which nothing that is wrapped needs."""

    def find_spec(self, name, path=None, target=None):
        if name == "mega_scale.training.metrics":
            sys.meta_path.remove(self)
            arm()
            if "HEARD" in os.environ:
                listen_in()


if "HEARD" in os.environ:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from mega_scale.process import StopSignals

    wrap(StopSignals, "_note", note)
if (
    "mega_scale.config" in sys.modules
):  # forked from a process that has imported everything, which has no faults of imports
    arm()
else:
    sys.meta_path[:0] = [OnImport(), ArmAfterImport()]
runpy.run_path(str(Path(__file__).parents[2] / "launch/pretrain.py"), run_name="__main__")
