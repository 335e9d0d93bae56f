"""How a model on one meta device becomes a model on all ranks: the order, stated once. And a test of the outcome.

Dropout of a parallel model depends on the position in the global batch only, so that every layout drops the same. The
test compares gradients of a tiny model with the run's options: a wrong reduction shows as a factor between gradients,
on some ranks or parameters only, and in no loss.

Legend: B rows, L tokens of this rank, D channels of this rank, K chunks, I queries, J keys.
"""

import hashlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from mega_scale.model.basic_layers import MegaDropout, use_own_linear
from mega_scale.ops import device_kind
from mega_scale.ops.elementwise import MOST_KEYS, PositionalDropout
from mega_scale.parallel.config import EngineConfig, ParallelConfig
from mega_scale.parallel.engine import BuildOptimizer, Engine, FsdpEngine
from mega_scale.parallel.mesh import check_segments, check_sequence_parallel, check_tensor_parallel
from mega_scale.parallel.shard import (
    Place,
    RowSlice,
    Values,
    assemble,
    by_source,
    fill,
    on_meta,
    seeded_values,
    separate_segments,
    shardings,
)
from mega_scale.parallel.world import ALONE, Axis, Received, World

_SEED = 11
_CHUNK = 8
# A gradient is read off the weights, which one step of SGD has moved: the loss is left undivided, so that it is large
# beside them and rounding gives about 1e-6.
_ITEMS = 1
# Of a gradient, by the number format of forward and backward: fp32 finds what is wrong by a percent on one rank, the
# run's own format what only its kernels and policies do.
_TOLERANCES = {"fp32": 1e-3, "bf16": 0.2}


class ParallelizeError(ValueError):
    """Settings contradict each other, or model or values do not fit the mesh or the engine, perhaps on one rank."""


def parallelize(
    model: PreTrainedModel, values: Values, config: EngineConfig, world: World, build_optimizer: BuildOptimizer
) -> Engine:
    """Put a model on all ranks: apply model parallelism, then shard, materialise, and build the optimizer.

    The model, a causal language model on the meta device, is changed in place; `values` are those of its parameters and
    persistent buffers, such as `seeded_values(model.config, seed)`. Raises ParallelizeError.
    """
    try:
        config.validate(world.size)
        sp, tp = world.axes["sp"], world.axes["tp"]
        row_slice = apply_model_parallelism(
            model,
            sp=sp,
            tp=tp,
            checkpointing=config.parallel,
            seed=config.seed,
            compile=config.compiles(world.device.type),
            fp8=config.fp8,
        )
        kind: type[Engine] = FsdpEngine
        if config.parallel.engine == "deepspeed":
            from mega_scale.parallel.deepspeed import DeepSpeedEngine

            kind = DeepSpeedEngine
        return kind(model, values, row_slice, config, world, build_optimizer)
    except ValueError as error:
        raise ParallelizeError(str(error)) from error


def apply_model_parallelism(
    model: PreTrainedModel,
    *,
    sp: Axis,
    tp: Axis,
    checkpointing: ParallelConfig,
    seed: int,
    compile: bool = False,
    fp8: bool = False,
) -> RowSlice:
    """Share rows over `sp` and channels over `tp`, make dropout independent of both, and checkpoint activations.

    Changes a model on the meta device in place; raises ValueError where it does not fit the mesh. Returns what tells
    the model which part of the global batch it computes.
    """
    config = model.config
    check_segments(config, checkpointing.activation_checkpoint_segment, checkpointing.activation_checkpoint, sp.size)
    check_sequence_parallel(config, sp.size * (config.attention_chunk or 1), sp.size)
    row_slice = RowSlice(sp.rank, sp.size, config.attention_chunk or 1)
    received = Received(saves_matmuls=checkpointing.activation_checkpoint_policy == "save_matmuls")
    sp, tp = replace(sp, received=received), replace(tp, received=received)

    use_own_linear(model)
    separate_segments(model)
    if sp.size > 1:
        from mega_scale.parallel.plans import share_rows

        share_rows(model, sp, row_slice)
    for name, module in list(model.named_modules()):
        if isinstance(module, MegaDropout) and module.p > 0:
            heads = config.num_attention_heads * tp.rank // tp.size
            # Of the average, every rank has all channels.
            shared = ALONE if name.endswith(".ema_dropout") else tp
            module.drop = _Drop(module, f"{seed}:{{step}}:{name}", row_slice, shared, heads)
    if tp.size > 1:
        from mega_scale.parallel.plans import divide

        check_tensor_parallel(config, tp.size)
        divide(model, tp)
        if config.tie_word_embeddings:
            model.get_output_embeddings().weight = model.get_input_embeddings().weight
    if fp8:
        multiply_in_fp8(model)
    if compile:
        from mega_scale.parallel.activation_checkpoint import recomputed_blocks
        from mega_scale.parallel.compiled_blocks import compile_blocks

        saving = checkpointing.activation_checkpoint_policy == "save_matmuls"
        row_slice.compiled = compile_blocks(model, recomputed_blocks(model, checkpointing) if saving else ())
    if checkpointing.activation_checkpoint:
        from mega_scale.parallel.activation_checkpoint import checkpoint_activations

        checkpoint_activations(model, checkpointing, row_slice, received.contexts)
    return row_slice


