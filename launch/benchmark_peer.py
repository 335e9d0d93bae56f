"""The other side of benchmark.py: runs the moving average of transformers 4.37.2 in an interpreter that has it.

Started by benchmark.py as `PYTHON launch/benchmark_peer.py ema PROBLEM.safetensors THREADS`; needs torch, safetensors
and transformers, and imports nothing of mega_scale. It answers one JSON line per line on its input: "check FILE" writes
outputs and gradients to FILE, "time" runs once and gives milliseconds, the end of the input ends it.
"""

import json
import os
import sys
import time
from collections.abc import Callable

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.mega.modeling_mega import MegaConfig, MegaMultiDimensionDampedEma


class HuggingFaceEma:
    """Kernel and FFT convolution of transformers' `MegaMultiDimensionDampedEma`, without its residual and silu.

    Args:
        problem: x and dy (B, L, D); damping, decay, expansion (D, N, 1); projection (D, N).
    """

    def __init__(self, problem: dict[str, Tensor]) -> None:
        width, states = problem["projection"].shape
        config = MegaConfig(hidden_size=width, ema_projection_size=states, bidirectional=False)
        # In evaluation the module caches its kernel, and would leave out what a training step computes.
        self.module = MegaMultiDimensionDampedEma(config).train()
        names = {
            "damping": "damping_factor",
            "decay": "decay_factor",
            "expansion": "ema_expansion_matrix",
            "projection": "kernel_projection_matrix",
        }
        with torch.no_grad():
            for ours, theirs in names.items():
                getattr(self.module, theirs).copy_(problem[ours])
        # Its own layout is (L, B, D): it gets it contiguous, as its own model hands it over.
        self.x = problem["x"].transpose(0, 1).contiguous().requires_grad_()
        self.dy = problem["dy"].transpose(0, 1).contiguous()
        self.leaves = {"x": self.x, **{ours: getattr(self.module, theirs) for ours, theirs in names.items()}}

    def run(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One forward and backward.

        Returns:
            y (L, B, D), and the gradients of `leaves`.
        """
        length = self.x.shape[0]
        kernel = self.module.get_ema_kernel(length)
        y = self.module.fft_convolution(self.x.permute(1, 2, 0), kernel, length=length)[..., :length].permute(2, 0, 1)
        return y, torch.autograd.grad(y, list(self.leaves.values()), self.dy)

    def results(self) -> dict[str, Tensor]:
        """Outputs and gradients in the problem's layout: y, dx, ddamping, ddecay, dexpansion, dprojection."""
        y, grads = self.run()
        named = {f"d{name}": grad for name, grad in zip(self.leaves, grads, strict=True)}
        named |= {"y": y.detach().transpose(0, 1), "dx": named["dx"].transpose(0, 1)}
        return {name: tensor.contiguous() for name, tensor in named.items()}


PEERS: dict[str, Callable[[dict[str, Tensor]], HuggingFaceEma]] = {"ema": HuggingFaceEma}


def main() -> None:
    """Serve the requests on standard input until it ends."""
    what, problem, threads = sys.argv[1:]
    # Whatever a library prints must not end up between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(int(threads))
    peer = PEERS[what](load_file(problem))
    answers.write(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__}) + "\n")
    for line in sys.stdin:
        request, _, file = line.strip().partition(" ")
        if request == "check":
            save_file(peer.results(), file)
            answers.write(json.dumps({"file": file}) + "\n")
        else:
            start = time.perf_counter()
            peer.run()
            answers.write(json.dumps({"ms": 1e3 * (time.perf_counter() - start)}) + "\n")


if __name__ == "__main__":
    main()
