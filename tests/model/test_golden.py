"""The models against values computed by transformers 4.37.2 (tests/golden/README.md)."""

import importlib.util
import json
import pathlib

import pytest
import torch
from torch import Tensor

import mega_scale
from mega_scale.model import layers

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def cases(folder):
    return {entry["name"]: entry for entry in manifest(folder)["cases"]}


@pytest.fixture(scope="module")
def run():
    """Run a case of a folder, the extended checks included; returns the messages of those that failed."""
    spec = importlib.util.spec_from_file_location("golden_check", GOLDEN / "check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.set_num_threads(1)

    def run_case(folder, name, **config):
        case = module.Case(str(folder), cases(folder)[name], mega_scale, manifest(folder)["tolerances"])
        case.config.update(config)
        results = case.run(extended=True)
        assert results
        return [f"{label}: {message}" for label, _, message in results if message is not None]

    return run_case


@pytest.mark.parametrize("name", cases(GOLDEN))
def test_reference_values(run, name):
    assert not run(GOLDEN, name)


@pytest.mark.parametrize("name", cases(GOLDEN / "batchnorm_decoders"))
def test_a_decoder_with_batch_norm_is_evaluated_from_running_statistics(run, name):
    assert not run(GOLDEN / "batchnorm_decoders", name)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "name", ["lm_softmax_rotary_dense_tied", "enc_chunk8_softmax_simple_pad", "cross_lm_chunk8_softmax_rotary"]
)
def test_both_attention_implementations(run, name, implementation):
    assert not run(GOLDEN, name, attn_implementation=implementation)


@pytest.mark.parametrize("name", cases(GOLDEN / "quirk"))
def test_rmsnorm_differs_from_the_reference_by_the_normalisation_alone(run, monkeypatch, name):
    failed = run(GOLDEN / "quirk", name)
    assert failed and all("max abs diff" in message for message in failed)

    def forgetful(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
        return x if gain is None else x * gain

    monkeypatch.setattr(layers, "divide_by_rms", forgetful)
    assert not run(GOLDEN / "quirk", name)
