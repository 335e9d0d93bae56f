"""Dropout's Triton kernel, interpreted against the plain form; what ranks and modules make of dropout by place."""

import importlib.util
from pathlib import Path

import pytest
from test_ema_triton import start

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_interpreted_kernel_drops_what_the_plain_form_does():
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", HERE / "interpreted_dropout.py")
    done = start(*command, TRITON_INTERPRET="1")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
