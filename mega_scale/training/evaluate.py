"""What a model can do: its loss on held-out text, and texts that it continues."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from mega_scale.data import end_ids, prompt_ids, separator_id
from mega_scale.model import MegaConfig
from mega_scale.parallel import World


class ShareOfLoss(Protocol):
    """Computes this rank's part of a loss."""

    def __call__(
        self, input_ids: Tensor, shift_labels: Tensor, num_items: int, *, document_starts: Tensor | None = None
    ) -> Tensor:
        """Sum of this rank's token losses over `num_items`, nats; arguments as in `Engine.forward`."""
        ...


class Evaluation(NamedTuple):
    """How well a model predicts a text.

    Args:
        loss: nats per token.
        perplexity: exp of the loss.
        bits_per_byte: bits per byte of the text.
        tokens: predicted tokens.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int


@torch.no_grad()
def evaluate(
    module: nn.Module,
    share: ShareOfLoss,
    batches: Iterable[dict[str, Tensor]],
    tokens_per_byte: float,
    world: World,
    every_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Evaluate a model; collective, every rank has the same number of batches. The figures are the same on all ranks.

    Args:
        module: the model.
        share: computes this rank's share of the loss with it, such as `Engine.forward`, or `loss_of(module)`.
        batches: this rank's, `input_ids` and `shift_labels` (B, L) int64 each; -100 is not counted; and perhaps
            `document_starts` (B, L) bool.
        tokens_per_byte: tokens of the text that the batches hold, divided by its UTF-8 bytes.
        world: all ranks.
        every_batch: called after each batch; what it raises, on all ranks alike, ends the evaluation.

    Raises:
        ValueError: the text has no token to predict.
    """
    was_training = module.training
    module.eval()
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    counted = torch.zeros((), dtype=torch.int64, device=world.device)
    try:
        for batch in batches:
            given = {name: tensor.to(world.device) for name, tensor in batch.items()}
            labels = given["shift_labels"]
            total += share(given["input_ids"], labels, 1, document_starts=given.get("document_starts")).double()
            counted += (labels != -100).sum()
            every_batch()
    finally:
        module.train(was_training)
    nats, tokens = float(world.sum(total, alike=("tp",))), int(world.sum(counted, alike=("sp", "tp")))
    if tokens == 0:
        raise ValueError("the text has no token to predict: give a longer one, or a shorter data.sequence_length")
    loss = nats / tokens
    return Evaluation(loss, math.exp(min(loss, 700.0)), loss * tokens_per_byte / math.log(2), tokens)


def loss_of(module: nn.Module) -> ShareOfLoss:
    """Compute losses with a model that is whole on this rank."""

    def share(
        input_ids: Tensor, shift_labels: Tensor, num_items: int, *, document_starts: Tensor | None = None
    ) -> Tensor:
        return module(
            input_ids=input_ids,
            shift_labels=shift_labels,
            num_items_in_batch=num_items,
            document_starts=document_starts,
            use_cache=False,
            skip_logits=True,
        ).loss

    return share


class EveryToken(StoppingCriteria):
    """Calls something after each generated token; what it raises, on all ranks alike, ends the generation."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which rows (B,) end here, bool: none."""
        self._call()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def check_sample(config: MegaConfig, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int) -> None:
    """Refuse a text that a model cannot generate.

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
