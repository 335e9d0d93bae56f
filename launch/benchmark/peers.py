"""Models of transformers, and what is timed of them and of ours: a training step, a decoding step, a moving average.

Runs under the peer's Python too, which has torch, safetensors and transformers (4.37.2 for Mega), not mega_scale.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import transformers as _transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .harness import milliseconds, relative_error, watch_peak

transformers: Any = _transformers  # of whichever release the interpreter has
EMA_PARAMETERS = ("damping", "decay", "expansion", "projection")


def mega_arguments(sizes: dict[str, Any]) -> dict[str, Any]:
    """Configuration of a causal Mega without dropout, ours or transformers'; `chunk` 0 is the whole sequence."""
    return {
        "vocab_size": sizes["vocabulary"], "hidden_size": sizes["hidden"], "num_hidden_layers": sizes["layers"],
        "shared_representation_size": sizes["shared"], "intermediate_size": sizes["values"],
        "nffn_hidden_size": sizes.get("feed_forward", sizes["values"]), "ema_projection_size": sizes["states"],
        "use_chunking": sizes["chunk"] > 0, "chunk_size": sizes["chunk"] or -1, "is_decoder": True,
        "bidirectional": False, "add_token_type_embeddings": False, "dropout_prob": 0.0, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "nffn_activation_dropout_prob": 0.0,
        "normalization_type": sizes.get("normalization", "scalenorm"),
    }  # fmt: skip


def _mega(sizes: dict[str, Any], positions: int) -> nn.Module:
    config = transformers.MegaConfig(**mega_arguments(sizes), max_positions=positions)
    return transformers.MegaForCausalLM(config)


