"""Before a run: does this layout compute the gradients of one process? A tiny model with the run's options answers it.

A wrong reduction shows as a factor between gradients, on some ranks or parameters only, and in no loss.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mega_scale.model import MegaConfig, MegaForCausalLM
from mega_scale.parallel.config import ActivationCheckpointing, EngineConfig, ParallelConfig
from mega_scale.parallel.model_parallel import apply_model_parallelism, parallelize
from mega_scale.parallel.shard import Place, assemble, by_source, fill, on_meta, seeded_values, shardings
from mega_scale.parallel.world import ALONE, World

_SEED = 11
_CHUNK = 8
# A gradient is read off the weights, which one step of SGD has moved: the loss is left undivided, so that it is large
# beside them and rounding gives about 1e-6.
_ITEMS = 1
# Of a gradient, by the number format of forward and backward: fp32 finds what is wrong by a percent on one rank, the
# run's own format what only its kernels and policies do.
_TOLERANCES = {"fp32": 1e-3, "bf16": 0.2}


class SelfTest(NamedTuple):
    """What was found, the same on all ranks."""

    parameters: int  # gradients compared
    error: float  # largest difference of a gradient, as a share of its largest number


def tiny_model(config: MegaConfig, tp: int) -> MegaConfig:
    """The run's model with its options and few channels, all widths divisible by `tp` ranks."""
    width = 8 * tp
    changes = {
        "vocab_size": 2 * width,
        "hidden_size": width,
        "intermediate_size": width,
        "nffn_hidden_size": width,
        "shared_representation_size": 8,
        "ema_projection_size": min(config.ema_projection_size, 4),
        "num_hidden_layers": 2,
        "max_positions": 128,
        "chunk_size": _CHUNK if config.use_chunking else config.chunk_size,
        "pad_token_id": 1,
        "initializer_range": 0.2,  # so that every part of the model matters
    }
    return MegaConfig(**({name: getattr(config, name) for name in MegaConfig.__annotations__} | changes))


def run_self_test(config: MegaConfig, parallel: ParallelConfig, world: World, dtype: str = "fp32") -> SelfTest:
    """Compare loss and gradients of a tiny model in this layout with those of one process; collective.

    In fp32, and then in the run's number format of forward and backward, where that is another.

    Raises:
        RuntimeError: they differ; names the parameter, the rank, and the size of the difference.
    """
    tiny = tiny_model(config, world.shape.tp)
    # Kernels for GPUs take 64 tokens or more; the last chunk is not filled.
    length = 9 * _CHUNK * world.shape.sp - 3 if tiny.use_chunking else 9 * _CHUNK
    generator = torch.Generator().manual_seed(_SEED)
    tokens = torch.randint(2, tiny.vocab_size, (2 * world.shape.dp, length + 1), generator=generator)
    inputs, labels = tokens[:, :-1].to(world.device), tokens[:, 1:].to(world.device)
    alone = _alone(tiny, inputs, labels, world.device)
    errors = {form: _compare(tiny, inputs, labels, parallel, world, form, alone) for form in ("fp32", dtype)}
    return SelfTest(len(alone[1]), errors["fp32"])


def _compare(
    tiny: MegaConfig,
    inputs: Tensor,
    labels: Tensor,
    parallel: ParallelConfig,
    world: World,
    dtype: str,
    alone: tuple[float, dict[str, Tensor]],
) -> float:
    """The largest difference on any rank."""
    expected_loss, expected = alone
    engine = parallelize(
        on_meta(MegaForCausalLM, tiny),
        seeded_values(tiny, _SEED),
        EngineConfig(parallel, dtype, micro_batch_size=2, max_grad_norm=0.0, seed=_SEED),
        world,
        # One step at rate 1 moves every weight by its gradient, whatever an engine calls it.
        lambda model: torch.optim.SGD(model.parameters(), lr=1.0),
    )
    engine.module.train()
    before = {name: engine.local_tensor(name).clone() for name, _ in engine.module.named_parameters()}
    first = 2 * world.dp.rank
    rows = slice(first, first + 2)
    share = engine.forward(inputs[rows], labels[rows], _ITEMS, Place(0, first))
    engine.backward(share, last=True)
    engine.step(1.0)
    table = shardings(engine.module)
    least = 1e-3 * max(float(tensor.abs().max()) for tensor in expected.values())
    worst, worst_name = 0.0, ""
    for name, old in before.items():
        whole = expected[table[name].source]
        reference = engine.local_shard(name, table[name].local(whole, world.at.tp, world.shape.tp))
        gradient = old - engine.local_tensor(name)
        error = float((gradient - reference).abs().max()) if gradient.numel() else 0.0
        # The gradient of the keys' bias is zero under softmax but for rounding.
        error /= max(float(whole.abs().max()), least)
        if not error <= worst:  # a NaN is the worst
            worst, worst_name = error, name
    loss = float(world.sum(share, alike=("tp",)))
    engine.close()

    worst = max(worst, abs(loss - expected_loss) / abs(expected_loss))
    errors = world.sum(torch.nn.functional.one_hot(torch.tensor(world.rank), world.size).double() * worst)
    if not bool((errors <= _TOLERANCES[dtype]).all()):
        raise RuntimeError(
            f"self-test: {dtype} gradients of rank {int(errors.argmax())} of {world.shape} differ from those of one "
            f"process by {float(errors.max()):.1e} (rank {world.rank}: {worst:.1e}, in {worst_name or 'loss'}; loss "
            f"{loss:.6f}, of one process {expected_loss:.6f}), so those of the run would be wrong: choose another "
            "layout, or set parallel.self_test=false only if you know better"
        )
    return float(errors.max())


def _alone(config: MegaConfig, inputs: Tensor, labels: Tensor, device: torch.device) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by name of the state dict, of the whole batch in this process."""
    model = on_meta(MegaForCausalLM, config)
    parallelism = apply_model_parallelism(
        model, sp=ALONE, tp=ALONE, checkpointing=ActivationCheckpointing(), seed=_SEED
    )

    def place(old: nn.Parameter, value: Tensor) -> nn.Parameter:
        return nn.Parameter(value.to(device, copy=True))

    fill(model, seeded_values(config, _SEED), place, device, template=parallelism.template)
    model.train()
    parallelism.row_slice.take(Place(), inputs, labels)
    with parallelism.row_slice:
        output = model(
            input_ids=inputs, shift_labels=labels, num_items_in_batch=_ITEMS, use_cache=False, skip_logits=True
        )
    output.loss.backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    table = by_source(shardings(model))
    return float(output.loss.detach()), {name: assemble(parts, gradients.__getitem__) for name, parts in table.items()}
