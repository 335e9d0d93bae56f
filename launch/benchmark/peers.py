"""What is measured beside ours: models of transformers, in workers whose Python has the release that is asked for.

Runs under the peer's Python, which has torch, safetensors and transformers (4.37.2 for Mega), and imports nothing of
mega_scale. What a training step is, is said here once, for ours too.
"""

import contextlib
import copy
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import transformers as _transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .harness import PeakMemory, milliseconds, relative_error

transformers: Any = _transformers  # of whichever release the interpreter has


def mega_arguments(sizes: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the configuration of a causal, chunked Mega without dropout, ours or transformers'.

    Args:
        sizes: vocabulary, hidden, layers, shared, expanded, averages; `feed_forward` where it is not `expanded`;
            `chunk`, 0 for attention over the whole sequence.
    """
    return {
        "vocab_size": sizes["vocabulary"], "hidden_size": sizes["hidden"], "num_hidden_layers": sizes["layers"],
        "shared_representation_size": sizes["shared"], "intermediate_size": sizes["expanded"],
        "nffn_hidden_size": sizes.get("feed_forward", sizes["expanded"]), "ema_projection_size": sizes["averages"],
        "use_chunking": sizes["chunk"] > 0, "chunk_size": sizes["chunk"] or -1, "is_decoder": True,
        "bidirectional": False, "add_token_type_embeddings": False, "dropout_prob": 0.0, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "nffn_activation_dropout_prob": 0.0,
    }  # fmt: skip


def mega(sizes: dict[str, Any], **more: Any) -> nn.Module:
    """transformers' own Mega, of 4.37.2."""
    return transformers.MegaForCausalLM(transformers.MegaConfig(**mega_arguments(sizes), **more))


def llama(sizes: dict[str, Any], expanded: int, positions: int, head: int = 64, **more: Any) -> nn.Module:
    """transformers' Llama with fused attention, of our hidden size and layers."""
    config = transformers.LlamaConfig(
        vocab_size=sizes["vocabulary"], hidden_size=sizes["hidden"], num_hidden_layers=sizes["layers"],
        intermediate_size=expanded, num_attention_heads=max(sizes["hidden"] // head, 1), tie_word_embeddings=True,
        max_position_embeddings=positions, attn_implementation="sdpa", **more,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def mamba2(sizes: dict[str, Any]) -> nn.Module:
    """transformers' Mamba2, as plain PyTorch computes it: its kernels are for GPUs."""
    inner = 2 * sizes["hidden"]
    head = min(64, inner)
    config = transformers.Mamba2Config(
        vocab_size=sizes["vocabulary"], hidden_size=sizes["hidden"], num_hidden_layers=sizes["mamba_layers"],
        state_size=sizes["mamba_states"], chunk_size=sizes["mamba_chunk"], expand=2, head_dim=head,
        num_heads=inner // head, n_groups=1, tie_word_embeddings=True, pad_token_id=None, use_cache=False,
    )  # fmt: skip
    return transformers.Mamba2ForCausalLM(config)


def parameter_count(model: nn.Module) -> int:
    """Numbers in the model's parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


class TrainingStep:
    """A training step of one sequence: forward, loss, backward, AdamW.

    Args:
        model: causal; takes `input_ids`, `labels` and `forward_options`, and runs in `context`.
    """

    def __init__(
        self,
        model: nn.Module,
        vocabulary: int,
        forward_options: dict[str, Any] | None = None,
        context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self.model, self._vocabulary = model.train(), vocabulary
        self._forward_options, self._context = forward_options or {}, context
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def describe(self) -> dict[str, Any]:
        """Parameters, and transformers' release."""
        return {"parameters": parameter_count(self.model), "transformers": transformers.__version__}

    def check(self, length: int) -> dict[str, float]:
        """Loss and gradient norm of the first step, and the megabytes by which it grew the process at its peak."""
        peak = PeakMemory()
        loss = self._gradients(length)
        norm = torch.stack([p.grad.norm() for p in self.model.parameters() if p.grad is not None]).norm()
        self._update()
        return {"loss": float(loss), "norm": float(norm), "megabytes": peak.growth() / 1e6}

    def time(self, length: int) -> float:
        """Milliseconds of a step."""

        def step() -> None:
            self._gradients(length)
            self._update()

        return milliseconds(step)

    def _gradients(self, length: int) -> Tensor:
        """Forward and backward of the same tokens every time; returns the loss."""
        tokens = torch.randint(1, self._vocabulary, (1, length), generator=torch.Generator().manual_seed(length))
        with self._context():
            loss = self.model(input_ids=tokens, labels=tokens, **self._forward_options).loss
        loss.backward()
        return loss.detach()

    def _update(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


class PeerTraining(TrainingStep):
    """A training step of mega, llama or mamba2; `weights` is a file with initial weights of ours, which mega gets."""

    def __init__(self, kind: str, sizes: dict[str, Any], length: int, weights: str) -> None:
        torch.manual_seed(0)
        if kind == "mega":
            model = mega(sizes, max_positions=length)
            model.load_state_dict(load_file(weights))
        elif kind == "llama":
            model = llama(sizes, sizes["llama_expanded"], length, use_cache=False)
        else:
            model = mamba2(sizes)
        super().__init__(model, sizes["vocabulary"])


class Decoding:
    """Greedy decoding from where a text ends.

    Args:
        model: causal, in eval mode.
        cache: of the tokens so far; nothing changes it.
        token: the next one, (1, 1) int64.
    """

    def __init__(self, model: nn.Module, cache: Any, token: Tensor) -> None:
        self.model: Any = model
        self._past, self._first = copy.deepcopy(cache), token
        self.restart()

    def past(self) -> Any:
        """A copy of the cache of the tokens so far."""
        return copy.deepcopy(self._past)

    def truth(self, tokens: Tensor) -> Tensor:
        """Logits (1, n, V) of the next tokens (1, n), not decoded one by one."""
        raise NotImplementedError

    def restart(self) -> None:
        """Go back to the end of the text."""
        self._cache, self._token = self.past(), self._first

    def run(self, steps: int) -> float:
        """Decode on; milliseconds a token."""

        def decode() -> None:
            for _ in range(steps):
                self._step()

        return milliseconds(decode) / steps

    @torch.no_grad()
    def error(self, steps: int) -> float:
        """Largest difference of some steps' logits from the truth, relative to the largest."""
        self.restart()
        tokens, logits = [], []
        for _ in range(steps):
            tokens.append(self._token)
            logits.append(self._step())
        return relative_error(torch.cat(logits, 1), self.truth(torch.cat(tokens, 1)))

    @torch.no_grad()
    def _step(self) -> Tensor:
        """Logits (1, 1, V)."""
        out = self.model(self._token, past_key_values=self._cache, use_cache=True)
        self._cache, logits = out.past_key_values, out.logits[:, -1:]
        self._token = logits.argmax(-1)
        return logits


class PeerDecoding(Decoding):
    """Greedy decoding with one of transformers' models after a random text.

    Args:
        kind: mega or llama.
        sizes: of our model; `parameters` is what Llama's feed-forward network is widened to.
        start: tokens of the text.
        seed: of weights and text.
    """

    def __init__(self, kind: str, sizes: dict[str, Any], start: int, seed: int) -> None:
        torch.manual_seed(seed)
        if kind == "mega":
            model = mega({**sizes, "chunk": 0}, normalization_type="layernorm")
        else:
            width, layers = sizes["hidden"], sizes["layers"]
            others = sizes["vocabulary"] * width + layers * 4 * width**2
            expanded = max(8, round((sizes["parameters"] - others) / (24 * layers * width)) * 8)
            model = llama(sizes, expanded, start + 4096)
        self._text = torch.randint(3, sizes["vocabulary"], (1, start))
        with torch.no_grad():
            past = model.eval()(self._text, use_cache=True).past_key_values
        super().__init__(model, past, self._text[:, -1:])

    def describe(self) -> dict[str, Any]:
        """Parameters, and transformers' release."""
        return {"parameters": parameter_count(self.model), "transformers": transformers.__version__}

    def truth(self, tokens: Tensor) -> Tensor:
        """Of one forward pass without a cache."""
        return self.model(torch.cat([self._text, tokens], 1), use_cache=False).logits[:, -tokens.shape[1] :]


class PeerEma:
    """Kernel and FFT convolution of transformers 4.37.2's moving average, without its residual and silu.

    Args:
        problem: safetensors with x and dy (B, L, D); damping, decay, expansion (D, N, 1); projection (D, N).
    """

    def __init__(self, problem: str) -> None:
        from transformers.models.mega.modeling_mega import (
            MegaConfig,
            MegaMultiDimensionDampedEma,
        )

        tensors = load_file(problem)
        width, averages = tensors["projection"].shape
        config = MegaConfig(hidden_size=width, ema_projection_size=averages, bidirectional=False)
        # In evaluation the module caches its kernel, and would leave out what a training step computes.
        self._module = MegaMultiDimensionDampedEma(config).train()
        parameters = {
            "damping": self._module.damping_factor,
            "decay": self._module.decay_factor,
            "expansion": self._module.ema_expansion_matrix,
            "projection": self._module.kernel_projection_matrix,
        }
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])
        # Its own layout is (L, B, D): it gets it contiguous, as its own model hands it over.
        self._x = tensors["x"].transpose(0, 1).contiguous().requires_grad_()
        self._dy = tensors["dy"].transpose(0, 1).contiguous()
        self._leaves = {"x": self._x, **parameters}

    def describe(self) -> dict[str, str]:
        """Versions."""
        return {"torch": torch.__version__, "transformers": transformers.__version__}

    def time(self) -> float:
        """Milliseconds of a forward and backward pass."""
        return milliseconds(self._run)

    def write_results(self, file: str | os.PathLike[str]) -> None:
        """Write outputs and gradients in the problem's layout: y, dx, ddamping, ddecay, dexpansion, dprojection."""
        y, gradients = self._run()
        found = {f"d{name}": gradient for name, gradient in zip(self._leaves, gradients, strict=True)}
        found |= {"y": y.detach().transpose(0, 1), "dx": found["dx"].transpose(0, 1)}
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, file)

    def _run(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """y (L, B, D), and the gradients of `_leaves`."""
        length = self._x.shape[0]
        kernel = self._module.get_ema_kernel(length)
        y = self._module.fft_convolution(self._x.permute(1, 2, 0), kernel, length=length)
        y = y[..., :length].permute(2, 0, 1)
        return y, torch.autograd.grad(y, list(self._leaves.values()), self._dy)
