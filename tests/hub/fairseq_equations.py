"""The original fairseq models from their equations and tensor names alone: one token, one pair of positions at a time.

Shares nothing with the package: what it converts is checked against this.
"""

import math
from dataclasses import dataclass

import torch

PREFIX = {"lm": "decoder.", "encoder": "encoder.", "lra": "encoder.encoder.", "mlm": "mega."}


@dataclass(frozen=True)
class Options:
    """fairseq's options of a model, in its words."""

    layout: str = "lm"
    vocabulary: int = 13
    embed_dim: int = 6
    hidden_dim: int = 10
    ffn_dim: int = 9
    z_dim: int = 4
    n_dim: int = 3
    layers: int = 2
    chunk_size: int = -1
    max_positions: int = 24
    truncation: int | None = None
    norm: str = "layernorm"
    normalize_before: bool = True
    attention: str = "softmax"
    rel_pos_bias: str = "rotary"
    scale_embedding: bool = True
    shared_output: bool = True
    cross_attention: bool = False
    ema_input: str = "delta"

    @property
    def causal(self):
        return self.layout == "lm"

    @property
    def final_norm(self):
        return self.normalize_before and self.layout != "mlm"

    @property
    def embedding(self):
        names = {"lra": "embed_tokens.embed.weight", "mlm": "embedding_layer.weight"}
        return PREFIX[self.layout] + names.get(self.layout, "embed_tokens.weight")

    def block(self, number):
        return f"{PREFIX[self.layout]}{'encoders' if self.layout == 'mlm' else 'layers'}.{number}."


def norm_shapes(prefix, norm, width, affine=True):
    if norm == "scalenorm":
        return {f"{prefix}norm.scalar": (1,)} if affine else {}
    shapes = {}
    if affine:
        shapes[f"{prefix}norm.weight"] = (width,)
        if norm != "rmsnorm":
            shapes[f"{prefix}norm.bias"] = (width,)
    if norm == "batchnorm":
        shapes |= {f"{prefix}norm.running_mean": (width,), f"{prefix}norm.running_var": (width,)}
        shapes[f"{prefix}norm.num_batches_tracked"] = ()
    return shapes


