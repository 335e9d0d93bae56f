"""What cannot be printed ends no program: a full disk, a reader that left, a closed stream; and signals are noted."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mega_scale.process import INTERRUPTED, STOP_SIGNALS, Stream
from mega_scale.training.config import TrainConfig

ROOT = Path(__file__).parents[1]


RUN = """
import sys
from mega_scale.process import keep_streams
keep_streams()
for step in range(5000):  # more than a pipe holds
    print(f"step {step} | sample: 'é \\u4e2d \\U0001f600 \\ud800'", flush=True)
print("the run went on", file=sys.stderr)
open(sys.argv[1], "w").write("saved")
"""
COMMAND = """
from mega_scale.process import run_command
def main():
    print("é \\u4e2d" * 9)
    raise SystemExit(CODE)
run_command(main)
"""


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    """`mega_scale.process` alone, without what its package imports."""
    folder = tmp_path_factory.mktemp("light")
    (folder / "mega_scale").mkdir()
    (folder / "mega_scale/__init__.py").touch()
    (folder / "mega_scale/process.py").symlink_to(ROOT / "mega_scale/process.py")
    return {**os.environ, "PYTHONPATH": str(folder)}


def run(light, script, redirection, *arguments, **environment):
    command = ["bash", "-c", f'"$0" -c "$1" "${{@:2}}" {redirection}', sys.executable, script, *arguments]
    return subprocess.run(
        command, env=light | environment, capture_output=True, check=False, timeout=60, cwd=light["PYTHONPATH"]
    )


@pytest.mark.parametrize(
    "redirection,why,encoding",
    [
        *(("", None, encoding) for encoding in ("utf-8", "latin-1", "gbk", "ascii")),
        (">/dev/full", "No space left on device", "utf-8"),
        ("> >(exit)", "Broken pipe", "utf-8"),
        ("> >(head -c 9)", "Broken pipe", "utf-8"),
        (">&-", None, "utf-8"),
        (">/dev/full 2>/dev/full", "", "utf-8"),
        ("2>&-", "", "utf-8"),
        (">&- 2>&-", "", "utf-8"),
        ("2>&1 | true; exit ${PIPESTATUS[0]}", "", "utf-8"),
    ],
)
def test_a_run_goes_on_and_ends_well(light, tmp_path, redirection, why, encoding):
    done = run(light, RUN, redirection, str(tmp_path / "file"), PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and (tmp_path / "file").read_text() == "saved", done
    lines = done.stderr.decode().splitlines()
    if why != "":
        said = [] if why is None else [f"mega_scale | standard output is not written: {why}"]
        assert lines == [*said, "the run went on"]
    if redirection == "":
        sample = {"utf-8": "é 中 😀 \\ud800", "latin-1": "é \\u4e2d \\U0001f600 \\ud800"}.get(encoding, "\\ud800")
        assert sample in done.stdout.decode(encoding)


@pytest.mark.parametrize(
    "redirection,code,expected",
    [("", 0, 0), ("", 2, 2), (">/dev/full", 0, 74), (">/dev/full", 2, 2), ("> >(exit)", 0, 74)],
)
def test_a_command_whose_output_is_lost_says_so_and_fails(light, redirection, code, expected):
    script = COMMAND.replace("CODE", str(code)).replace("    print", "    import time; time.sleep(0.3); print")
    done = run(light, script, redirection, PYTHONIOENCODING="ascii")
    assert done.returncode == expected and b"Traceback" not in done.stderr, done
    assert done.stderr.count(b"is not written") == (1 if redirection else 0)


def test_a_disk_that_has_room_again_gets_what_comes_next(tmp_path):
    full, told = [True], []

    class Disk:
        text = ""

        def write(self, text):
            if full[0]:
                raise OSError(28, "No space left on device")
            self.text += text

        def flush(self):
            pass

    disk = Disk()
    stream = Stream(disk, told.append)
    for text in ("one", "two"):
        print(text, file=stream, flush=True)
    full[0] = False
    print("three", file=stream, flush=True)
    assert disk.text == "three\n" and len(told) == 1 and stream.problem is None


@pytest.mark.parametrize("what", ["os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", "raise KeyboardInterrupt"])
def test_ctrl_c_ends_a_command_in_one_line(light, what):
    script = "import os, signal, time\nfrom mega_scale.process import run_command\n"
    ended = run(light, f"{script}def main():\n  {what}\nrun_command(main)", "")
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, b"", b"error: interrupted\n")


# Signals


def test_a_signal_is_noted_once_and_the_first_counts(light):
    script = """
