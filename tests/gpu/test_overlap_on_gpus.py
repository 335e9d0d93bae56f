"""Products with collectives of tp beside them, on two GPUs that reach each other's memory: as without."""

from dataclasses import replace
from typing import Any

import pytest
import tiny_run
import torch
from ranks import run_ranks
from torch import Tensor

from mega_scale.parallel import EngineConfig, ParallelConfig, Place, World, parallelize, seeded_values
from mega_scale.parallel.overlap import gathered_products, scattered_product
from mega_scale.parallel.world import Axis, gather, reduce_scatter

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
# Rows, tokens, channels a rank, outputs: the work space of symmetric memory grows, and is too large then.
SIZES = [(1, 1, 8, 8), (2, 61, 24, 5), (4, 1024, 512, 768), (1, 4096, 1024, 2048), (3, 7, 16, 3)]
MEGALODON = {"model_type": "megalodon", "num_attention_heads": 2, "timestep_norm_groups": 4}
MODELS: dict[str, dict[str, Any]] = {"mega": {}, "megalodon": MEGALODON}
WIDTHS = {"hidden_size": 64, "intermediate_size": 64, "nffn_hidden_size": 64, "shared_representation_size": 16}
DTYPES = {torch.float32: 1e-3, torch.bfloat16: 2e-2}


def products(axis: Axis, size: Any, dtype: torch.dtype, beside: bool) -> list[Tensor]:
    """What a gather with two products and a product with its sum give, and gradients."""
    rows, tokens, channels, width = size
    generator = torch.Generator("cuda").manual_seed(axis.rank)

    def draw(*shape: int) -> Tensor:
        scale = shape[-1] ** -0.5
        return (torch.randn(*shape, device="cuda", generator=generator) * scale).to(dtype).requires_grad_()

    whole = channels * axis.size
    x, up, also, down = draw(rows, tokens, channels), draw(width, whole), draw(width, whole), draw(whole, width)
    if beside:
        _, a, b = gathered_products(axis, x, up, also)
        y = scattered_product(axis, a * b, down)
    else:
        all_ = gather(x, axis)
        y = reduce_scatter((all_ @ up.t()) * (all_ @ also.t()) @ down.t(), axis)
    y.square().sum().backward()
    return [y.detach().cpu(), *(tensor.grad.cpu() for tensor in (x, up, also, down) if tensor.grad is not None)]


def losses(world: World, changes: dict[str, Any], dtype: str, compile: bool, how: dict[str, Any]) -> list[float]:
    model = tiny_run.tiny_config(**WIDTHS | changes, num_hidden_layers=2)
    engine = parallelize(
        tiny_run.meta_model(model),
        seeded_values(model, tiny_run.SEED),
        EngineConfig(ParallelConfig(engine="fsdp", tp=2, **how), dtype=dtype, micro_batch_size=2, compile=compile),
        world,
        tiny_run.build_optimizer,
    )
    engine.module.train()
    found = []
    for step in range(6):
        tokens = torch.randint(3, 67, (2, 97), generator=torch.Generator().manual_seed(step)).cuda()
        loss = engine.forward(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), 192, Place(step))
        engine.backward(loss, last=True)
        engine.step(1e-2)
        found.append(float(loss.detach()))
    engine.close()
    return found


def study() -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    config = ParallelConfig(engine="fsdp", tp=2, device="cuda", timeout_s=120)
    with World.start(config) as world:
        found["waits"], axis = world.waits, world.axes["tp"]
        if world.waits:
            return found
        waiting = replace(world, axes=world.axes | {"tp": replace(axis, overlaps=False)})
        for size in SIZES:
            for dtype in DTYPES:
                found[size, dtype] = [products(axis, size, dtype, beside) for beside in (True, False)]
        for family, changes in MODELS.items():
            for dtype in ("fp32", "bf16"):
                for compile, every in ((False, 0), (False, 1), (True, 1)):
                    how = {"activation_checkpoint": every}
                    both = [losses(own, changes, dtype, compile, how) for own in (world, waiting)]
                    found[family, dtype, compile, every] = both
    return found


def test_two_gpus_compute_the_same_beside_collectives(tmp_path):
    ranks = run_ranks(study, 2, tmp_path, timeout_s=500)
    for rank in ranks:
        if rank["waits"]:
            pytest.skip(rank["waits"])
        del rank["waits"]
        for key, (beside, waiting) in rank.items():
            if isinstance(key[0], str):
                assert beside == pytest.approx(waiting, rel=1e-4 if key[1] == "fp32" else 2e-2), key
                continue
            for got, want in zip(beside, waiting, strict=True):
                within = DTYPES[key[1]] * max(float(want.abs().max()), 1e-3)
                torch.testing.assert_close(got.float(), want.float(), rtol=0, atol=within, msg=str(key))