def linear_shapes(name, inputs, outputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def bias_shapes(prefix, options, positions):
    if options.rel_pos_bias == "simple":
        return {f"{prefix}rel_pos_bias.rel_pos_bias": (2 * positions - 1,)}
    pair = {f"{prefix}rel_pos_bias.{name}": (1, options.z_dim) for name in ("alpha", "beta")}
    return pair | {f"{prefix}rel_pos_bias._float_tensor": (1,)}


def block_shapes(prefix, options):
    d, e, z, n = options.embed_dim, options.hidden_dim, options.z_dim, options.n_dim
    rows = d if options.causal else 2 * d
    mega = f"{prefix}mega_layer."
    shapes = {f"{mega}move.{name}": (rows, n, 1) for name in ("delta", "alpha", "beta")}
    shapes |= {f"{mega}move.gamma": (rows, n), f"{mega}move.omega": (d,), f"{mega}gamma": (2, z), f"{mega}beta": (2, z)}
    shapes |= norm_shapes(f"{mega}norm.", options.norm, d)
    shapes |= linear_shapes(f"{mega}v_proj", d, e) | linear_shapes(f"{mega}mx_proj", d, z + e + 2 * d)
    shapes |= linear_shapes(f"{mega}h_proj", e, d)
    shapes |= bias_shapes(mega, options, options.chunk_size if options.chunk_size > 0 else options.max_positions)
    if options.cross_attention:
        cross = f"{prefix}cross_attn."
        shapes |= norm_shapes(f"{cross}norm.", options.norm, d) | bias_shapes(cross, options, options.max_positions)
        for name, width in (("k_proj", z), ("v_proj", d), ("q_proj", 2 * d + z), ("h_proj", d)):
            shapes |= linear_shapes(cross + name, d, width)
    if options.ffn_dim:
        shapes |= norm_shapes(f"{prefix}nffn.norm.", options.norm, d)
        shapes |= linear_shapes(f"{prefix}nffn.fc1", d, options.ffn_dim)
        shapes |= linear_shapes(f"{prefix}nffn.fc2", options.ffn_dim, d)
    return shapes


def model_shapes(options):
    """Every name of the model's state dict, with its shape."""
    prefix, d = PREFIX[options.layout], options.embed_dim
    shapes = {options.embedding: (options.vocabulary, d)}
    if options.layout in ("lm", "encoder"):
        shapes[f"{prefix}version"] = (1,)
    for number in range(options.layers):
        shapes |= block_shapes(options.block(number), options)
    if options.final_norm:
        affine = not options.causal or options.cross_attention
        shapes |= norm_shapes(f"{prefix}final_norm.", options.norm, d, affine)
    if options.layout == "lm":
        shapes[f"{prefix}output_projection.weight"] = (options.vocabulary, d)
    if options.layout == "mlm":
        shapes |= linear_shapes("mlm_head", d, options.vocabulary)
    return shapes


def random_state(options, seed=0):
    """A model whose every number is random, except what fairseq or its options fix."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator) * 0.4 for name, shape in model_shapes(options).items()}
    for name, tensor in state.items():
        parameter = name.rpartition(".")[2]
        if parameter in ("scalar", "running_var") or (parameter == "weight" and ".norm.norm." in name):
            tensor.abs_().add_(0.5)
        elif parameter == "num_batches_tracked":
            state[name] = torch.tensor(7)
        elif parameter == "version":
            tensor.fill_(3)
        if "final_norm.norm." in name and parameter in ("weight", "bias", "scalar"):
            tensor.fill_(parameter != "bias")
    if options.layout == "lm" and options.shared_output:
        state["decoder.output_projection.weight"] = state[options.embedding]
    return state


def silu(x):
    return x / (1 + torch.exp(-x))


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


class Model:
    """The equations, in double precision."""

    def __init__(self, options, state):
        self.options = options
        self.state = {name: tensor.double() for name, tensor in state.items()}

    def hidden(self, tokens):
        """Output of the last layer for one sequence (L,), (L, D)."""
        x = self.state[self.options.embedding][tokens]
        if self.options.scale_embedding:
            x = x * math.sqrt(self.options.embed_dim)
        for number in range(self.options.layers):
            prefix = self.options.block(number)
            x = self.mega(f"{prefix}mega_layer.", x)
            if self.options.ffn_dim:
                x = self.feed_forward(f"{prefix}nffn.", x)
        if self.options.final_norm:
            x = self.norm(f"{PREFIX[self.options.layout]}final_norm.", x)
        return x

    def logits(self, tokens):
        """(L, V)."""
        name = "mlm_head" if self.options.layout == "mlm" else "decoder.output_projection"
        out = self.hidden(tokens) @ self.state[f"{name}.weight"].T
        return out + self.state[f"{name}.bias"] if f"{name}.bias" in self.state else out

    def linear(self, name, x):
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, prefix, x):
        one, zero = torch.ones(()).double(), torch.zeros(()).double()
        weight = self.state.get(f"{prefix}norm.weight", self.state.get(f"{prefix}norm.scalar", one))
        shift = self.state.get(f"{prefix}norm.bias", zero)
        rows = []
        for row in x:
            if self.options.norm == "batchnorm":
                centred = row - self.state[f"{prefix}norm.running_mean"]
                variance = self.state[f"{prefix}norm.running_var"]
            else:
                centred = row - row.mean() if self.options.norm == "layernorm" else row
                variance = (centred**2).mean()
            rows.append(weight * centred / torch.sqrt(variance + 1e-5) + shift)
        return torch.stack(rows)

    def feed_forward(self, prefix, x):
        before = self.options.normalize_before
        hidden = silu(self.linear(f"{prefix}fc1", self.norm(f"{prefix}norm.", x) if before else x))
        out = x + self.linear(f"{prefix}fc2", hidden)
        return out if before else self.norm(f"{prefix}norm.", out)

    def moving_average(self, prefix, x):
        d, n = self.options.embed_dim, self.options.n_dim
        alpha, delta = self.state[f"{prefix}alpha"][..., 0], self.state[f"{prefix}delta"][..., 0]
        beta, gamma = self.state[f"{prefix}beta"][..., 0], self.state[f"{prefix}gamma"]
        p = sigmoid(delta if self.options.ema_input == "delta" else alpha)
        q = 1 - p * sigmoid(alpha if self.options.ema_input == "delta" else delta)
        limit = self.options.truncation or len(x)

        def direction(part, order):
            # Sums over the past instead of a state, so that the kernel can be cut.
            seen, out = [], {}
            for t in order:
                seen.append(x[t])
                out[t] = torch.zeros(d).double()
                for lag, value in enumerate(reversed(seen[-limit:])):
                    taps = gamma[part] / math.sqrt(n) * p[part] * beta[part] * q[part] ** lag
                    out[t] += taps.sum(-1) * value
            return torch.stack([out[t] for t in range(len(x))])

        y = direction(slice(0, d), range(len(x)))
        if not self.options.causal:
            back = slice(d, 2 * d)
            y = y + direction(back, reversed(range(len(x))))
            if self.options.ema_input == "alpha":
                # That version of the code counts the token itself in one direction only.
                y = y - (gamma[back] / math.sqrt(n) * p[back] * beta[back]).sum(-1) * x
        return silu(y + self.state[f"{prefix}omega"] * x)

    def positional_bias(self, prefix, i, j):
        if self.options.rel_pos_bias == "simple":
            table = self.state[f"{prefix}rel_pos_bias.rel_pos_bias"]
            return table[(len(table) - 1) // 2 + j - i]

        def rotate(vector, position):
            half = self.options.z_dim // 2
            angle = position * 10000.0 ** (-torch.arange(half).double() / half)
            first, second = vector[:half], vector[half:]
            return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()])

        a, b = (self.state[f"{prefix}rel_pos_bias.{name}"][0] for name in ("alpha", "beta"))
        return rotate(a, i) @ rotate(b, j)

    def attention(self, prefix, q, k, v):
        chunk = self.options.chunk_size if self.options.chunk_size > 0 else len(q)
        out = []
        for t in range(len(q)):
            start = t // chunk * chunk
            keys = range(start, t + 1 if self.options.causal else min(start + chunk, len(q)))
            scale = 1 / math.sqrt(self.options.z_dim) if self.options.attention == "softmax" else 1 / len(keys)
            scores = [q[t] @ k[j] * scale + self.positional_bias(prefix, t - start, j - start) for j in keys]
            scores = torch.stack(scores)
            if self.options.attention == "softmax":
                weights = scores.exp() / scores.exp().sum()
            elif self.options.attention == "laplace":
                weights = (1 + torch.erf((scores - 0.707107) / (0.282095 * math.sqrt(2)))) / 2
            else:
                weights = scores.clamp_min(0) ** 2
            out.append(sum(weight * v[j] for weight, j in zip(weights, keys, strict=True)))
        return torch.stack(out)

    def mega(self, prefix, x):
        d, e, z = self.options.embed_dim, self.options.hidden_dim, self.options.z_dim
        before = self.options.normalize_before
        normed = self.norm(f"{prefix}norm.", x) if before else x
        v = silu(self.linear(f"{prefix}v_proj", normed))
        base = self.linear(f"{prefix}mx_proj", self.moving_average(f"{prefix}move.", normed))
        update, shared, gate, candidate = base[:, :d], base[:, d : d + z], base[:, d + z : d + z + e], base[:, -d:]
        kappa, mu = self.state[f"{prefix}gamma"], self.state[f"{prefix}beta"]
        q, k = (silu(shared) * kappa[row] + mu[row] for row in (0, 1))
        attended = self.attention(prefix, q, k, v) * silu(gate)
        hidden = silu(candidate + self.linear(f"{prefix}h_proj", attended))
        out = x + sigmoid(update) * (hidden - x)
        return out if before else self.norm(f"{prefix}norm.", out)