import os, signal
from mega_scale.process import StopSignals
signals = StopSignals()
signals.listen()
for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
    os.kill(os.getpid(), number)
assert signals.asked == "SIGUSR1"
if os.fork() == 0:  # a child ends by what ends a process
    os.kill(os.getpid(), signal.SIGTERM)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGTERM
signals.ignore()
os.kill(os.getpid(), signal.SIGTERM)
signals.listen(["SIGTERM"])  # USR1 came, and is not among them
print("not reached")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=light, cwd=light["PYTHONPATH"]
    )
    assert done.returncode == -signal.SIGUSR1 and done.stdout == "", done.stderr


def test_what_is_listened_to_before_the_settings_are_read_is_what_they_say_by_default():
    assert list(STOP_SIGNALS) == TrainConfig().stop_signals


def test_the_second_interrupt_ends_at_once_whatever_the_main_thread_does_and_an_echo_is_none(light):
    """The main thread is in C, where no handler of Python's runs; a loader worker beside it gets every Ctrl-C too."""
    script = """
import ctypes, os, sys, time
never = os.pipe()
from mega_scale.process import StopSignals
StopSignals(again_s=1.0).listen()
if os.fork() == 0:
    time.sleep(60)
print(os.getpid(), flush=True)
if sys.argv[1] == "waits":
    ctypes.CDLL(None).read(never[0], ctypes.create_string_buffer(1), 1)
while True:
    pass
"""
    for does in ("waits", "computes"):
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", script, does],  # Python 3.12 warns of os.fork
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=light["PYTHONPATH"],
            env=light | ({"TORCHELASTIC_RUN_ID": "1"} if does == "computes" else {}),
        )  # fmt: skip
        process.stdout.readline()
        for pause in (0.3, 0.3, 1.0):  # to the whole group, as a terminal and a launcher do
            assert process.poll() is None
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(pause)
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGTERM if does == "computes" else signal.SIGINT)  # as torchrun passes it on
        _, errors = process.communicate(timeout=10)
        assert process.returncode == INTERRUPTED == 130
        assert [line.split(":")[0] for line in errors.splitlines()] == [
            "mega_scale | SIGINT",
            "mega_scale | SIGINT again",
        ]


def test_stop_signals_are_blocked_before_any_import_and_heard_when_it_is_done(light):
    script = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT})
os.kill(os.getpid(), signal.SIGUSR1)
from mega_scale.process import StopSignals
signals = StopSignals()
assert signals.asked is None
signals.listen()
assert signals.asked == "SIGUSR1" and not signal.pthread_sigmask(signal.SIG_BLOCK, [])
"""
    done = run(light, script, "")
    assert done.returncode == 0, done


COMMANDS = (
    "prepare",
    "train_tokenizer",
    "evaluate",
    "generate",
    "export",
    "import_fairseq",
    "import_megalodon",
    "checkpoint",
)


@pytest.mark.parametrize("command", [*COMMANDS, "pretrain"])
def test_commands_block_signals_before_they_import_what_takes_seconds(command):
    before = (ROOT / f"launch/{command}.py").read_text().split("signal.pthread_sigmask(signal.SIG_BLOCK, {")[0]
    assert [line for line in before.splitlines() if line.startswith(("import ", "from "))] == ["import signal"]


def test_ctrl_c_while_a_command_imports_ends_it_in_one_line():
    script = f"""
import builtins, os, runpy, signal, sys
load = builtins.__import__
def interrupted(name, *args, **kwargs):
    if name == "transformers" and "transformers" not in sys.modules:
        os.kill(os.getpid(), signal.SIGINT)
    return load(name, *args, **kwargs)
builtins.__import__ = interrupted
sys.argv = ["launch/checkpoint.py", "list", "no-such-run"]
runpy.run_path({str(ROOT / "launch/checkpoint.py")!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (INTERRUPTED, "", "error: interrupted\n")
