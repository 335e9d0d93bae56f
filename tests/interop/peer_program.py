"""What tests run in an interpreter with transformers 4.37.2: save a Mega model, or load one, and compute its outputs.

    python peer_program.py FOLDER

FOLDER/task.json lists models: class, config (arguments of MegaConfig), folder, inputs (safetensors), make (whether to
make the model and save it, or to load it). Outputs are written as outputs.safetensors into each model's folder.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import logging

OUTPUTS = ("last_hidden_state", "pooler_output", "logits", "loss", "start_logits", "end_logits")


def outputs(model, inputs):
    """What the model computes, by name."""
    with torch.no_grad():
        out = model.eval()(**inputs, use_cache=False) if model.config.is_decoder else model.eval()(**inputs)
    named = {name: getattr(out, name, None) for name in OUTPUTS}
    return {name: tensor.contiguous() for name, tensor in named.items() if tensor is not None}


def spread(model, seed):
    """Move every parameter away from its initial value, so that each of them shows in the outputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)


def load_strictly(cls, folder):
    """Load a folder; refuses any name or shape that does not fit."""
    model, report = cls.from_pretrained(folder, output_loading_info=True)
    wrong = {name: report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[name]}
    if wrong:
        raise SystemExit(f"{folder}: {wrong}")
    # A tied weight may be absent from the file, and is compared as part of the state dict.
    return model


def main(folder):
    """Do every task of the list."""
    assert transformers.__version__ == "4.37.2", transformers.__version__
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    for number, task in enumerate(json.loads((folder / "task.json").read_text())):
        cls, place = getattr(transformers, task["class"]), Path(task["folder"])
        if task["make"]:
            torch.manual_seed(number)
            model = cls(transformers.MegaConfig(**task["config"]))
            spread(model, number)
            model.save_pretrained(place)
        else:
            model = load_strictly(cls, place)
        save_file(outputs(model, load_file(task["inputs"])), place / "outputs.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
