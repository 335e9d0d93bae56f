"""The other side of decode_against.py: decodes with a model of transformers, in an interpreter that has it.

Started as `PYTHON launch/decode_worker.py KIND SIZES THREADS`, KIND being `mega` (transformers 4.37.2) or `llama`
(any), SIZES a JSON object; needs torch and transformers, and imports nothing of mega_scale. It answers a JSON line to
every line: "check N" decodes N tokens from the context and compares them with one forward, "restart" goes back to the
context, "run N" decodes N tokens from where it stands.
"""

import copy
import json
import os
import sys
import time
from typing import Any

import torch
import transformers as _transformers

transformers: Any = _transformers  # of whichever release the interpreter has


class Decoder:
    """A causal model, and its cache of a random text.

    Args:
        kind: mega or llama.
        sizes: vocabulary, hidden, layers, states, shared, values, feed_forward, start and seed, and for llama the
            number of parameters that its feed-forward network is widened to.
    """

    def __init__(self, kind: str, sizes: dict[str, int]) -> None:
        torch.manual_seed(sizes["seed"])
        self.model = _BUILD[kind](sizes).eval()
        self.text = torch.randint(3, sizes["vocabulary"], (1, sizes["start"]))
        with torch.no_grad():
            self.past = self.model(self.text, use_cache=True).past_key_values
        self.restart()

    def restart(self) -> None:
        """Go back to the context."""
        self.cache, self.token = copy.deepcopy(self.past), self.text[:, -1:]

    @torch.no_grad()
    def run(self, steps: int) -> float:
        """Decode greedily; milliseconds a token."""
        start = time.perf_counter()
        for _ in range(steps):
            out = self.model(self.token, past_key_values=self.cache, use_cache=True)
            self.cache, self.token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        return 1e3 * (time.perf_counter() - start) / steps

    @torch.no_grad()
    def error(self, steps: int) -> float:
        """Largest difference of the logits of some steps from those of one forward, relative to the largest."""
        self.restart()
        tokens, logits = [], []
        for _ in range(steps):
            tokens.append(self.token)
            out = self.model(self.token, past_key_values=self.cache, use_cache=True)
            self.cache, self.token = out.past_key_values, out.logits[:, -1:].argmax(-1)
            logits.append(out.logits[:, -1])
        truth = self.model(torch.cat([self.text, *tokens], 1), use_cache=False).logits[:, -steps:]
        return float((torch.stack(logits, 1) - truth).abs().max() / truth.abs().max())


def _llama(sizes: dict[str, int]) -> Any:
    width, layers = sizes["hidden"], sizes["layers"]
    others = sizes["vocabulary"] * width + layers * 4 * width**2
    config = transformers.LlamaConfig(
        vocab_size=sizes["vocabulary"], hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 1), max_position_embeddings=sizes["start"] + 4096,
        intermediate_size=max(8, round((sizes["parameters"] - others) / (24 * layers * width)) * 8),
        tie_word_embeddings=True, attn_implementation="sdpa",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def _mega(sizes: dict[str, int]) -> Any:
    config = transformers.MegaConfig(
        vocab_size=sizes["vocabulary"], hidden_size=sizes["hidden"], num_hidden_layers=sizes["layers"],
        intermediate_size=sizes["values"], nffn_hidden_size=sizes["feed_forward"],
        ema_projection_size=sizes["states"], shared_representation_size=sizes["shared"], is_decoder=True,
        bidirectional=False, use_chunking=False, normalization_type="layernorm",
        relative_positional_bias="rotary", add_token_type_embeddings=False,
    )  # fmt: skip
    return transformers.MegaForCausalLM(config)


_BUILD = {"llama": _llama, "mega": _mega}


def main() -> None:
    """Serve the requests on standard input until it ends."""
    kind, sizes, threads = sys.argv[1:]
    # Whatever a library prints must not end up between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(int(threads))
    decoder = Decoder(kind, json.loads(sizes))
    count = sum(parameter.numel() for parameter in decoder.model.parameters())
    ready = {"torch": torch.__version__, "transformers": transformers.__version__, "parameters": count}
    answers.write(json.dumps(ready) + "\n")
    for line in sys.stdin:
        request, _, steps = line.strip().partition(" ")
        value = 0.0
        if request == "restart":
            decoder.restart()
        else:
            value = {"check": decoder.error, "run": decoder.run}[request](int(steps))
        answers.write(json.dumps({"value": value}) + "\n")


if __name__ == "__main__":
    main()
