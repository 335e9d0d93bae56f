"""Initial values of every parameter and persistent buffer: one table, one draw per tensor, whatever the layout."""

import torch
from torch import Tensor, nn

from mega_scale.model.attention import MegaMovingAverageGatedAttention
from mega_scale.model.configuration_mega import MegaConfig
from mega_scale.model.ema import MegaMultiDimensionDampedEma
from mega_scale.model.norm import MegaRMSNorm, MegaScaleNorm
from mega_scale.model.positional_bias import MegaRotaryRelativePositionalBias, MegaSimpleRelativePositionalBias


def initial_tensor(
    module: nn.Module, name: str, config: MegaConfig, generator: torch.Generator | None = None
) -> Tensor | None:
    """Draw the initial value of one parameter or buffer, as the reference does (transformers 4.37.2 `_init_weights`).

    Args:
        module: its owner; may lie on the meta device. Only its class and shapes are read.
        name: of the parameter or persistent buffer in `module`, without dots.
        config: of the model.
        generator: CPU generator; none means PyTorch's global one.

    Returns:
        The full tensor on the CPU, fp32 (integers keep their dtype); none when the module is not one of Mega's.
    """
    tensor: Tensor | None = module._parameters.get(name)
    if tensor is None:
        tensor = module._buffers[name]
    if tensor is None:
        return None
    shape = tensor.shape

    def normal(std: float) -> Tensor:
        return torch.empty(shape).normal_(0.0, std, generator=generator)

    if isinstance(module, MegaMultiDimensionDampedEma):
        if name in ("damping_factor", "decay_factor"):
            return normal(config.ema_delta_alpha_range)
        if name == "ema_expansion_matrix":
            alternating = torch.ones(shape[1], 1)
            alternating[1::2] = -1.0  # more stable than one sign for all (fairseq)
            return normal(config.ema_beta_range) + alternating
        return normal(config.ema_gamma_omega_range)
    if isinstance(module, MegaSimpleRelativePositionalBias):
        return normal(config.initializer_range)
    if isinstance(module, MegaRotaryRelativePositionalBias):
        return torch.zeros(shape) if name == "_float_tensor" else normal(config.initializer_range)
    if isinstance(module, MegaMovingAverageGatedAttention):
        return normal(config.initializer_range) if name == "qk_weight" else torch.zeros(shape)
    if isinstance(module, nn.Embedding):
        # Scaled embeddings enter the first block with unit variance, as in fairseq.
        weight = normal(config.hidden_size**-0.5 if config.scale_embeddings else config.initializer_range)
        if module.padding_idx is not None:
            weight[module.padding_idx] = 0.0
        return weight
    if isinstance(module, nn.Linear):
        return normal(config.initializer_range) if name == "weight" else torch.zeros(shape)
    if isinstance(module, (MegaScaleNorm, MegaRMSNorm, nn.LayerNorm, nn.modules.batchnorm._BatchNorm)):
        if name == "num_batches_tracked":
            return torch.zeros(shape, dtype=tensor.dtype)
        return torch.ones(shape) if name in ("scalar", "weight", "running_var") else torch.zeros(shape)
    return None
