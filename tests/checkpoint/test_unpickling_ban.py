"""The linter refuses whatever runs code that a file brings along, in every folder, also inside a function."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BAD = (
    "import pickle",
    "from pickle import loads",
    "import torch; torch.load('file', weights_only=True)",
    "from torch import load",
    "import torch; torch.jit.load('file')",
    "import numpy as np; np.load('file', allow_pickle=True)",
    "import torch.distributed.checkpoint as dcp",
    "import yaml; yaml.unsafe_load('')",
    "import yaml; yaml.load('', Loader=yaml.Loader)",
    "import pandas as pd; pd.read_pickle('file')",
    "import marshal",
    "import cloudpickle",
    "import joblib",
)

pytestmark = pytest.mark.skipif(shutil.which("ruff") is None, reason="ruff is not installed: pip install -e '.[dev]'")


def lint(folder: str, code: str) -> str:
    lines = "def function():\n" + "".join(f"    {line}\n" for line in code.split("; "))
    command = ["ruff", "check", "--no-cache", "--config", ".ci/loading.toml", "--stdin-filename", f"{folder}/x.py", "-"]
    return subprocess.run(command, input=lines, cwd=ROOT, capture_output=True, text=True, check=False).stdout


@pytest.mark.parametrize("code", BAD)
def test_the_linter_refuses_it(code):
    for folder in ("mega_scale/checkpoint", "mega_scale/parallel", "mega_scale/hub", "launch", "tests/launch"):
        assert "TID251" in lint(folder, code), folder


def test_it_lets_json_and_safetensors_pass():
    assert "All checks passed" in lint("mega_scale/training", "import json; json.loads('{}')")
