"""What two ranks do with every engine; the tests look at what comes back."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import state_folder
import tiny_run
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mega_scale.parallel import Engine, EngineConfig, ParallelConfig, World, parallelize, seeded_values
from mega_scale.parallel.shard import assemble, by_source, shardings

# Nothing below the persistence threshold would be partitioned, and bugs of partitioning would not show.
_PARTITION_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
ENGINES: dict[str, dict[str, Any]] = {
    **{f"fsdp-{stage}": {"engine": "fsdp", "zero_stage": stage} for stage in (1, 2, 3)},
    **{f"zero-{stage}": {"engine": "deepspeed", "zero_stage": stage} for stage in (0, 1, 2)},
    "zero-3": {"engine": "deepspeed", "zero_stage": 3, "ds_config": _PARTITION_ALL},
}
CUT = 3
DROPOUT = {"dropout_prob": 0.1, "hidden_dropout_prob": 0.1, "nffn_activation_dropout_prob": 0.1}
WITH_DROPOUT = ("fsdp-3", "zero-3")


def parts(module: nn.Module) -> dict[str, Tensor]:
    """Parameters by their own names, tied ones included, whole but for what tp shards; collective."""
    full: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if isinstance(parameter, DTensor):
            full[name] = parameter.full_tensor().detach().clone()
        elif hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter]):
                full[name] = parameter.detach().clone()
        else:
            full[name] = parameter.detach().clone()
    return full


def gathered(module: nn.Module) -> dict[str, Tensor]:
    """Full tensors of the state dict, tied names included; collective."""
    local = parts(module)
    full = {source: assemble(names, local.__getitem__) for source, names in by_source(shardings(module)).items()}
    return full | {name: buffer.clone() for name, buffer in module.named_buffers()}


def study(folder: Path) -> dict[str, dict[str, Any]]:
    with World.start(ParallelConfig(timeout_s=120)) as world:
        return {key: _study_engine(key, world, folder / key) for key in ENGINES}


def _study_engine(key: str, world: World, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = _uninterrupted(key, world, folder)
    found["resumed"] = _resumed(key, world, folder)
    found["generating"] = _generating(key, world)
    found["bf16"] = _bf16(key, world, folder)
    found["recomputed"] = _checkpointed(key, world, 2, {})
    if key in WITH_DROPOUT:
        found["dropout"] = [_checkpointed(key, world, every, DROPOUT) for every in (0, 1)]
    return found | _materialised(key, world)


def _evaluate(engine: Engine) -> None:
    """A forward without backward, after which an engine may hold gathered weights."""
    with torch.no_grad():
        engine.module(input_ids=torch.ones(1, 8, dtype=torch.int64), use_cache=False)


def _uninterrupted(key: str, world: World, folder: Path) -> dict[str, Any]:
    engine = tiny_run.make_engine(world, ENGINES[key])
    start = gathered(engine.module)
    first = tiny_run.train(engine, world, range(CUT))
    _evaluate(engine)
    state_folder.save(engine, folder / "cut", world)
    at_cut = gathered(engine.module)
    second = tiny_run.train(engine, world, range(CUT, tiny_run.STEPS))
    state_folder.save(engine, folder / "straight", world)
    end = gathered(engine.module)
    engine.close()
    return {
        "start": start,
        "at_cut": at_cut,
        "end": end,
        "losses": first[0] + second[0],
        "norms": first[1] + second[1],
        "tied": engine.module.lm_head.weight is engine.module.mega.embedding_layer.word_embeddings.weight,
        "linear_restored": nn.functional.linear.__module__ != "deepspeed.runtime.zero.linear",
    }


def _resumed(key: str, world: World, folder: Path) -> dict[str, Any]:
    engine = tiny_run.make_engine(world, ENGINES[key])
    _evaluate(engine)
    state_folder.load(engine, folder / "cut", world)
    at_cut = gathered(engine.module)
    losses, norms = tiny_run.train(engine, world, range(CUT, tiny_run.STEPS))
    state_folder.save(engine, folder / "resumed", world)
    end = gathered(engine.module)
    engine.close()
    return {"at_cut": at_cut, "end": end, "losses": losses, "norms": norms}


def _generating(key: str, world: World) -> dict[str, Any]:
    """Evaluation between steps, and generation after two of them."""
    texts, evaluations = [], []

    def between(engine: Engine) -> None:
        inputs, labels, count = tiny_run.global_batch(50)
        engine.module.eval()
        with torch.no_grad():
            evaluations.append(float(engine.forward(inputs, labels, count)))
            given = {"input_ids": inputs, "shift_labels": labels, "num_items_in_batch": count}
            direct = engine.module(**given, use_cache=False, skip_logits=True)
            evaluations.append(float(direct.loss))
            if len(evaluations) in (2, 8):
                given = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None}
                texts.append(engine.module.generate(inputs[:1, :5], **given))
        engine.module.train()

    engine = tiny_run.make_engine(world, ENGINES[key])
    losses, norms = tiny_run.train(engine, world, range(tiny_run.STEPS), between)
    engine.close()
    return {"losses": losses, "norms": norms, "texts": texts, "evaluations": evaluations}


def _bf16(key: str, world: World, folder: Path) -> dict[str, Any]:
    """As without rounding, and after `CUT` steps from the weights that there were then.

    Of the differences, this leaves what rounding makes, and less of what optimizer steps make of that: in five steps
    on end, one seed in ten has norms further off than the test's bound.
    """
    engine = tiny_run.make_engine(world, ENGINES[key], dtype="bf16")
    seen: dict[str, Any] = {}
    ema = engine.module.get_submodule("mega.layers.1.mega_layer.ema_gate")
    linear = engine.module.get_submodule("mega.layers.1.nffn.fc1")

    def look_at_ema(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.setdefault("ema", {name: tensor.detach().clone() for name, tensor in module.named_parameters()})

    def look_at_linear(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.setdefault("linear", output.dtype)

    hooks = [ema.register_forward_pre_hook(look_at_ema), linear.register_forward_hook(look_at_linear)]
    losses, norms = tiny_run.train(engine, world, range(CUT))
    state_folder.load(engine, folder / "cut", world)
    more = tiny_run.train(engine, world, range(CUT, tiny_run.STEPS))
    for hook in hooks:
        hook.remove()
    seen["masters"] = {tensor.dtype for tensor in gathered(engine.module).values()}
    with torch.no_grad():
        inputs, labels, count = tiny_run.global_batch(50)
        seen["direct"] = engine.module(input_ids=inputs, use_cache=False).logits.dtype
        seen["text"] = engine.module.generate(inputs[:1, :5], max_new_tokens=6, do_sample=False, eos_token_id=None)
        cache = engine.module(input_ids=inputs[:1, :5], use_cache=True).past_key_values
        later = engine.module(input_ids=inputs[:1, 5:6], past_key_values=cache, use_cache=True).past_key_values
        seen["cache"] = (later is cache, later.states[0].state.ema.dtype)
        seen["evaluation"] = float(engine.forward(inputs, labels, count))
    engine.close()
    return seen | {"losses": losses + more[0], "norms": norms + more[1]}


def _checkpointed(key: str, world: World, every: int, changes: dict[str, Any]) -> dict[str, Any]:
    engine = tiny_run.make_engine(world, ENGINES[key] | {"activation_checkpoint": every}, **changes)
    calls = [0, 0, 0]

    def count(number: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[number] += 1

        return hook

    hooks = [engine.module.get_submodule(f"mega.layers.{i}.nffn.fc1").register_forward_hook(count(i)) for i in range(3)]
    losses, norms = tiny_run.train(engine, world, range(2))
    for hook in hooks:
        hook.remove()
    forwards = [number // (2 * tiny_run.ACCUMULATION) for number in calls]
    end = gathered(engine.module)
    engine.close()
    return {"losses": losses, "norms": norms, "end": end, "forwards": forwards}


def _materialised(key: str, world: World) -> dict[str, Any]:
    """How many full values are alive at once, which share of the parameters stays here."""
    config = tiny_run.tiny_config()
    draw = seeded_values(config, tiny_run.SEED)
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def values(name: str, owner: nn.Module, local_name: str) -> Tensor:
        nonlocal most
        value = draw(name, owner, local_name)
        if local_name in owner._parameters:
            alive.append(weakref.ref(value))
        most = max(most, sum(reference() is not None for reference in alive))
        return value

    engine = parallelize(
        tiny_run.meta_model(config),
        values,
        EngineConfig(
            ParallelConfig(**ENGINES[key]), micro_batch_size=2, accumulation=tiny_run.ACCUMULATION, max_grad_norm=0.0
        ),
        world,
        tiny_run.build_optimizer,
    )
    local = total = 0
    for parameter in engine.module.parameters():
        if isinstance(parameter, DTensor):
            local, total = local + parameter.to_local().numel(), total + parameter.numel()
        elif hasattr(parameter, "ds_tensor"):
            local, total = local + parameter.ds_tensor.numel(), total + parameter.ds_numel
        else:
            local, total = local + parameter.numel(), total + parameter.numel()
    engine.close()
    return {"full_values": most, "share": local / total}
