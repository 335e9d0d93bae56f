"""The models against values computed by transformers 4.37.2 (tests/golden/README.md)."""

import importlib.util
import json
import pathlib

import pytest
import torch

import mega_scale

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())
CASES = [case for case in MANIFEST["cases"] if case["name"].startswith(("enc_", "lm_", "step_", "gen_"))]
# Lengths that fill no chunk, cached decoding with chunks, laplace and relu2: what the reference could not do itself.
EXTENDED = ("lm_", "step_", "gen_")


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("golden_check", GOLDEN / "check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("entry", CASES, ids=lambda entry: entry["name"])
def test_reference_values(check, entry):
    torch.set_num_threads(1)
    case = check.Case(str(GOLDEN), entry, mega_scale, MANIFEST["tolerances"])
    results = case.run(extended=entry["name"].startswith(EXTENDED))
    assert results and not [(label, message) for label, _, message in results if message is not None]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["lm_softmax_rotary_dense_tied", "enc_chunk8_softmax_simple_pad"])
def test_both_attention_implementations(check, name, implementation):
    entry = next(case for case in CASES if case["name"] == name)
    case = check.Case(str(GOLDEN), entry, mega_scale, MANIFEST["tolerances"])
    case.config["attn_implementation"] = implementation
    assert case.model().config._attn_implementation == implementation
    assert not [message for _, _, message in case.run() if message is not None]
