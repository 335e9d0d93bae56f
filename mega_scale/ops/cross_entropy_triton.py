"""Cross-entropy of a slice of logits on a GPU, and its gradient in their place: one read and one write of memory.

A program has a token. It reads its logits for their largest number and the sum of their exponentials, and again, from
a cache, for the gradient, which it writes over them. Where ranks share the vocabulary, two small reductions lie between
these halves, which are then a launch each. Statistics are fp32.

Legend: S tokens, V words of this rank, of which rows from `words` on are none.

    logits               (S, V) contiguous, bf16, fp16 or fp32
    targets              (S,) int64, of all ranks' words, -100 where there is none; `first` is this rank's first word
    largest, sums, hits  (S,) fp32: the largest logit, the sum of exponentials of differences from it, and the target's
                         logit, 0 where this rank does not have it
"""

import torch
from torch import Tensor

from mega_scale.ops import NAMESPACE

try:
    # In a `try`, as transformers demands every other import of a model's own files to be installed.
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("the loss by Triton kernels needs triton: pip install 'mega_scale[triton]'") from missing

_MOST_WORDS = 4096  # of a step
_NO_TARGET = tl.constexpr(-100)


@triton.jit
def cross_entropy_kernel(
    logits, targets, largest, sums, hits, first, words, width, STATISTICS: tl.constexpr, GRADIENT: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    """Statistics of a token's logits, their gradient, or both; program i has token i."""
    token = tl.program_id(0)
    logits += token.to(tl.int64) * width
    target = tl.load(targets + token)
    column = target - first
    mine = (target != _NO_TARGET) & (column >= 0) & (column < words)
    if STATISTICS:
        most, total = tl.full((), float("-inf"), tl.float32), tl.full((), 0.0, tl.float32)
        for begin in range(0, words, WORDS):
            word = begin + tl.arange(0, WORDS)
            score = tl.load(logits + word, mask=word < words, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(most, tl.max(score, 0))
            total = total * tl.exp(most - higher) + tl.sum(tl.exp(score - higher), 0)
            most = higher
        tl.store(largest + token, most)
        tl.store(sums + token, total)
        tl.store(hits + token, tl.load(logits + column, mask=mine, other=0.0).to(tl.float32))
    else:
        most, total = tl.load(largest + token), tl.load(sums + token)
    if GRADIENT:
        # No gradient of a token without a target, and none of rows that are no words.
        share = tl.where(target != _NO_TARGET, 1.0 / total, 0.0)
        for begin in range(0, width, WORDS):
            word = begin + tl.arange(0, WORDS)
            score = tl.load(logits + word, mask=word < words, other=float("-inf")).to(tl.float32)
            slope = tl.exp(score - most) * share - tl.where(mine & (word == column), 1.0, 0.0)
            tl.store(logits + word, slope.to(logits.dtype.element_ty), mask=word < width)


def kernel_constants(words: int) -> dict[str, int]:
    """What the kernel is compiled with, by the words of a rank."""
    width = min(_MOST_WORDS, max(1 << (words - 1).bit_length(), 16))
    return {"WORDS": width, "num_warps": max(width // 512, 1)}


@torch.library.custom_op(f"{NAMESPACE}::cross_entropy", mutates_args=("logits",))
def cross_entropy(
    logits: Tensor, targets: Tensor, first: int, words: int, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`largest`, `sums` and `hits` of logits; with `gradient`, that of the sum of losses takes the logits' place."""
    largest, sums, hits = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(3))
    _launch(logits, targets, largest, sums, hits, first, words, statistics=True, gradient=gradient)
    return largest, sums, hits


@cross_entropy.register_fake
def _(logits, targets, first, words, gradient):
    largest, sums, hits = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(3))
    return largest, sums, hits


@torch.library.custom_op(f"{NAMESPACE}::cross_entropy_gradient", mutates_args=("logits",))
def cross_entropy_gradient(
    logits: Tensor, targets: Tensor, largest: Tensor, sums: Tensor, first: int, words: int
) -> None:
    """Write the gradient over the logits, by statistics of all ranks."""
    _launch(logits, targets, largest, sums, sums, first, words, statistics=False, gradient=True)


@cross_entropy_gradient.register_fake
def _(logits, targets, largest, sums, first, words):
    return None


def _launch(
    logits: Tensor, targets: Tensor, largest: Tensor, sums: Tensor, hits: Tensor, first: int, words: int, *,
    statistics: bool, gradient: bool,
) -> None:  # fmt: skip
    tokens, width = logits.shape
    if tokens:
        with torch.cuda.device_of(logits):
            cross_entropy_kernel[(tokens,)](
                logits, targets, largest, sums, hits, first, words, width, STATISTICS=statistics, GRADIENT=gradient,
                **kernel_constants(width),
            )  # fmt: skip
