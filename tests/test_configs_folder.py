"""Every recipe in configs/ parses, can start on the machine that it names, and has the size that it names."""

from pathlib import Path

import pytest
import torch

from mega_scale.config import load_config, model_config, parse
from mega_scale.data import load_tokenizer
from mega_scale.model import causal_lm_class

FOLDER = Path(__file__).parents[1] / "configs"

# File, ranks of the machine named at its top, and millions of parameters, with or without the embedding.
RECIPES = [
    ("debug.yaml", 2, 0.667, True),
    ("enwik8-39m.yaml", 8, 39, True),
    ("wikitext103-252m.yaml", 24, 252, True),
    ("mega-1.3b.yaml", 16, 1300, False),
    ("megalodon-200m.yaml", 8, 220.627968, True),
    ("megalodon-1.3b.yaml", 16, 1342.832640, True),
    ("megalodon-7b.yaml", 64, 7385.817088, True),
]


def test_every_recipe_is_listed_here():
    assert sorted(path.name for path in FOLDER.glob("*.yaml")) == sorted(name for name, *_ in RECIPES)


def make_files(data):
    """What a recipe reads, empty, where it is read from."""
    for path in [*(data.path or []), *(data.validation_path or [])]:
        file = Path(path) / "manifest.json" if data.source == "prepared" else Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


@pytest.mark.parametrize(("name", "ranks", "millions", "with_embedding"), RECIPES)
def test_recipe_can_start_and_has_its_size(name, ranks, millions, with_embedding, tmp_path, monkeypatch):
    config = load_config(FOLDER / name)
    monkeypatch.chdir(tmp_path)
    make_files(config.data)
    config.validate(world_size=ranks)
    tokenizer = load_tokenizer("byte") if config.data.tokenizer == "byte" else None
    shape = model_config(config.model, tokenizer)
    with torch.device("meta"):
        model = causal_lm_class(shape)(shape)
    count = sum(parameter.numel() for parameter in model.parameters())
    if not with_embedding:
        count -= model.get_input_embeddings().weight.numel()
    assert count / 1e6 == pytest.approx(millions, rel=1e-12 if name.startswith("megalodon") else 0.03)


@pytest.mark.parametrize("name", [name for name, *_ in RECIPES])
def test_recipe_says_its_machine_first(name):
    top = (FOLDER / name).read_text(encoding="utf-8").partition("\nrun_dir:")[0]
    assert all(line.startswith("#") or not line for line in top.splitlines())
    assert "# Machine: " in top
    assert load_config(FOLDER / name).run_dir == f"runs/{Path(name).stem}"


def test_the_long_context_layout_of_the_readme_can_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = ["data.sequence_length=262144", "train.global_batch_size=16", "parallel.sp=8", "parallel.tp=2"]
    readmes = [
        path.read_text(encoding="utf-8") for path in (FOLDER.parent / "README.md", *FOLDER.parent.glob("*/README.md"))
    ]
    assert any(all(change in text for change in changes) for text in readmes)
    config = parse(["--config", str(FOLDER / "mega-1.3b.yaml"), *changes])
    make_files(config.data)
    config.validate(world_size=64, local_size=8)
    assert config.parallel.mesh(64) == (1, 4, 8, 2)
