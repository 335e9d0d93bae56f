"""Exports with code: what the files are, and that they load where there is no mega_scale."""

import ast
import importlib
import json
import os
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_imports

import mega_scale.model
from mega_scale.hub.export import auto_classes, auto_map, flat_name, remote_code, write_export
from mega_scale.hub.folder import open_folder
from mega_scale.model import MegaConfig, MegalodonConfig

ROOT = Path(mega_scale.__file__).parent


@pytest.fixture(scope="module")
def files():
    return remote_code(auto_classes())


@pytest.mark.parametrize("family", [MegaConfig, MegalodonConfig])
def test_every_registered_class_is_in_the_map(family):
    files, mapping = remote_code(auto_classes(family)), auto_map(auto_classes(family))
    name, stem = family.__name__.removesuffix("Config"), family.model_type
    assert mapping["AutoConfig"] == f"configuration_{stem}.{name}Config"
    assert mapping["AutoModel"] == f"modeling_{stem}.{name}Model"
    assert mapping["AutoModelForCausalLM"] == f"modeling_{stem}.{name}ForCausalLM"
    for reference in mapping.values():
        file, name = reference.split(".")
        assert name in {node.name for node in ast.parse(files[f"{file}.py"]).body if isinstance(node, ast.ClassDef)}


@pytest.mark.parametrize("family", [MegaConfig, MegalodonConfig])
def test_files_need_only_each_other_torch_and_transformers(family, tmp_path):
    files = remote_code(auto_classes(family))
    # Kernels import triton in a `try`, and transformers does not ask for what is imported there.
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert "triton" not in get_imports(tmp_path / name)
    allowed = {"torch", "transformers", "huggingface_hub", "triton"}
    for text in files.values():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1
                assert f"{node.module}.py" in files
                names = {alias.name for alias in node.names}
                assert names <= _top_level_names(files[f"{node.module}.py"]), names
            elif isinstance(node, ast.Import | ast.ImportFrom):
                found = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                outside = {name.split(".")[0] for name in found} - allowed
                assert all(_is_standard(name) for name in outside), outside


def _top_level_names(text):
    names = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found = (node for target in targets for node in ast.walk(target))
            names |= {node.id for node in found if isinstance(node, ast.Name)}
    return names


def _is_standard(name):
    found = importlib.util.find_spec(name)
    return found.origin in ("built-in", "frozen") or Path(found.origin).is_relative_to(sysconfig.get_path("stdlib"))


def test_files_are_the_projects_own_lines(files):
    seen = set()
    for name, text in files.items():
        header, _, body = text.partition("\n")
        source = ROOT.parent / header.split(" own ")[1].split(";")[0]
        assert flat_name(".".join(source.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"))
        lines, expected = body.splitlines(), source.read_text(encoding="utf-8").splitlines()
        assert len(lines) == len(expected)
        for line, original in zip(lines, expected, strict=True):
            assert line == original or ("from mega_scale." in original and "from ." in line), (name, line)
        seen.add(source)
    assert ROOT / "model" / "layers.py" in seen
    assert ROOT / "ops" / "ema" / "native.py" in seen


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("from mega_scale.data import load_corpus", r"mega_scale.data cannot go with a model: it may import from"),
        ("import mega_scale.ops.ema", "line 2: write `from mega_scale"),
        ("from .block import MegaBlock", "line 2: relative imports stay within one folder"),
        ("from mega_scale.ops import ema", "name what mega_scale.ops holds, not 'ema'"),
        ("from mega_scale.ops.ema import *", r"not '\*'"),
    ],
)
def test_imports_that_cannot_be_flattened_are_refused(tmp_path, monkeypatch, line, message):
    (tmp_path / "extra_part.py").write_text(f"# A part.\n{line}\n\n\nclass Part:\n    pass\n")
    monkeypatch.setattr(mega_scale.model, "__path__", [*mega_scale.model.__path__, str(tmp_path)])
    part = type("Part", (), {"__module__": "mega_scale.model.extra_part"})
    with pytest.raises(ValueError, match=message):
        remote_code({"AutoModel": part})


