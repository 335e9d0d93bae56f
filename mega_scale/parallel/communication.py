"""What a block sends in one micro-batch, on paper: per rank, forward and backward, in bytes.

Legend: B rows and L tokens of a micro-batch, D channels, N averages, P = sp, T = tp, W = dp_shard x sp ranks over which
parameters are sharded, e bytes of a number in compute, p numbers in a block.
"""

from typing import NamedTuple

import torch

from mega_scale.model import MegaConfig
from mega_scale.model.attention import MegaBlock
from mega_scale.parallel.config import ParallelConfig
from mega_scale.parallel.mesh import MeshShape


class Sends(NamedTuple):
    """One kind of communication.

    Args:
        axis: of the mesh.
        formula: in the letters above.
        forward: bytes a rank sends in the forward pass of a block.
        backward: bytes it sends in the backward pass.
    """

    axis: str
    formula: str
    forward: int
    backward: int


def per_block(
    config: MegaConfig, parallel: ParallelConfig, shape: MeshShape, *, rows: int, tokens: int, dtype: str
) -> list[Sends]:
    """Say what one block sends along each axis, recomputation and the pieces that ranks pass on for others left out.

    Args:
        config: of the model.
        parallel: engine and stage.
        shape: of the mesh.
        rows: B.
        tokens: L, of a whole row.
        dtype: fp32 or bf16, of compute.

    Returns:
        One entry for each axis along which something travels in every micro-batch; ZeRO stages below 3 send parameters
        and gradients once a step, and are left out.
    """
    found = []
    number = 2 if dtype == "bf16" else 4
    if shape.sp > 1:
        state = 4 * rows * config.ema_projection_size * config.hidden_size // shape.tp
        found.append(Sends("sp", "end states of the moving average, 4 B N D / T", state, state))
    if shape.tp > 1:
        own = -(-tokens // shape.sp)
        stream = rows * own * config.hidden_size * (shape.tp - 1) // shape.tp * number
        large = 5 if config.use_normalized_ffn else 3
        formula = f"{large} collectives, each B (L / P) D (T - 1) / T numbers of e = {number}"
        found.append(Sends("tp", formula, large * stream, large * stream))
    if shape.fsdp > 1 and parallel.zero_stage == 3:
        # DeepSpeed gathers parameters in fp32 and rounds them where they are used.
        gathered = number if parallel.engine == "fsdp" else 4
        once = block_parameters(config) // shape.tp * (shape.fsdp - 1) // shape.fsdp
        formula = f"(p / T) (W - 1) / W numbers, gathered twice with {gathered} and reduced with 4 bytes"
        found.append(Sends("dp_shard x sp", formula, gathered * once, (gathered + 4) * once))
    return found


def block_parameters(config: MegaConfig) -> int:
    """p, numbers in a block."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in MegaBlock(config).parameters())
