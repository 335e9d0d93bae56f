"""What megalodon/check.py asks of a package: the models, and single functions as the package computes them."""

import torch

from mega_scale.model import MegalodonConfig, MegalodonForCausalLM, MegalodonModel
from mega_scale.model.cache import MegaCache
from mega_scale.model.megalodon_layers import MegalodonAttention, MegalodonComplexEma, RotaryTurns
from mega_scale.model.rows import read_rows
from mega_scale.ops.timestep_norm import Moments, timestep_norm

__all__ = ["MegalodonConfig", "MegalodonForCausalLM", "MegalodonModel"]


def op_cema(x, alpha, delta, theta, gamma, omega, state=None, starts=None, valid=None):
    """The layer itself; its parameters are the given tensors, so that gradients reach them."""
    config = MegalodonConfig(hidden_size=len(alpha), ema_projection_size=alpha.shape[1], timestep_norm_groups=1)
    with torch.device("meta"):
        layer = MegalodonComplexEma(config)
    parameters = {"alpha": alpha, "delta": delta, "theta": theta, "gamma": gamma, "omega": omega}
    x = x if valid is None else x * valid[..., None]  # as the timestep norm leaves it
    y, _, state = call(layer, parameters, x, state, starts)
    return y, state


def op_timestep_norm(x, weight, bias, groups, eps, state=None, starts=None, valid=None):
    """State: count (B,) int64, mean and population variance (B, G)."""
    return timestep_norm(x, weight, bias, groups, eps, None if state is None else Moments(*state), starts, valid)


def op_normalized_attention(z, v, gamma, beta, heads, chunk, rope_base, eps, starts=None, valid=None):
    """The layer between its projections and its gates."""
    config = MegalodonConfig(
        num_attention_heads=heads,
        shared_representation_size=z.shape[2],
        intermediate_size=v.shape[2],
        chunk_size=chunk,
        rope_base=rope_base,
        norm_eps=eps,
    )
    with torch.device("meta"):
        layer = MegalodonAttention(config).eval()
    mask, pads, borders = read_rows(valid, starts, {}, None, z, chunk=chunk, positional=True)
    q, k = layer.gates.normalized_queries_and_keys(z, gamma, beta, heads, eps)
    q, k = layer.turn(q, k, RotaryTurns.at(0, pads, z, config))
    return layer.attend(q, k, v, mask, pads, None, False, False, borders)[0]


def call(layer, parameters, *args):
    """Run a layer with tensors in place of its parameters, without copies."""
    return torch.func.functional_call(layer, parameters, args, strict=True)


def cache_states(cache: MegaCache):
    """What a cache holds: cema (B, D, N, 2), count (B,), mean and var (B, G) of every block, and of the final norm."""
    states = {str(i): layer.state for i, layer in enumerate(cache.states)}
    moments = {name: state.norm for name, state in states.items()} | {"final": cache.final_norm}
    found = {f"{name}.cema": state.ema for name, state in states.items()}
    return found | {f"{name}.{key}": value for name, held in moments.items() for key, value in held._asdict().items()}