def _llama(sizes: dict[str, Any], positions: int) -> nn.Module:
    width, layers = sizes["hidden"], sizes["layers"]
    # The feed-forward network is as wide as gives it the parameters of ours.
    left = sizes["parameters"] - sizes["vocabulary"] * width - layers * 4 * width**2
    step = 64 if width >= 512 else 8
    config = transformers.LlamaConfig(
        vocab_size=sizes["vocabulary"], hidden_size=width, num_hidden_layers=layers,
        intermediate_size=max(round(left / (3 * step * layers * width)), 1) * step,
        num_attention_heads=max(width // sizes.get("llama_head", 64), 1), tie_word_embeddings=True,
        max_position_embeddings=positions, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def _mamba2(sizes: dict[str, Any], positions: int) -> nn.Module:
    inner = 2 * sizes["hidden"]
    head = min(64, inner)
    config = transformers.Mamba2Config(
        vocab_size=sizes["vocabulary"], hidden_size=sizes["hidden"], num_hidden_layers=2 * sizes["layers"],
        state_size=128, chunk_size=128, expand=2, head_dim=head,
        num_heads=inner // head, n_groups=1, tie_word_embeddings=True, pad_token_id=None, use_cache=False,
    )  # fmt: skip
    return transformers.Mamba2ForCausalLM(config)


# By kind: what tables call it, and what builds one of about our size, for so many positions, from `sizes`: those of
# `mega_arguments`, and our count of `parameters`.
PEERS: dict[str, tuple[str, Callable[[dict[str, Any], int], nn.Module]]] = {
    "mega": ("Mega", _mega),
    "llama": ("Llama, sdpa", _llama),
    "mamba2": ("Mamba2, plain PyTorch", _mamba2),  # its kernels are for GPUs
}


class Contender:
    """What takes turns, here or in a worker."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    def __call__(self, method: str, *arguments: Any) -> Any:
        """As a worker is called."""
        return getattr(self, method)(*arguments)

    def describe(self) -> dict[str, Any]:
        """Parameters, and transformers' release."""
        return {"parameters": self.model.num_parameters(), "transformers": transformers.__version__}


class TrainingStep(Contender):
    """Training steps: forward, loss, backward, clipping where `clip` is finite, AdamW; `loss` is of tokens (B, L)."""

    def __init__(
        self, model: nn.Module, loss: Callable[[Tensor], Tensor] | None = None, lr: float = 1e-5, clip: float = math.inf
    ) -> None:
        super().__init__(model.train())
        self._loss = loss or (lambda tokens: self.model(input_ids=tokens, labels=tokens).loss)
        self._optimizer, self._clip = torch.optim.AdamW(model.parameters(), lr=lr, fused=True), clip

    def check(self, length: int) -> dict[str, float]:
        """Loss and gradient norm of the first step, and the megabytes by which it grew the process at its peak."""
        peak, norms = watch_peak(), []

        def note() -> None:
            gradients = [p.grad.norm() for p in self.model.parameters() if p.grad is not None]
            norms.append(float(torch.stack(gradients).norm()))

        loss = self.step(self._tokens(length), note)
        return {"loss": float(loss), "norm": norms[0], "megabytes": peak() / 1e6}

    def time(self, length: int) -> float:
        """Milliseconds of a step."""
        return milliseconds(lambda: self.step(self._tokens(length)))

    def step(self, tokens: Tensor, before_update: Callable[[], object] = int) -> Tensor:
        """Take a step; returns its loss."""
        loss = self._loss(tokens)
        loss.backward()
        loss = loss.detach()
        before_update()
        if self._clip < math.inf:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss

    def _tokens(self, length: int) -> Tensor:
        """(1, L), the same every time."""
        generator = torch.Generator().manual_seed(length)
        return torch.randint(1, self.model.config.vocab_size, (1, length), generator=generator)


def peer_training(kind: str, sizes: dict[str, Any], length: int, weights: str) -> TrainingStep:
    """A training step of a peer; `weights` is a file with initial weights of ours, which mega gets."""
    torch.manual_seed(0)
    model = PEERS[kind][1](sizes, length)
    if kind == "mega":
        model.load_state_dict(load_file(weights))
    return TrainingStep(model)


class Decoding(Contender):
    """Greedy decoding from where a text ends, with a cache of the text and its next token, (1, 1) int64.

    `truth` computes logits (1, n, V) of the next tokens (1, n), not one by one; without it, one call after the cache
    does, which goes the way that prefill goes.
    """

    def __init__(
        self, model: nn.Module, cache: Any, token: Tensor, truth: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__(model)
        self._past, self._first = copy.deepcopy(cache), token
        self._truth = truth or (lambda tokens: self._forward(tokens, copy.deepcopy(self._past)).logits)

    def run(self, steps: int) -> float:
        """Decode so many tokens from the end of the text; milliseconds a token."""
        self._restart()
        return milliseconds(lambda: [self._step() for _ in range(steps)]) / steps

    @torch.no_grad()
    def error(self, steps: int) -> float:
        """Largest difference of some steps' logits from the truth, relative to the largest."""
        self._restart()
        tokens, logits = [], []
        for _ in range(steps):
            tokens.append(self._token)
            logits.append(self._step())
        return relative_error(torch.cat(logits, 1), self._truth(torch.cat(tokens, 1)))

    def _restart(self) -> None:
        self._cache, self._token = copy.deepcopy(self._past), self._first

    def _forward(self, tokens: Tensor, cache: Any) -> Any:
        return self.model(tokens, past_key_values=cache, use_cache=True)

    @torch.no_grad()
    def _step(self) -> Tensor:
        """Logits (1, 1, V)."""
        out = self._forward(self._token, self._cache)
        self._cache, logits = out.past_key_values, out.logits[:, -1:]
        self._token = logits.argmax(-1)
        return logits


def peer_decoding(kind: str, sizes: dict[str, Any], start: int, seed: int) -> Decoding:
    """Greedy decoding with mega or llama after a random text of `start` tokens; one pass without a cache is true."""
    torch.manual_seed(seed)
    model: Any = PEERS[kind][1]({**sizes, "chunk": 0}, start + 4096).eval()
    text = torch.randint(3, sizes["vocabulary"], (1, start))
    with torch.no_grad():
        past = model(text, use_cache=True).past_key_values

    def truth(tokens: Tensor) -> Tensor:
        return model(torch.cat([text, tokens], 1), use_cache=False).logits[:, -tokens.shape[1] :]

    return Decoding(model, past, text[:, -1:], truth)


class EmaStep:
    """Forward and backward of a moving average: `average` computes y of `leaves`, x first; dy is the gradient of y."""

    def __init__(self, average: Callable[[], Tensor], leaves: dict[str, Tensor], dy: Tensor) -> None:
        self.average, self._leaves, self._dy = average, leaves, dy

    def run(self) -> dict[str, Tensor]:
        """Output and gradients, in the layout of x: y, dx, ddamping, ddecay, dexpansion, dprojection."""
        y = self.average()
        gradients = torch.autograd.grad(y, list(self._leaves.values()), self._dy)
        return {"y": y.detach(), **{f"d{name}": each for name, each in zip(self._leaves, gradients, strict=True)}}

    def time(self) -> float:
        """Milliseconds."""
        return milliseconds(self.run)


class PeerEma(EmaStep):
    """Kernel and FFT convolution of transformers 4.37.2's moving average, without its residual and silu.

    `problem` is a file of what `ema.ema_problem` makes.
    """

    def __init__(self, problem: str) -> None:
        from transformers.models.mega.modeling_mega import MegaConfig, MegaMultiDimensionDampedEma

        tensors = load_file(problem)
        width, averages = tensors["projection"].shape
        config = MegaConfig(hidden_size=width, ema_projection_size=averages, bidirectional=False)
        # In evaluation the module caches its kernel, and would leave out what a training step computes.
        module = MegaMultiDimensionDampedEma(config).train()
        own = (module.damping_factor, module.decay_factor, module.ema_expansion_matrix, module.kernel_projection_matrix)
        parameters = dict(zip(EMA_PARAMETERS, own, strict=True))
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])
        # Its own layout is (L, B, D): it gets it contiguous, as its own model hands it over.
        x = tensors["x"].transpose(0, 1).contiguous().requires_grad_()
        length = len(x)

        def average() -> Tensor:
            y = module.fft_convolution(x.permute(1, 2, 0), module.get_ema_kernel(length), length=length)
            return y[..., :length].permute(2, 0, 1)

        super().__init__(average, {"x": x, **parameters}, tensors["dy"].transpose(0, 1).contiguous())

    def describe(self) -> dict[str, str]:
        """Versions."""
        return {"torch": torch.__version__, "transformers": transformers.__version__}

    def write_results(self, file: str) -> None:
        """Write outputs and gradients in the problem's layout."""
        found = self.run()
        found |= {name: found[name].transpose(0, 1) for name in ("y", "dx")}
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, file)
