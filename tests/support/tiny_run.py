"""A tiny model, a global batch a step, and the same training run by an engine and by plain PyTorch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mega_scale.model import MegaConfig, MegalodonConfig, causal_lm_class
from mega_scale.parallel import Engine, EngineConfig, ParallelConfig, World, parallelize, seeded_values
from mega_scale.parallel.shard import fill

STEPS = 5
ACCUMULATION = 2
ROWS = 8
LENGTH = 16
SEED = 3
MAX_GRAD_NORM = 0.4
LEARNING_RATES = [3e-3, 1e-2, 8e-3, 5e-3, 2e-3]


def tiny_config(model_type: str = "mega", **changes: Any) -> Any:
    """Odd sizes, so that nothing divides by the number of ranks."""
    if model_type == "megalodon":
        return _tiny_megalodon(**changes)
    settings: dict[str, Any] = {
        "vocab_size": 67,
        "hidden_size": 18,
        "num_hidden_layers": 3,
        "intermediate_size": 21,
        "ema_projection_size": 3,
        "shared_representation_size": 10,
        "nffn_hidden_size": 23,
        "use_chunking": True,
        "chunk_size": 8,
        "is_decoder": True,
        "bidirectional": False,
        "normalization_type": "layernorm",
        "dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "nffn_activation_dropout_prob": 0.0,
        "initializer_range": 0.2,
    }
    return MegaConfig(**(settings | changes))


def _tiny_megalodon(**changes: Any) -> MegalodonConfig:
    settings: dict[str, Any] = {
        "vocab_size": 67,
        "hidden_size": 18,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "shared_representation_size": 18,
        "intermediate_size": 21,
        "nffn_hidden_size": 23,
        "ema_projection_size": 3,
        "timestep_norm_groups": 3,
        "chunk_size": 8,
        "swiglu": True,
        "rescale_nffn": True,
        "pad_token_id": None,
    }
    return MegalodonConfig(**(settings | changes))


def meta_model(config: Any) -> Any:
    """The causal language model of a configuration of either family."""
    with torch.device("meta"):
        return causal_lm_class(config)(config)


def build_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """Groups by name: a partitioned parameter has lost its shape."""
    named = dict(model.named_parameters())
    decaying = [parameter for name, parameter in named.items() if name.endswith("weight")]
    others = [parameter for name, parameter in named.items() if not name.endswith("weight")]
    groups = [{"params": decaying, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    # Attention does not depend on the keys' bias: its gradient is rounding noise, which a smaller eps would blow up.
    return torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-6, fused=True)


def global_batch(step: int) -> tuple[Tensor, Tensor, int]:
    """Inputs, next tokens and their number; rows have 0 to 14 labels, so every micro-batch has another number."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(3, 67, (ROWS, LENGTH + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    for row in range(ROWS):
        labels[row, 2 * row :] = -100
    return tokens[:, :-1].contiguous(), labels, int((labels != -100).sum())


def micro_batches(step: int, world: World) -> tuple[list[tuple[Tensor, Tensor]], int]:
    inputs, labels, count = global_batch(step)
    rows = ROWS // world.size // ACCUMULATION
    starts = [(world.rank * ACCUMULATION + i) * rows for i in range(ACCUMULATION)]
    return [(inputs[s : s + rows], labels[s : s + rows]) for s in starts], count


def plain_run(config: Any, steps: int = STEPS) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, gradient norms and final weights of one process without any engine, one forward a step."""
    model = meta_model(config)
    fill(model, seeded_values(config, SEED), lambda old, value: nn.Parameter(value), torch.device("cpu"))
    optimizer = build_optimizer(model)
    losses, norms = [], []
    for step in range(steps):
        inputs, labels, count = global_batch(step)
        loss = model(input_ids=inputs, shift_labels=labels, num_items_in_batch=count, use_cache=False).loss
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATES[step]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, norms, {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def make_engine(
    world: World,
    settings: dict[str, Any],
    dtype: str = "fp32",
    weight_average: float = 0.0,
    fp8: bool = False,
    compiled: bool = False,
    **changes: Any,
) -> Engine:
    config = tiny_config(**changes)
    return parallelize(
        meta_model(config),
        seeded_values(config, SEED),
        EngineConfig(
            ParallelConfig(**settings),
            dtype=dtype,
            micro_batch_size=ROWS // world.size // ACCUMULATION,
            accumulation=ACCUMULATION,
            max_grad_norm=MAX_GRAD_NORM,
            weight_average=weight_average,
            fp8=fp8,
            compile=compiled,
        ),
        world,
        build_optimizer,
    )


def train(
    engine: Engine, world: World, steps: range, between: Callable[[Engine], None] | None = None
) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of some steps; `between` runs after each of them."""
    losses, norms = [], []
    for step in steps:
        batches, count = micro_batches(step, world)
        total = torch.zeros((), device=world.device)
        torch.manual_seed(1000 * step + world.rank)
        for i, (inputs, labels) in enumerate(batches):
            loss = engine.forward(inputs.to(world.device), labels.to(world.device), count)
            engine.backward(loss, last=i == len(batches) - 1)
            total += loss.detach()
        losses.append(float(world.sum(total)))
        norms.append(engine.step(LEARNING_RATES[step]))
        if between is not None:
            between(engine)
    return losses, norms