def multiply_in_fp8(model: PreTrainedModel) -> None:
    """Have the linear layers of a model's blocks multiply in fp8, forward and backward, by torchao.

    Weights stay as they are, with their names: they, tokens and gradients are each scaled by their largest number and
    rounded where they are multiplied. Layers with widths that are no multiples of 16, which matrix units do not take,
    stay in bf16. Without a GPU, rounding is as on one and products are in the layers' dtype.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    emulated = device_kind(torch.device("cuda" if torch.cuda.is_available() else "cpu")) != "cuda"
    # A micro-batch may have any number of tokens, over which gradients of weights are summed.
    config = Float8LinearConfig(pad_inner_dim=True, emulate=emulated)
    convert_to_float8_training(
        model.base_model.layers,
        module_filter_fn=lambda layer, _: not layer.in_features % 16 and not layer.out_features % 16,
        config=config,
    )


class _Drop:
    """What a module drops, by position, on this rank."""

    place: Tensor | None = None  # in compiled blocks (3,) int64: key, first row and first token of the micro-batch

    def __init__(self, module: MegaDropout, key: str, row_slice: RowSlice, tp: Axis, first_head: int) -> None:
        self.module, self.row_slice, self.tp, self.first_head = module, row_slice, tp, first_head
        self._key = key  # with a place for the step

    def key(self, step: int) -> int:
        digest = hashlib.blake2b(self._key.format(step=step).encode(), digest_size=4).digest()
        return int.from_bytes(digest, "little")

    def at(self, first_column: int) -> PositionalDropout:
        p, featurewise = self.module.p, self.module.featurewise
        if torch.compiler.is_compiling():  # to which numbers are part of the program, that of the first step
            assert self.place is not None
            return PositionalDropout(p, 0, 0, 0, first_column, featurewise, self.place)
        place, first_token = self.row_slice.place, self.row_slice.first_token
        return PositionalDropout(p, self.key(place.step), place.first_row, first_token, first_column, featurewise)

    def of_weights(self) -> PositionalDropout:
        """For attention weights (B, K, [H,] I, J)."""
        return self.at(MOST_KEYS * self.first_head)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """For x (B, L, D)."""
        return self.at(self.tp.rank * x.shape[2])(x, residual)


def tiny_model(config: Any, tp: int) -> Any:
    """The run's model with its options and few channels, all widths divisible by `tp` ranks."""
    width, heads = 8 * tp, config.num_attention_heads
    # Several heads a rank, one, or several ranks a head.
    heads = tp * min(heads // tp, 2) if heads % tp == 0 else heads
    changes = {
        "vocab_size": 2 * width,
        **dict.fromkeys(("hidden_size", "intermediate_size", "nffn_hidden_size"), width),
        "num_attention_heads": heads,
        "shared_representation_size": 8 * heads,
        "timestep_norm_groups": 2 * tp,
        "ema_projection_size": min(config.ema_projection_size, 4),
        "num_hidden_layers": 2,
        "max_positions": 128,
        "chunk_size": _CHUNK if config.attention_chunk else config.chunk_size,
        "pad_token_id": 1,
        "initializer_range": 0.2,  # so that every part of the model matters
    }
    kind = type(config)
    kept = {name: getattr(config, name) for name in kind.__annotations__}
    return kind(**(kept | {name: value for name, value in changes.items() if name in kept}))


def run_self_test(config: Any, how: EngineConfig, world: World) -> tuple[int, float]:
    """Compare loss and gradients of a tiny model in this layout with those of one process; collective.

    In fp32, then in the run's number format of forward and backward, where that is another, and then in that by
    compiled blocks, where the run compiles them. `how` is what the run's engine is told. Returns, the same on all
    ranks, how many gradients were compared, and in fp32 the largest difference of one as a share of its largest number.
    Raises RuntimeError where they differ, which names the form, the parameter, the rank, and the size of the
    difference.
    """
    tiny = tiny_model(config, world.shape.tp)
    # Kernels for GPUs take 64 tokens or more; the last chunk is not filled.
    length = 9 * _CHUNK * world.shape.sp - 3 if tiny.attention_chunk else 9 * _CHUNK
    generator = torch.Generator().manual_seed(_SEED)
    tokens = torch.randint(2, tiny.vocab_size, (2 * world.shape.dp, length + 1), generator=generator)
    inputs, labels = tokens[:, :-1].to(world.device), tokens[:, 1:].to(world.device)

    # One process: loss and gradients by name of the state dict, of the whole batch.
    model = on_meta(AutoModelForCausalLM.from_config, tiny)
    row_slice = apply_model_parallelism(model, sp=ALONE, tp=ALONE, checkpointing=ParallelConfig(), seed=_SEED)
    values, whole, device = seeded_values(tiny, _SEED), on_meta(AutoModelForCausalLM.from_config, tiny), world.device
    fill(model, values, lambda old, value: nn.Parameter(value.to(device, copy=True)), device, template=whole)
    model.train()
    row_slice.take(Place(), inputs, labels)
    with row_slice:
        loss = model(
            input_ids=inputs, shift_labels=labels, num_items_in_batch=_ITEMS, use_cache=False, skip_logits=True
        ).loss
    loss.backward()
    own = dict(model.named_parameters(remove_duplicate=False))
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in own.items()}
    sources = by_source(shardings(model)).items()
    expected = {source: assemble(parts, gradients.__getitem__) for source, parts in sources}
    # Eager ones first: where they pass, what compiled ones differ by is the compiler's.
    forms = dict.fromkeys((("fp32", False), (how.dtype, False), (how.dtype, how.compiles(world.device.type))))
    errors = [_compare(tiny, inputs, labels, how.parallel, world, form, loss.item(), expected) for form in forms]
    return len(expected), errors[0]


