"""Products of blocks in fp8: which layers, training beside bf16, checkpoints, and where it is refused.

torchao is in a folder that MEGA_SCALE_TORCHAO names, or installed: transformers imports it wherever it is, which takes
every process 2 s.
"""

import importlib.util
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import state_folder
import tiny_run
import torch
from ranks import run_ranks
from torch._dynamo.utils import counters

from mega_scale.ops import as_if
from mega_scale.parallel import EngineConfig, ParallelConfig, World

STEPS = 3
SIZES = {
    "mega": {"hidden_size": 32, "intermediate_size": 48, "shared_representation_size": 16, "nffn_hidden_size": 64},
    "megalodon": {
        "hidden_size": 32, "intermediate_size": 64, "shared_representation_size": 32, "nffn_hidden_size": 48,
        "num_attention_heads": 2, "timestep_norm_groups": 4,
    },
}  # fmt: skip
# Values, four segments, outputs and two of the feed-forward network; the feed-forward network of a Megalodon has three.
LAYERS = {"mega": 8, "megalodon": 8}
TORCHAO = os.environ.get("MEGA_SCALE_TORCHAO")
CONFIG = EngineConfig(ParallelConfig(engine="fsdp"), dtype="bf16", fp8=True)


def study(folder: Path) -> dict[str, Any]:
    """Two ranks, in bf16, and with products in fp8 that a CPU rounds as a GPU does."""
    EngineConfig._check_fp8 = lambda self: None  # type: ignore[method-assign] # in this process, which only has a CPU
    if TORCHAO:
        sys.path.append(TORCHAO)
    found: dict[str, Any] = {}
    # Inductor would take the time.
    compile_quickly = patch.object(torch, "compile", partial(torch.compile, backend="aot_eager_default_partitioner"))
    with World.start(ParallelConfig(timeout_s=120)) as world, compile_quickly:
        for family, sizes in SIZES.items():
            for name, more in (("bf16", {}), ("fp8", {"fp8": True}), ("fp8 again", {"fp8": True})):
                settings = {"engine": "fsdp", "activation_checkpoint": int(name == "fp8 again")}
                settings["activation_checkpoint_policy"] = "save_matmuls" if name == "fp8 again" else "full"
                more |= {"compiled": name == "fp8 again"}
                engine = tiny_run.make_engine(world, settings, dtype="bf16", model_type=family, **more, **sizes)
                kinds = {name: type(module).__name__ for name, module in engine.module.named_modules()}
                losses, _ = tiny_run.train(engine, world, range(STEPS))
                state_folder.save(engine, folder / family / name, world)
                graphs = counters["stats"].get("unique_graphs", 0)
                found[family, name] = {"kinds": kinds, "losses": losses, "graphs": graphs}
                counters.clear()
                engine.close()
            engine = tiny_run.make_engine(world, {"engine": "fsdp"}, dtype="bf16", model_type=family, **sizes)
            state_folder.load(engine, folder / family / "fp8", world)
            state_folder.save(engine, folder / family / "loaded", world)
            engine.close()
    return found


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(not TORCHAO and importlib.util.find_spec("torchao") is None, reason="needs torchao")
def test_blocks_train_beside_bf16_and_their_checkpoints_are_the_same(tmp_path):
    found = run_ranks(study, 2, tmp_path / "ranks", tmp_path)[0]
    for family, layers in LAYERS.items():
        kinds = found[family, "fp8"]["kinds"]
        eighths = [name for name, kind in kinds.items() if "Float8Linear" in kind]
        assert len(eighths) == 3 * layers and all(".layers." in name for name in eighths)
        losses, expected, again = (torch.tensor(found[family, n]["losses"]) for n in ("fp8", "bf16", "fp8 again"))
        assert [found[family, name]["graphs"] for name in ("bf16", "fp8", "fp8 again")] == [0, 0, 1]
        assert not torch.equal(losses, expected), "products are in fp8"
        torch.testing.assert_close(losses, expected, rtol=3e-2, atol=0)
        torch.testing.assert_close(again, losses, rtol=1e-3, atol=0)  # compiled, with recomputation
        files = {name: state_folder.canonical(tmp_path / family / name) for name in ("bf16", "fp8", "loaded")}
        assert files["fp8"].keys() == files["bf16"].keys()
        weights = {name: tensor for name, tensor in files["fp8"].items() if name.startswith(("weight/", "exp_avg"))}
        assert weights and all(torch.equal(files["loaded"][name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize(
    ("capability", "there", "words"),
    [((8, 0), True, "compute capability 8.0, and fp8 products need 8.9"), ((9, 0), False, "torchao is not installed")],
)
def test_a_gpu_without_fp8_and_a_missing_package_are_refused(capability, there, words, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torchao" and not there else find(name)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    with pytest.raises(ValueError, match=f"train.fp8=True is not possible: .*{words}"):
        CONFIG.validate(1)


def test_a_plan_for_a_gpu_may_have_it(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "torchao" else find(name))
    with pytest.raises(ValueError, match=r"train\.fp8=True is not possible"):  # on this machine
        CONFIG.validate(1)
    with as_if("cuda", (9, 0)):
        CONFIG.validate(1)
