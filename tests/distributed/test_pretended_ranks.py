"""One rank of a run that nobody else is in, on small real tensors and on fake ones."""

import os
from contextlib import nullcontext

import engine_study
import layout_study
import pytest
import tiny_run
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mega_scale.parallel import EngineConfig, ParallelConfig, Place, World, parallelize, seeded_values
from mega_scale.parallel.mesh import MeshShape


def parallel(engine: str, shape: MeshShape, activation_checkpoint: int = 0) -> ParallelConfig:
    settings = engine_study.ENGINES[engine] | shape._asdict() | {"activation_checkpoint": activation_checkpoint}
    return ParallelConfig(**settings)


def two_steps(engine: str, shape: MeshShape, rank: int, fake: bool, variant: str = "plain") -> dict[str, int]:
    """Numbers that one rank holds of each parameter, after two steps of two micro-batches."""
    changes, recompute, dtype = layout_study.VARIANTS[variant]
    config, how = layout_study.config(**changes), parallel(engine, shape, recompute)
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext()
    with World.pretend(rank, shape.size, how, memory=lambda: mode) as world:
        settings = EngineConfig(how, dtype, micro_batch_size=2, accumulation=2, weight_average=0.9)
        values = seeded_values(config, tiny_run.SEED)
        made = parallelize(tiny_run.meta_model(config), values, settings, world, tiny_run.build_optimizer)
        made.module.train()
        with mode:
            for step in range(2):
                for last in (False, True):
                    inputs = torch.ones(2, 61, dtype=torch.int64)
                    made.backward(made.forward(inputs, inputs, 8 * 61, Place(step, 0)), last)
                assert made.step(1e-3) >= 0
            with torch.no_grad():
                made.forward(inputs, inputs, 8 * 61)
            tensors = made.state().tensors
        held = {name: made.local_tensor(name) for name in tensors}
        made.close()
    assert all(isinstance(tensor, FakeTensor) is fake for tensor in held.values())
    assert all(len(local.tensors["average"]) == len(local.tensors["weight"]) for local in tensors.values())
    return {name: tensor.numel() for name, tensor in held.items()}


@pytest.mark.parametrize(
    ("engine", "shape", "rank", "variant"),
    [
        ("fsdp-3", MeshShape(1, 2, 2, 2), 5, "recomputed"),
        ("fsdp-2", MeshShape(2, 1, 2, 1), 3, "bf16"),
        ("zero-3", MeshShape(2, 1, 1, 2), 3, "plain"),
        ("zero-2", MeshShape(1, 2, 1, 1), 1, "plain"),
    ],
)
@pytest.mark.slow
def test_fake_tensors_hold_what_real_ones_hold(engine, shape, rank, variant):
    held = two_steps(engine, shape, rank, True, variant)
    assert held == two_steps(engine, shape, rank, False, variant) and sum(held.values()) > 0


def test_any_rank_of_a_thousand_is_laid_out():
    how = ParallelConfig(engine="fsdp", dp_replicate=4, sp=4, tp=8)
    with World.pretend(517, 1024, how, local_size=8) as world:
        assert world.local_rank == 5 and world.shape == MeshShape(4, 8, 4, 8)
        assert world.place(517) == (2, 0, 5)
        assert {name: (axis.rank, axis.size) for name, axis in world.axes.items()} == {
            "dp_replicate": (2, 4), "fsdp": (0, 32), "sp": (0, 4), "tp": (5, 8),
        }  # fmt: skip


def test_what_ranks_tell_each_other_is_what_the_only_one_says():
    with World.pretend(1, 4, ParallelConfig()) as world:
        assert world.all_agree(True) and not world.all_agree(False)
        assert world.broadcast({"a": (1, 2)}) == {"a": [1, 2]} and world.gather(3) is None
        assert world.number(torch.tensor(2.5)) == 2.5
        with FakeTensorMode():
            assert world.number(torch.tensor(2.5)) == 1.0 and world.number(torch.ones(()), unknown=0.0) == 0.0
    with World.pretend(0, 4, ParallelConfig()) as world:
        assert world.gather(3) == [3] * 4 and world.first(None) is None and world.first("x") == "x"


@pytest.mark.parametrize(("rank", "says"), [(4, "rank=4"), (-1, "rank=-1")])
def test_a_rank_that_is_none_is_refused(rank, says):
    with pytest.raises(ValueError, match=f"{says} is not possible.*0 to 3"):
        World.pretend(rank, 4, ParallelConfig())


def test_an_unknown_release_of_deepspeed_is_refused(monkeypatch):
    import deepspeed  # noqa: PLC0415

    monkeypatch.setattr(deepspeed, "__version__", "1.0.0")
    with pytest.raises(ValueError, match=r"planned with DeepSpeed 0\.19.*1\.0\.0.*parallel\.engine=fsdp"):
        two_steps("zero-3", MeshShape(1, 1, 1, 1), 0, True)
    assert "LOCAL_RANK" not in os.environ, "what follows would take the process for one that a launcher started"