def _compare(
    tiny: Any,
    inputs: Tensor,
    labels: Tensor,
    parallel: ParallelConfig,
    world: World,
    form: tuple[str, bool],
    expected_loss: float,
    expected: dict[str, Tensor],
) -> float:
    """The largest difference of a form: a number format, and whether blocks are compiled."""
    dtype, compiled = form
    engine = parallelize(
        on_meta(AutoModelForCausalLM.from_config, tiny),
        seeded_values(tiny, _SEED),
        EngineConfig(parallel, dtype, micro_batch_size=2, max_grad_norm=0.0, seed=_SEED, compile=compiled),
        world,
        # One step at rate 1 moves every weight by its gradient, whatever an engine calls it.
        lambda model: torch.optim.SGD(model.parameters(), lr=1.0),
    )
    engine.module.train()
    before = {name: (local.start, engine.local_tensor(name).clone()) for name, local in engine.state().tensors.items()}
    first = 2 * world.shape.dp_rank(world.rank)
    rows = slice(first, first + 2)
    share = engine.forward(inputs[rows], labels[rows], _ITEMS, Place(0, first))
    engine.backward(share, last=True)
    engine.step(1.0)
    table = shardings(engine.module)
    least = 1e-3 * max(float(tensor.abs().max()) for tensor in expected.values())
    worst, worst_name = 0.0, ""
    for name, (start, old) in before.items():
        whole = expected[table[name].source]
        reference = table[name].local(whole, world.axes["tp"].rank, world.shape.tp).flatten()
        if len(old) < len(reference):
            reference = reference[start : start + len(old)]
        gradient = old - engine.local_tensor(name)
        error = float((gradient - reference).abs().max()) if gradient.numel() else 0.0
        # The gradient of the keys' bias is zero under softmax but for rounding.
        error /= max(float(whole.abs().max()), least)
        if not error <= worst:  # a NaN is the worst
            worst, worst_name = error, name
    loss = float(world.sum(share, alike=("tp",)))
    engine.close()
    if compiled:
        torch.compiler.reset()  # else its graphs would count among those that the run may compile

    worst = max(worst, abs(loss - expected_loss) / abs(expected_loss))
    errors = world.all_gather(torch.tensor(worst, dtype=torch.float64))
    if not bool((errors <= _TOLERANCES[dtype]).all()):
        remedy = "set train.compile=false, as eager blocks are right" if compiled else "choose another layout"
        raise RuntimeError(
            f"self-test: {'compiled ' * compiled}{dtype} gradients of rank {int(errors.argmax())} of {world.shape} "
            f"differ from those of one process by {float(errors.max()):.1e} (rank {world.rank}: {worst:.1e}, in "
            f"{worst_name or 'loss'}; loss {loss:.6f}, of one process {expected_loss:.6f}), so those of the run would "
            f"be wrong: {remedy}, or set parallel.self_test=false only if you know better"
        )
    return float(errors.max())
