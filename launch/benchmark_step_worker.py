"""One contender of `benchmark.py step`, in a process of its own, so that its peak memory is its own.

Started as `PYTHON launch/benchmark_step_worker.py KIND SIZES.json THREADS`, under transformers 4.37.2 for the kind
`mega`; imports mega_scale only for the kinds that are ours. Answers a JSON line to each line on its input: "check
LENGTH" gives loss and gradient norm of the first step, "time LENGTH" milliseconds of a whole training step.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch.machine import PeakMemory, keep_freed_memory


def sizes_of_mega(sizes: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a Mega configuration, ours or transformers'."""
    return {
        "vocab_size": sizes["vocabulary"], "hidden_size": sizes["hidden"], "num_hidden_layers": sizes["layers"],
        "shared_representation_size": sizes["shared"], "intermediate_size": sizes["expanded"],
        "nffn_hidden_size": sizes["expanded"], "ema_projection_size": sizes["averages"], "use_chunking": True,
        "chunk_size": sizes["chunk"], "is_decoder": True, "bidirectional": False, "dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "nffn_activation_dropout_prob": 0.0,
        "max_positions": max(sizes["lengths"]),
        "add_token_type_embeddings": False,
    }  # fmt: skip


def our_model(sizes: dict[str, Any]) -> nn.Module:
    """This project's model, computed and recomputed `segment` tokens at a time if that is not 0."""
    # The peer's Python has none of these.
    from mega_scale import MegaConfig, MegaForCausalLM
    from mega_scale.parallel.activation_checkpoint import checkpoint_activations
    from mega_scale.parallel.config import ActivationCheckpointing
    from mega_scale.parallel.sequence_parallel import ReceivedStates, RowSlice

    model = MegaForCausalLM(MegaConfig(**sizes_of_mega(sizes)))
    if sizes["segment"]:
        how = ActivationCheckpointing(every=1, segment=sizes["segment"])
        checkpoint_activations(model, how, ReceivedStates(), RowSlice())
    return model


def our_compiled_model(sizes: dict[str, Any]) -> nn.Module:
    """The same as `train.compile` has it."""
    model = our_model(sizes)
    from mega_scale.ops.gates import compiled

    for module in model.modules():
        if hasattr(module, "gates"):
            vars(module)["gates"] = compiled()
    return model


def reference_model(sizes: dict[str, Any]) -> nn.Module:
    """transformers' own, of 4.37.2."""
    library: Any = transformers
    return library.MegaForCausalLM(library.MegaConfig(**sizes_of_mega(sizes)))


def llama_model(sizes: dict[str, Any]) -> nn.Module:
    """transformers' Llama with fused attention, and as many parameters."""
    library: Any = transformers
    config = library.LlamaConfig(
        vocab_size=sizes["vocabulary"], hidden_size=sizes["hidden"], num_hidden_layers=sizes["layers"],
        intermediate_size=sizes["llama_expanded"], num_attention_heads=max(sizes["hidden"] // 64, 1),
        tie_word_embeddings=True, max_position_embeddings=max(sizes["lengths"]), attn_implementation="sdpa",
        use_cache=False,
    )  # fmt: skip
    return library.LlamaForCausalLM(config)


def mamba2_model(sizes: dict[str, Any]) -> nn.Module:
    """transformers' Mamba2, as plain PyTorch computes it: its kernels are for GPUs."""
    library: Any = transformers
    inner = 2 * sizes["hidden"]
    head = min(64, inner)
    config = library.Mamba2Config(
        vocab_size=sizes["vocabulary"], hidden_size=sizes["hidden"], num_hidden_layers=sizes["mamba_layers"],
        state_size=sizes["mamba_states"], chunk_size=sizes["mamba_chunk"], expand=2, head_dim=head,
        num_heads=inner // head, n_groups=1, tie_word_embeddings=True, pad_token_id=None, use_cache=False,
    )  # fmt: skip
    return library.Mamba2ForCausalLM(config)


KINDS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "ours": our_model,
    "ours bf16": our_model,
    "ours compiled": our_compiled_model,
    "mega": reference_model,
    "llama": llama_model,
    "mamba2": mamba2_model,
}


class Trainer:
    """A model and what a training step needs.

    Args:
        kind: of `KINDS`.
        sizes: of the model; `weights` names a file for its initial weights, which ours writes and transformers' reads.
    """

    def __init__(self, kind: str, sizes: dict[str, Any]) -> None:
        torch.manual_seed(0)
        if kind.startswith("ours") and not sizes["segment"]:
            keep_freed_memory()  # as launch/pretrain.py does; what this process was started with goes before
        self.kind, self.vocabulary = kind, sizes["vocabulary"]
        self.model = KINDS[kind](sizes).train()
        weights = Path(sizes["weights"])
        if kind == "ours":
            torch.save(self.model.state_dict(), weights)
        elif kind in ("ours bf16", "ours compiled", "mega"):
            self.model.load_state_dict(torch.load(weights, weights_only=True))
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

    def gradients(self, length: int) -> Tensor:
        """Forward and backward on the same tokens every time; returns the loss."""
        tokens = torch.randint(1, self.vocabulary, (1, length), generator=torch.Generator().manual_seed(length))
        mixed = torch.autocast("cpu", torch.bfloat16) if self.kind == "ours bf16" else contextlib.nullcontext()
        more = {"skip_logits": True} if self.kind.startswith("ours") else {}
        with mixed:
            loss = self.model(input_ids=tokens, labels=tokens, **more).loss
        loss.backward()
        return loss.detach()

    def check(self, length: int) -> dict[str, float]:
        """Loss, gradient norm, and by how much the peak of memory grew."""
        peak = PeakMemory()
        loss = self.gradients(length)
        norm = torch.stack([p.grad.norm() for p in self.model.parameters() if p.grad is not None]).norm()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": float(loss), "norm": float(norm), "megabytes": peak.growth() / 1e6}

    def time(self, length: int) -> dict[str, float]:
        """Milliseconds of a step."""
        began = time.perf_counter()
        self.gradients(length)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"ms": 1e3 * (time.perf_counter() - began)}


def main() -> None:
    """Serve the requests on standard input until it ends."""
    kind, sizes, threads = sys.argv[1:]
    # Whatever a library prints must not end up between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(int(threads))
    trainer = Trainer(kind, json.loads(Path(sizes).read_text()))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    answers.write(json.dumps({**versions, "parameters": trainer.parameters}) + "\n")
    for line in sys.stdin:
        request, length = line.split()
        answers.write(json.dumps(getattr(trainer, request)(int(length))) + "\n")


if __name__ == "__main__":
    main()
