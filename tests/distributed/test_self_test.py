"""The test that a run makes of its own layout: it passes where gradients are right, and finds them wrong."""

from collections.abc import Callable
from functools import partial
from typing import Any

import layout_study
import pytest
import tiny_run
import torch
from functorch.compile import default_partition, make_boxed_func
from layout_study import DROPOUT, LAYOUTS, OTHER_MEGALODON
from ranks import run_ranks
from torch._dynamo.backends.common import aot_autograd

from mega_scale.model import layers
from mega_scale.parallel import EngineConfig, ParallelConfig, World, sequence_parallel, tensor_parallel
from mega_scale.parallel.mesh import check_tensor_parallel
from mega_scale.parallel.model_parallel import run_self_test, tiny_model

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def attempt(
    world: World, engine: str, stage: int, dtype: str = "fp32", config: Any = None, compile: bool = False, **native: Any
) -> tuple[int, float] | str:
    config = config or tiny_run.tiny_config(**DROPOUT)
    ds_config = {"zero_optimization": native} if native else {}
    parallel = ParallelConfig(engine=engine, zero_stage=stage, ds_config=ds_config, **world.shape._asdict())
    try:
        return run_self_test(config, EngineConfig(parallel, dtype, compile=compile), world)
    except RuntimeError as error:
        return str(error)


def broken(module: Any, name: str, wrong: Callable[..., Any], act: Callable[[], Any]) -> Any:
    right = getattr(module, name)
    setattr(module, name, wrong)
    try:
        return act()
    finally:
        setattr(module, name, right)


def compile_as_it_is(graph: Any, inputs: Any) -> Any:
    return make_boxed_func(graph.forward)


def compile_wrongly(graph: Any, inputs: Any) -> Any:
    """Make of one activation another."""
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.silu.default:
            node.target = torch.ops.aten.relu.default
    graph.recompile()
    return make_boxed_func(graph.forward)


def compiled(world: World, engine: str, compiler: Callable[..., Any], **more: Any) -> tuple[int, float] | str:
    """The test of a run in bf16 whose blocks a compiler other than inductor, which takes the time, compiles."""
    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compile_as_it_is, partition_fn=default_partition)
    test = partial(attempt, world, engine, 3, "bf16", compile=True, **more)
    return broken(torch, "compile", partial(torch.compile, backend=backend), test)


def study() -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    with World.start(ParallelConfig(timeout_s=120)) as ranks:
        for layout in ("dp2", "sp2", "tp2"):
            world = layout_study.lay_out(ranks, LAYOUTS[layout])
            for engine in ("fsdp", "deepspeed"):
                found[layout, engine, "bf16"] = attempt(world, engine, 3, "bf16")
            engine = "deepspeed" if layout == "sp2" else "fsdp"
            found[layout, engine, "compiled"] = compiled(world, engine, compile_as_it_is)
            for engine, stage in [("fsdp", 3), ("fsdp", 2), ("fsdp", 1), *(("deepspeed", stage) for stage in range(4))]:
                found[layout, engine, stage] = attempt(world, engine, stage)
            # To DeepSpeed, ranks of sp are data-parallel ones: it divides by their number in whatever way it reduces.
            found[layout, "all-reduce", 2] = attempt(world, "deepspeed", 2, reduce_scatter=False)
        sp, tp = layout_study.lay_out(ranks, LAYOUTS["sp2"]), layout_study.lay_out(ranks, LAYOUTS["tp2"])
        for heads in (1, 2):
            model = layout_study.config(**OTHER_MEGALODON | {"num_attention_heads": heads})
            found["megalodon", heads, "sp"] = attempt(sp, ("fsdp", "deepspeed")[heads - 1], 3, "bf16", model)
            found["megalodon", heads, "tp"] = attempt(tp, ("deepspeed", "fsdp")[heads - 1], 3, "bf16", model)

        found["compiled wrongly"] = compiled(sp, "fsdp", compile_wrongly)

        # Tokens that the moving average of a rank is given.
        found["tokens"] = {}
        average = layers.damped_ema_and_residual

        def counted(x: torch.Tensor, *args: Any, **options: Any) -> Any:
            found["tokens"][len(found["tokens"])] = x.shape[1]
            return average(x, *args, **options)

        broken(layers, "damped_ema_and_residual", counted, lambda: attempt(sp, "fsdp", 3))

        # Ranks that forget to sum the gradient of what all of them hold.
        found["not summed"] = broken(
            tensor_parallel, "sum_gradients", lambda axis, *x: x, lambda: attempt(tp, "fsdp", 3)
        )
        # States that arrive without their gradient.
        exchange = sequence_parallel.StateExchange

        def silent(self: Any, *given: Any) -> Any:
            state, turn = carried(self, *given)

            def nothing(gradient: torch.Tensor) -> Any:
                of_end, of_fade = turn(gradient)
                return 0 * of_end, tuple(0 * t for t in of_fade)

            return state, nothing

        carried = exchange.__call__
        found["no gradient"] = broken(exchange, "__call__", silent, lambda: attempt(sp, "deepspeed", 3))
        # One rank that sees another loss.
        share = tensor_parallel.reduce_scatter

        def partly(x: torch.Tensor, axis: Any) -> torch.Tensor:
            return share(x * (1.01 if axis.rank else 1.0), axis)

        found["one rank"] = broken(tensor_parallel, "reduce_scatter", partly, lambda: attempt(tp, "fsdp", 3))
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(study, 2, tmp_path_factory.mktemp("self-test"), timeout_s=600)


