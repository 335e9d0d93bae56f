"""What cannot be printed ends no program: a full disk, a reader that left, a closed stream, an encoding without é."""

import os
import subprocess
import sys

import pytest

from launch import pretrain

RUN = """
import sys
from mega_scale.streams import keep_streams
keep_streams()
for step in range(1000):
    print(f"step {step} | sample: 'é \\u4e2d \\U0001f600 \\ud800'", flush=True)
print("the run went on", file=sys.stderr)
open(sys.argv[1], "w").write("saved")
"""
COMMAND = """
from mega_scale.streams import run_command
def main():
    print("é \\u4e2d" * 9)
    raise SystemExit(CODE)
run_command(main)
"""


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    """`mega_scale.streams` alone, without what its package imports."""
    folder = tmp_path_factory.mktemp("light")
    (folder / "mega_scale").mkdir()
    (folder / "mega_scale/__init__.py").touch()
    source = os.path.join(os.path.dirname(pretrain.__file__), "../mega_scale/streams.py")
    (folder / "mega_scale/streams.py").symlink_to(os.path.abspath(source))
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
    from mega_scale.streams import Stream  # noqa: PLC0415

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
    script = "import os, signal, time\nfrom mega_scale.streams import run_command\n"
    ended = run(light, f"{script}def main():\n  {what}\nrun_command(main)", "")
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, b"", b"error: interrupted\n")
