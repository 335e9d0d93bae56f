"""Models and engines of this project, as the benchmarks build them."""

import contextlib
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mega_scale import MegaConfig, MegaForCausalLM
from mega_scale.ops.elementwise import compile_gates
from mega_scale.parallel import Engine, EngineConfig, World, parallelize, seeded_values
from mega_scale.parallel.activation_checkpoint import checkpoint_activations
from mega_scale.parallel.config import ActivationCheckpointing
from mega_scale.parallel.sequence_parallel import ReceivedStates
from mega_scale.parallel.shard import RowSlice, Values
from mega_scale.training.config import OptimizerConfig, build_optimizer

from .peers import TrainingStep, mega_arguments


def model_config(sizes: dict[str, Any], **more: Any) -> MegaConfig:
    """Of a causal, chunked model without dropout; see `mega_arguments`."""
    return MegaConfig(**mega_arguments(sizes), **more)


class OurTraining(TrainingStep):
    """A training step of our model on one device, without an engine.

    Args:
        kind: `ours`, which writes its initial weights; `ours bf16` and `ours compiled`, which read them.
        sizes: of the model; `segment` is that of activation checkpointing, 0 keeps all activations.
        length: the longest sequence.
        weights: safetensors.
    """

    def __init__(self, kind: str, sizes: dict[str, Any], length: int, weights: str) -> None:
        torch.manual_seed(0)
        model = MegaForCausalLM(model_config(sizes, max_positions=length))
        if kind == "ours":
            save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, weights)
        else:
            model.load_state_dict(load_file(weights))
        if sizes["segment"]:
            how = ActivationCheckpointing(every=1, segment=sizes["segment"])
            checkpoint_activations(model, how, ReceivedStates(), RowSlice())
        if kind == "ours compiled":
            compile_gates(model)  # as train.compile does
        mixed = partial(torch.autocast, "cpu", torch.bfloat16) if kind == "ours bf16" else contextlib.nullcontext
        super().__init__(model, sizes["vocabulary"], {"skip_logits": True}, mixed)


def build_engine(
    config: MegaConfig,
    how: EngineConfig,
    world: World,
    values: Values | None = None,
    optimizer: OptimizerConfig | None = None,
) -> Engine:
    """The trainer's engine of a model, ready to train; with values from seed 0 and AdamW's defaults if not given."""
    with torch.device("meta"):
        model = MegaForCausalLM(config)
    settings = optimizer or OptimizerConfig()
    engine = parallelize(
        model, values or seeded_values(config, 0), how, world, lambda sharded: build_optimizer(sharded, settings)
    )
    engine.module.train()
    return engine
