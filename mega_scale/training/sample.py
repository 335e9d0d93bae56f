"""Text that a model continues, while it trains or afterwards."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from mega_scale.data import end_ids, prompt_ids, separator_id
from mega_scale.model import MegaConfig


class EveryToken(StoppingCriteria):
    """Calls something after each generated token, and goes on; what it raises ends the generation.

    Args:
        call: shows progress, or raises; on all ranks alike where the model is sharded.
    """

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which rows (B,) end here, bool: none."""
        self._call()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def check_sample(config: MegaConfig, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int) -> None:
    """Refuse a text that a model cannot generate.

    Args:
        config: the model's.
        tokenizer: of the model.
        prompt: text to continue.
        max_new_tokens: tokens to generate.

    Raises:
        ValueError: the tokenizer cannot read the prompt, or the text would leave the model's positions.
    """
    length = len(prompt_ids(tokenizer, prompt)) + max_new_tokens
    if config.relative_positional_bias == "simple" and not config.use_chunking and length - 1 > config.max_positions:
        raise ValueError(
            f"a prompt of {length - max_new_tokens} tokens and {max_new_tokens} more are beyond max_positions="
            f"{config.max_positions}, the reach of relative_positional_bias='simple' without chunks: generate fewer"
        )


@torch.no_grad()
def generate_text(
    module: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop_at_eos: bool = False,
    every_token: Callable[[], None] = lambda: None,
) -> str:
    """Continue a text; collective when the model is sharded, and the same on all ranks.

    Leaves the random state as it found it, so that training does not depend on samples.

    Args:
        module: a causal model with `generate()`.
        tokenizer: of the model.
        prompt: text to continue, from a document's start; empty begins a document.
        max_new_tokens: tokens to generate.
        seed: of the sampling.
        temperature: what logits are divided by; 0 takes the likeliest token.
        top_p: share of probability to sample from.
        stop_at_eos: whether an end-of-text token ends the text early.
        every_token: called after each generated token; what it raises, on all ranks alike, ends the generation.

    Returns:
        Prompt and continuation.
    """
    device = next(module.parameters()).device
    end = end_ids(tokenizer, module.config.eos_token_id)  # type: ignore[union-attr,arg-type]
    input_ids = torch.tensor([prompt_ids(tokenizer, prompt)], device=device)
    options = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    was_training = module.training
    module.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            output = module.generate(  # type: ignore[operator]
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=max_new_tokens,
                eos_token_id=end if stop_at_eos else None,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else separator_id(tokenizer),
                use_cache=module.config.truncation is None,  # type: ignore[union-attr]
                stopping_criteria=StoppingCriteriaList([EveryToken(every_token)]),
                **(options if temperature > 0 else {"do_sample": False}),
            )
    finally:
        module.train(was_training)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))