def test_right_layouts_pass(ranks):
    for rank in ranks:
        passed = {key: value for key, value in rank.items() if isinstance(key, tuple)}
        assert len(passed) == 37
        for key, found in passed.items():
            assert isinstance(found, tuple), (key, found)
            assert found[0] > 35 and found[1] < 1e-4, (key, found)


def test_kernels_of_a_gpu_have_as_many_tokens_as_they_take(ranks):
    for rank in ranks:
        assert min(rank["tokens"].values()) >= 64, rank["tokens"]


@pytest.mark.parametrize("fault", ["not summed", "no gradient", "one rank"])
def test_wrong_gradients_are_found_by_all_ranks(ranks, fault):
    for rank in ranks:
        assert isinstance(rank[fault], str), rank[fault]
        assert "self-test" in rank[fault] and "parallel.self_test=false" in rank[fault]


def test_what_a_compiler_makes_wrong_is_found_and_named(ranks):
    """Eager blocks passed before, so the message says that these will do."""
    for rank in ranks:
        assert "self-test: compiled bf16 gradients" in rank["compiled wrongly"], rank["compiled wrongly"]
        assert "set train.compile=false, as eager blocks are right" in rank["compiled wrongly"]


def test_the_tiny_model_has_the_options_of_the_run():
    config = layout_study.config(normalization_type="rmsnorm", attention_activation="laplace", scale_embeddings=True)
    tiny = tiny_model(config, 4)
    assert (tiny.normalization_type, tiny.attention_activation, tiny.scale_embeddings) == ("rmsnorm", "laplace", True)
    assert tiny.hidden_size % 4 == tiny.vocab_size % 4 == tiny.intermediate_size % 4 == 0


@pytest.mark.parametrize(
    ("heads", "tp", "expected"), [(1, 4, 1), (2, 4, 2), (4, 4, 4), (8, 2, 4), (3, 1, 2), (6, 3, 6)]
)
def test_the_tiny_model_has_heads_as_the_run_has(heads, tp, expected):
    """Several on a rank, one, or several ranks a head."""
    config = layout_study.config(**OTHER_MEGALODON | {"num_attention_heads": 1, "rescale_nffn": True})
    config.num_attention_heads = heads
    tiny = tiny_model(config, tp)
    assert (tiny.model_type, tiny.num_attention_heads, tiny.rescale_nffn) == ("megalodon", expected, True)
    check_tensor_parallel(tiny, tp)
