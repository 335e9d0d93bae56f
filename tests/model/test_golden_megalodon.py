"""The Megalodon models and their parts against values computed from the definitions (tests/golden/megalodon)."""

import importlib.util
import json
import pathlib
import sys

import pytest
import torch

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
MANIFEST = json.loads((GOLDEN / "megalodon" / "manifest.json").read_text())
CASES = {entry["name"]: entry for entry in MANIFEST["cases"]}


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def check():
    return load("megalodon_check", GOLDEN / "megalodon" / "check.py")


@pytest.fixture(scope="module")
def functions():
    return load("megalodon_functions", GOLDEN / "megalodon_functions.py")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", CASES)
def test_reference_values(check, functions, name, dtype):
    assert not failed(check, functions, name, dtype)


@pytest.mark.parametrize("name", ["lm_documents", "lm_padding", "lm_rescale_noaffine_heads4"])
def test_attention_written_out(check, functions, name):
    assert not failed(check, functions, name, torch.float64, attn_implementation="eager")


def failed(check, functions, name, dtype, **config):
    """What the checker says of a case, of the checks that failed."""
    case = check.Case(str(GOLDEN / "megalodon"), CASES[name], functions, MANIFEST["tolerances"], dtype=dtype)
    case.config.update(config)
    results = case.run()
    assert results
    return [f"{label}: {message}" for label, _, message in results if message is not None]


def test_the_checker_takes_the_functions_from_any_folder(check, monkeypatch, capsys):
    for folder, package in (
        (GOLDEN, "megalodon_functions"),
        (GOLDEN.parent.parent, "tests.golden.megalodon_functions"),
    ):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "path", [*sys.path])
        assert check.main([str(GOLDEN / "megalodon"), package, "--case", "op_timestep_norm"]) == 0
    assert capsys.readouterr().out.count("1 passed, 0 failed") == 2
