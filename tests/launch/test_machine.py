"""What becomes of the memory of freed tensors."""

import platform
import subprocess
import sys

import pytest
from launching import ROOT

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is asked for here is glibc's")

# Tensors of 16 MiB, all of them alive, then none; the share of their memory that the process still has.
PROGRAM = """
import sys, torch
from launch import machine
getattr(machine, sys.argv[1])()
before = machine._resident("VmRSS")
tensors = [torch.ones(2**22) for _ in range(8)]
del tensors
print((machine._resident("VmRSS") - before) / 2**27)
"""


@pytest.mark.parametrize(
    "function,environment,kept",
    [
        ("keep_freed_memory", {}, True),
        ("return_freed_memory", {}, False),
        ("keep_freed_memory", {"MALLOC_MMAP_THRESHOLD_": "65536"}, False),
        ("keep_freed_memory", {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"}, False),
    ],
)
def test_freed_memory_is_kept_or_returned_as_asked_for(function, environment, kept):
    command = [sys.executable, "-c", PROGRAM, function]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    share = float(done.stdout)
    assert share > 0.9 if kept else share < 0.1