def test_modules_that_would_share_a_name_are_refused(tmp_path, monkeypatch):
    (tmp_path / "ops_ema.py").write_text("class Part:\n    pass\n")
    monkeypatch.setattr(mega_scale.model, "__path__", [*mega_scale.model.__path__, str(tmp_path)])
    part = type("Part", (), {"__module__": "mega_scale.model.ops_ema"})
    with pytest.raises(ValueError, match=r"two modules would become ops_ema\.py"):
        remote_code(auto_classes() | {"AutoModel": part})


def test_an_export_holds_the_files_only_when_asked(tmp_path, make_model, tokenizer, files):
    model, folder = make_model(), tmp_path / "out"
    for with_code in (True, False):
        # The second export is made with the configuration that the first one gave.
        write_export(folder, model.state_dict(), model.config, tokenizer, "", overwrite=True, with_code=with_code)
        assert {path.name: path.read_text() for path in folder.glob("*.py")} == (files if with_code else {})
        values = json.loads((folder / "config.json").read_text())
        assert values.get("auto_map") == (auto_map(auto_classes()) if with_code else None)
        model.config, _ = open_folder(folder)


CHILD = """
import importlib.util, json, sys
import torch
from safetensors.torch import load_file, save_file
assert importlib.util.find_spec("torch") is not None
try:
    import mega_scale
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("mega_scale is here: " + mega_scale.__file__)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

folder, inputs, result = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
for reference in config.auto_map.values():
    assert get_class_from_dynamic_module(reference, folder).__name__ == reference.split(".")[1]
model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
assert type(model).__module__.startswith("transformers_modules.")
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
assert type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()  # a Trainer that smooths labels looks here
input_ids = load_file(inputs)["input_ids"]
mask = torch.ones_like(input_ids)
with torch.no_grad():
    logits = model.eval()(input_ids=input_ids).logits
tokens = model.generate(
    input_ids, attention_mask=mask, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=1
)
text = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("def")["input_ids"]
save_file({"logits": logits, "tokens": tokens, "text": torch.tensor(text)}, result)
"""
BLOCKER = """
import sys


class _Absent:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "mega_scale":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, _Absent)
"""


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """A new virtual environment that sees the packages of this one, but neither its projects nor mega_scale."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(folder, symlinks=True, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    # Python does not follow the .pth files of a folder that comes in by a .pth file: editable projects stay out.
    (site / "packages.pth").write_text("".join(f"{path}\n" for path in sorted(paths)))
    (site / "sitecustomize.py").write_text(BLOCKER)
    return folder / "bin" / "python"


@pytest.mark.launch
@pytest.mark.slow
def test_an_export_with_code_loads_without_mega_scale(
    tmp_path, make_model, make_megalodon, tokenizer, input_ids, bare_python
):
    cases = {
        "megalodon": {"swiglu": True, "rescale_nffn": True, "scale_embeddings": True},
        "recipe": {
            "use_chunking": True,
            "chunk_size": 8,
            "normalization_type": "layernorm",
            "scale_embeddings": True,
            "final_norm": True,
            "lm_head_bias": False,
            "add_lm_hidden_dense_layer": False,
            "attention_activation": "laplace",
        },
    }
    save_file({"input_ids": input_ids}, tmp_path / "inputs.safetensors")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    for name, changes in cases.items():
        make = make_megalodon if name == "megalodon" else make_model
        model, folder = make(**changes), tmp_path / name
        write_export(folder, model.state_dict(), model.config, tokenizer, "", with_code=True)
        command = [bare_python, "-c", CHILD, folder, tmp_path / "inputs.safetensors", tmp_path / "result.safetensors"]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        result = load_file(tmp_path / "result.safetensors")
        ours = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert type(ours).__module__ == f"mega_scale.model.modeling_{model.config.model_type}"
        with torch.no_grad():
            assert (result["logits"] - model(input_ids=input_ids).logits).abs().max() < 1e-5
        tokens = ours.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=40,  # five chunks
            do_sample=False,
            eos_token_id=None,
            pad_token_id=1,
        )
        assert torch.equal(result["tokens"], tokens)
        assert result["text"].tolist() == tokenizer("def")["input_ids"]
