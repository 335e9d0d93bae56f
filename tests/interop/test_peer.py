"""Folders go to transformers 4.37.2 and come back: all seven classes load strictly on either side and agree."""

import json
import os
import subprocess
from pathlib import Path

import peer_program
import pytest
import torch
from builders import make_config, make_ids
from safetensors.torch import load_file, save_file

import mega_scale

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(
        "MEGA_SCALE_PEER_PYTHON" not in os.environ,
        reason="MEGA_SCALE_PEER_PYTHON names no Python with transformers 4.37.2",
    ),
]
ENCODER = {"is_decoder": False, "bidirectional": True}
CLASSES = {
    "MegaModel": ENCODER,
    "MegaForCausalLM": {},
    "MegaForMaskedLM": ENCODER,
    "MegaForSequenceClassification": {**ENCODER, "num_labels": 3},
    "MegaForMultipleChoice": ENCODER,
    "MegaForTokenClassification": {**ENCODER, "num_labels": 5},
    "MegaForQuestionAnswering": ENCODER,
}
# What the reference computes rightly: see the defects for the rest.
OPTIONS = {
    "rotary": {"use_chunking": False},
    "chunked-simple-laplace": {"relative_positional_bias": "simple", "attention_activation": "laplace"},
    "layernorm-post-relu2-types": {
        "use_chunking": False, "normalization_type": "layernorm", "normalize_before_mega": False,
        "normalize_before_ffn": False, "attention_activation": "relu2", "add_token_type_embeddings": True,
    },
    "untied-nodense-truncated": {
        "use_chunking": False, "tie_word_embeddings": False, "add_lm_hidden_dense_layer": False, "truncation": 6,
        "norm_affine": False, "activation": "gelu", "use_normalized_ffn": False,
    },
}  # fmt: skip
CASES = [(kind, options) for kind in CLASSES for options in OPTIONS]


def inputs_for(kind, config):
    """16 tokens, two whole chunks, padded on the right but for a causal model, with labels."""
    ids = make_ids(4, 16)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if not config.is_decoder:
        inputs["attention_mask"][1, 11:] = 0
    if config.add_token_type_embeddings:
        inputs["token_type_ids"] = ids % 2
    labels = {
        "MegaForCausalLM": ids,
        "MegaForMaskedLM": ids,
        "MegaForSequenceClassification": torch.tensor([0, 2, 1, 2]),
        "MegaForMultipleChoice": torch.tensor([1, 0]),
        "MegaForTokenClassification": ids % 5,
    }
    if kind in labels:
        inputs["labels"] = labels[kind].clone()
    if kind == "MegaForQuestionAnswering":
        inputs |= {"start_positions": torch.tensor([0, 3, 5, 7]), "end_positions": torch.tensor([2, 3, 9, 15])}
    if kind == "MegaForMultipleChoice":
        inputs = {name: value if name == "labels" else value.unflatten(0, (2, 2)) for name, value in inputs.items()}
    return inputs


def spread_model(kind, config, seed):
    torch.manual_seed(seed)
    model = getattr(mega_scale, kind)(config)
    peer_program.spread(model, seed)
    return model.eval()


@pytest.fixture(scope="module")
def exchange(tmp_path_factory):
    """One folder a case and direction; what was saved here, and what the peer made of it and saved itself."""
    root, tasks, saved = tmp_path_factory.mktemp("peer"), [], {}
    for number, (kind, options) in enumerate(CASES):
        config = make_config(**CLASSES[kind], **OPTIONS[options])
        inputs = inputs_for(kind, config)
        path = root / f"inputs-{number}.safetensors"
        save_file({name: value.contiguous() for name, value in inputs.items()}, path)
        model = spread_model(kind, config, number)
        model.save_pretrained(root / f"ours-{number}")
        saved[kind, options] = number, model, inputs
        arguments = {name: value for name, value in config.to_dict().items() if name in make_config().to_dict()}
        for name in ("transformers_version", "model_type", "layer_types", "dtype", "architectures"):
            arguments.pop(name, None)
        common = {"class": kind, "inputs": str(path)}
        tasks.append({**common, "make": False, "folder": str(root / f"ours-{number}")})
        tasks.append({**common, "make": True, "folder": str(root / f"theirs-{number}"), "config": arguments})
    (root / "task.json").write_text(json.dumps(tasks))
    command = [os.environ["MEGA_SCALE_PEER_PYTHON"], peer_program.__file__, str(root)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return root, saved


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys() and len(ours) >= 1
    for name, tensor in theirs.items():
        torch.testing.assert_close(
            ours[name], tensor, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_weights_saved_here_load_there(exchange, kind, options):
    root, saved = exchange
    number, model, inputs = saved[kind, options]
    theirs = load_file(Path(root) / f"ours-{number}" / "outputs.safetensors")
    assert_same(peer_program.outputs(model, inputs), theirs)


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_weights_saved_there_load_here(exchange, kind, options):
    root, saved = exchange
    number, _, inputs = saved[kind, options]
    folder = Path(root) / f"theirs-{number}"
    assert json.loads((folder / "config.json").read_text())["transformers_version"] == "4.37.2"
    model = peer_program.load_strictly(getattr(mega_scale, kind), folder)
    assert_same(peer_program.outputs(model, inputs), load_file(folder / "outputs.safetensors"))
