"""Attention of chunks of tokens to themselves, with one head or several: the reference, and faster forms of the same.

* eager: scores, bias, activation, masks and values written out. The reference, and the only form of laplace and relu2.
* sdpa: softmax by `scaled_dot_product_attention`, the positional bias passed as its mask.
* causal: softmax in blocks of queries, each of which meets only the keys up to its end. A masked product over a whole
  chunk computes twice what is seen; in n blocks a share of (n + 1) / 2n is left, in products that are still large. The
  weights are saved for the backward pass: half a chunk's width a token, little beside a block's other activations.
* triton: the same on a GPU in half precision, with documents and dropout by place (`attention_triton`).

Positional biases are functions of the distance alone, so that one vector holds a whole Toeplitz matrix. Rotary
positions (`rotate`) are in the queries and keys instead, and need no bias.

Legend: B batch, L length, K chunks, H heads, I queries, J keys, C chunk, Z width of a head's queries and keys, E width
of its values, c queries of a block, G chunks of all rows.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mega_scale.ops import (
    ANY_LENGTH,
    device_kind,
    in_memory,
    once_differentiable,
    operator,
    runs_triton,
    tracing,
    without_autocast,
)
from mega_scale.ops.elementwise import PositionalDropout
from mega_scale.ops.elementwise import gate as gated

ACTIVATIONS = ("softmax", "laplace", "relu2")
IMPLEMENTATIONS = ("auto", "eager", "sdpa", "causal", "triton")
# Queries of a block; on a GPU products have to be larger.
_CPU_BLOCK, GPU_BLOCK = 128, 256


class ChunkDocuments(NamedTuple):
    """Which document each key of a chunk is of; make it with `of`, once for all layers. All are int64."""

    numbers: Tensor  # (B, K, J): keys see each other where these are equal
    several: Tensor  # (M,): the chunks, counted as b * K + k, that hold more than one document
    single: Tensor  # (B K - M,): the others
    order: Tensor  # (B K,): where each chunk stands when those of `single` come before those of `several`

    @classmethod
    def of(cls, numbers: Tensor) -> "ChunkDocuments":
        """Sort chunks by whether they need a mask (a GPU waits). Under a compiler or a tracer all get one."""
        if not in_memory(numbers):
            return cls.all_several(numbers)
        mixed = (numbers != numbers[..., :1]).any(-1).flatten()
        order = mixed.to(torch.uint8).argsort(stable=True)
        single, several = order.tensor_split([int((~mixed).sum())])
        return cls(numbers, several, single, order.argsort())

    @classmethod
    def all_several(cls, numbers: Tensor) -> "ChunkDocuments":
        """Give every chunk a mask."""
        every = torch.arange(numbers.shape[0] * numbers.shape[1], device=numbers.device)
        return cls(numbers, every, every[:0], every)


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    activation: str = "softmax",
    causal: bool = False,
    offset: int | Tensor = 0,
    key_mask: Tensor | None = None,
    dropout: float | Callable[[Tensor], Tensor] = 0.0,
    return_weights: bool = False,
    documents: ChunkDocuments | None = None,
    gate: tuple[Tensor, Tensor] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Attention of every chunk to itself (arXiv 2209.10655, equations 16 to 19, and section 3.4).

    softmax: `softmax(scale q k^T + bias)`; laplace and relu2: `f(q k^T / n + bias)`, n the query's position in the
    chunk plus one when causal, else the chunk's number of valid keys, at least one. With `documents`, n counts keys of
    the query's document only.

    Args:
        q: (B, K, I, Z), any floating dtype; k is (B, K, J, Z), v (B, K, J, E). With heads (B, K, H, I, Z) and so on:
            all heads of a chunk have the same bias, masks and documents.
        bias: (I + J - 1,), or (B, I + J - 1) with an offset for every row: its entry m belongs to key minus query
            `m - (I - 1) - offset`; none for no positional bias.
        scale: of softmax scores; none for Z^-1/2.
        causal: whether query i sees keys up to `i + offset` only.
        offset: keys that precede the first query, tokens: one number, or (B,) int64, one for every row.
        key_mask: (B, K, J) bool, true for valid keys. A softmax chunk without any valid key attends as if unmasked.
        dropout: probability of dropping a weight, or a function of weights (B, K, [H,] I, J) that drops some, eager
            only unless it is a `PositionalDropout`.
        return_weights: eager only.
        documents: of keys, numbers (B, K, J): a query sees those of its own document only, query i being key
            `offset + i` (one number for all rows); none where chunks hold one document each.
        gate: x like the result and a bias, (E,) or (H E,): the result is multiplied by `silu(x + bias)`, whose
            gradients triton computes with its own; none for no gate.
        impl: eager, sdpa, causal (without masks, documents or dropout, as many queries as keys), triton (the same with
            documents and dropout by place), or auto: the last that serves, triton on a compute capability of 8 or
            newer only.

    Returns (B, K, [H,] I, E) in the dtype of v, and the weights before dropout (B, K, [H,] I, J) or none. Raises
    ValueError where a shape does not fit, or the implementation lacks what is asked for.
    """
    _check(q, k, v, bias, scale, activation, offset, key_mask, documents, impl)
    if documents is not None and not documents.several.numel():
        documents = None
    queries, keys = q.shape[-2], k.shape[-2]
    fused = activation == "softmax" and not return_weights and not callable(dropout)
    placed = dropout if isinstance(dropout, PositionalDropout) else None
    whole = causal and queries == keys and isinstance(offset, int) and offset == 0 and key_mask is None
    whole = whole and activation == "softmax" and not return_weights and (dropout == 0 or placed is not None)
    alone = whole and documents is None and placed is None
    if (impl == "causal" and not alone) or (impl == "triton" and not whole):
        raise ValueError(
            f"impl={impl!r} is softmax over the keys up to each query alone, without offset, masks, "
            f"{'documents, dropout' if impl == 'causal' else 'dropout but by place'} or weights to return: "
            "use impl='sdpa' or 'eager'"
        )
    if impl == "sdpa" and not fused:
        raise ValueError(
            f"impl='sdpa' has neither weights to return or to drop by a function, nor activation={activation!r}: "
            "use impl='eager'"
        )
    if impl == "auto":
        kernels = whole and v.dtype in (torch.bfloat16, torch.float16) and runs_triton(v, compiled=True)
        blocks = alone and tracing() not in ANY_LENGTH
        impl = "triton" if kernels else "causal" if blocks else "sdpa" if fused else "eager"

    if impl == "triton":
        # Not before it is needed: triton may not be installed.
        from mega_scale.ops.attention_triton import triton_attention  # noqa: PLC0415

        numbers = None if documents is None else documents.numbers
        return triton_attention(q, k, v, bias, scale, numbers, placed, gate), None
    weights = None
    if impl == "causal":
        out = causal_attention(q, k, v, bias, scale, GPU_BLOCK if device_kind(q) == "cuda" else _CPU_BLOCK)
    else:
        rules = {"activation": activation, "causal": causal, "offset": offset, "dropout": dropout}
        rules |= {"eager": impl == "eager", "scale": scale}
        out, weights = _by_documents(q, k, v, bias, key_mask, documents, return_weights or callable(dropout), rules)
    if gate is not None:
        out = gated(out, gate[0] + gate[1].view(*q.shape[2:-2], 1, v.shape[-1]))
    return out, weights if return_weights else None


def _by_documents(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_mask: Tensor | None, documents: ChunkDocuments | None,
    together: bool, rules: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention with masks: `together`, or chunks of several documents apart, which alone pay for theirs.

    Weights are returned where chunks attend together.
    """
    if documents is None or not documents.single.numel() or together:
        return _masked_attention(q, k, v, bias, key_mask, documents, **rules)
    flat = [None if t is None else t.flatten(0, 1) for t in (q, k, v, key_mask)]
    parts = []
    mixed = ChunkDocuments.all_several(documents.numbers.flatten(0, 1)[documents.several][None])
    for chunks, own in ((documents.single, None), (documents.several, mixed)):
        of_q, of_k, of_v, mask = (None if t is None else t[chunks][None] for t in flat)
        assert of_q is not None and of_k is not None and of_v is not None
        parts.append(_masked_attention(of_q, of_k, of_v, bias, mask, own, **rules)[0][0])
    return torch.cat(parts)[documents.order].view(*q.shape[:-1], v.shape[-1]), None


def _check(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None, activation: str, offset: int | Tensor,
    key_mask: Tensor | None, documents: ChunkDocuments | None, impl: str,
) -> None:  # fmt: skip
    """Refuse arguments of `chunk_attention` that do not fit each other."""
    for name, choice, allowed in (("activation", activation, ACTIVATIONS), ("impl", impl, IMPLEMENTATIONS)):
        if choice not in allowed:
            raise ValueError(f"{name}={choice!r} is unknown: choose one of {', '.join(allowed)}")
    if q.dim() not in (4, 5) or q.shape[:-2] != k.shape[:-2] or k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"q, k and v are {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}: expected (batch, chunks, "
            "[heads,] tokens, width), alike but for the tokens of q and the widths of v"
        )
    if scale is not None and activation != "softmax":
        raise ValueError(f"scale={scale} is of softmax alone: activation={activation!r} divides by the number of keys")
    queries, keys, by_row = q.shape[-2], k.shape[-2], isinstance(offset, Tensor)
    expected = (*q.shape[:1], queries + keys - 1) if by_row else (queries + keys - 1,)
    if bias is not None and bias.shape != expected:
        raise ValueError(f"bias has shape {tuple(bias.shape)}: {queries} queries and {keys} keys need {expected}")
    of_keys = (*k.shape[:2], keys)
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != of_keys):
        raise ValueError(f"key_mask is {key_mask.dtype} {tuple(key_mask.shape)}: expected bool {of_keys}")
    if documents is not None and (by_row or documents.numbers.shape != of_keys):
        raise ValueError(
            f"documents have numbers of shape {tuple(documents.numbers.shape)} and an offset of type "
            f"{type(offset).__name__}: expected {of_keys} and one offset for all rows"
        )


def _masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    documents: ChunkDocuments | None,
    *,
    scale: float | None,
    activation: str,
    causal: bool,
    offset: Any,
    dropout: Any,
    eager: bool,
) -> tuple[Tensor, Tensor | None]:
    """The eager form, which also returns weights (B, K, [H,] I, J), or `scaled_dot_product_attention`."""
    queries, keys, heads = q.shape[-2], k.shape[-2], q.dim() == 5
    dtype = torch.promote_types(q.dtype, torch.float32) if eager else v.dtype
    q, k = q.to(dtype), k.to(dtype)
    matrix = None  # (I, J) or (B, 1, [1,] I, J)
    if bias is not None:
        matrix = toeplitz(bias.to(dtype), queries)
        matrix = matrix if bias.dim() == 1 else _over_heads(matrix.unsqueeze(1), heads)
    reach, visible = _visible(q, keys, key_mask, documents, activation, causal, offset, every=eager)
    if not eager:
        mask = visible
        if matrix is not None:
            mask = matrix if visible is None else matrix.masked_fill(~visible, float("-inf"))
        return _fused(q, k, v, mask, dropout, scale), None

    with without_autocast(q.device):
        scores = q @ k.transpose(-1, -2)
        if activation == "softmax":
            scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
            scores = scores if matrix is None else scores + matrix
            if visible is not None:
                scores = scores.masked_fill(~visible, torch.finfo(dtype).min)
            weights = scores.softmax(-1)
        else:
            scores = scores / _count(reach if causal else visible, scores, offset, causal, documents is not None)
            scores = scores if matrix is None else scores + matrix
            if activation == "relu2":
                weights = torch.relu(scores).square()  # arXiv 2109.08668
            else:  # the cumulative normal distribution that approximates it (arXiv 2209.10655, equation 12)
                weights = 0.5 * (1.0 + torch.erf((scores - 0.707107) / (0.282095 * math.sqrt(2.0))))
        if visible is not None:
            weights = weights.masked_fill(~visible, 0.0)
        weights = weights.to(v.dtype)
        kept = dropout(weights) if callable(dropout) else F.dropout(weights, dropout, dropout > 0)
        return kept @ v, weights


def _visible(
    q: Tensor, keys: int, key_mask: Tensor | None, documents: ChunkDocuments | None, activation: str, causal: bool,
    offset: Any, every: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Which keys a query sees but for the key mask, and which with it; broadcastable to (B, K, [H,] I, J).

    None: all, as in a decoding step; `every` writes out even what leaves no key out.
    """
    queries, heads = q.shape[-2], q.dim() == 5
    reach = None
    if causal and (every or not (isinstance(offset, int) and offset + 1 >= keys)):
        last = torch.arange(queries, device=q.device)[:, None] + _by_row(offset, q)
        reach = torch.arange(keys, device=q.device) <= last
    if documents is not None:
        numbers = documents.numbers
        same = _over_heads(numbers[..., offset : offset + queries, None] == numbers[..., None, :], heads)
        reach = same if reach is None else reach & same
    if key_mask is None:
        return reach, reach
    if activation == "softmax":
        key_mask = key_mask | ~key_mask.any(-1, keepdim=True)  # as HF 4.37.2 treats chunks without a valid key
    valid = _over_heads(key_mask.unsqueeze(-2), heads)
    return reach, valid if reach is None else reach & valid


def _count(counted: Tensor | None, scores: Tensor, offset: Any, causal: bool, documents: bool) -> Tensor:
    """What laplace and relu2 divide scores (B, K, [H,] I, J) by."""
    if counted is None:
        return torch.tensor(float(scores.shape[-1]), device=scores.device, dtype=scores.dtype)
    if causal and not documents:
        # A position, which does not depend on masks. Padding before a row's first token has none; it is masked, but
        # must stay finite.
        count = torch.arange(1, scores.shape[-2] + 1, device=scores.device, dtype=scores.dtype)[:, None]
        count = count + _by_row(offset, scores)
        return count.clamp(min=1) if isinstance(offset, Tensor) else count
    return counted.sum(-1, keepdim=True).clamp(min=1).to(scores.dtype)


def _by_row(offset: Any, like: Tensor) -> Any:
    """Offsets (B,) with as many dimensions as another tensor; a number as it is."""
    return offset.view(-1, *[1] * (like.dim() - 1)) if isinstance(offset, Tensor) else offset


def _over_heads(x: Tensor, heads: bool) -> Tensor:
    """What is alike in all heads: (B, K, I, J) to (B, K, 1, I, J) where there is an axis of heads."""
    return x.unsqueeze(2) if heads else x


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scale: float | None) -> Tensor:
    """PyTorch's fused attention, which takes four dimensions: chunks as heads, or as rows where there are heads."""
    if q.dim() == 4:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    if mask is not None and mask.dim() == 5:
        mask = mask.expand(*q.shape[:2], *mask.shape[2:]).flatten(0, 1)
    q_, k_, v_ = (t.flatten(0, 1) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q_, k_, v_, attn_mask=mask, dropout_p=dropout, scale=scale)
    return out.unflatten(0, q.shape[:2])


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
    block: int = _CPU_BLOCK,
) -> Tensor:
    """`softmax(scale q k^T + bias) v` over the keys up to each query, `block` queries at a time; differentiable once.

    q and k are (B, K, [H,] C, Z) in any floating dtype, v and the result (B, K, [H,] C, E); the bias (2C - 1,) and the
    scale are as in `chunk_attention`. Scores and the gradients of queries and keys are computed in fp32; products with
    values, which are the widest, in the dtype of v.
    """
    with without_autocast(q.device):
        dtype = torch.promote_types(v.dtype, torch.float32)
        q, k = (t.to(dtype).flatten(0, -3) for t in (q, k))
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        bias = None if bias is None else bias.to(dtype)
        return _CausalAttention.apply(q, k, v.flatten(0, -3), bias, scale, block).view(v.shape)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, block: int) -> Tensor:
        """q, k (G, C, Z), v (G, C, E), bias (2C - 1,)."""
        out, weights = _causal_attention(q, k, v, bias, scale, block)
        ctx.save_for_backward(q, k, v, weights)
        ctx.block, ctx.scale = block, scale
        return cast(Tensor, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        biased = ctx.needs_input_grad[3]
        d_q, d_k, d_v, d_bias = _causal_attention_backward(gradient, q, k, v, weights, ctx.scale, ctx.block, biased)
        return d_q, d_k, d_v, d_bias if biased else None, None, None


# Operators of their own: what a compiler traces is as long for every chunk.


def _causal_attention_fake(q, k, v, bias, scale, block):
    return torch.empty_like(v), v.new_empty(_kept_weights(q.shape[0], q.shape[1], block))


@operator(_causal_attention_fake)
def _causal_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, block: int
) -> tuple[Tensor, Tensor]:
    """Outputs (G, C, E), and the weights (G, c, J) of all blocks, one after another."""
    chunk, kept = q.shape[1], v.new_empty(_kept_weights(q.shape[0], q.shape[1], block))
    matrix = None if bias is None else bias.unfold(0, chunk, 1).flip(0)
    future = torch.full((block, block), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    out = torch.empty_like(v)
    for begin, end, weights in _weights_of_blocks(kept, q, block):
        hidden = future[: end - begin, : end - begin]
        if matrix is None:
            scores = (q[:, begin:end] * scale) @ k[:, :end].mT
            scores[..., begin:] += hidden
        else:
            start = matrix[begin:end, :end].clone()
            start[:, begin:] += hidden
            scores = torch.baddbmm(start.expand(len(q), -1, -1), q[:, begin:end], k[:, :end].mT, alpha=scale)
        if scores.dtype == weights.dtype:
            torch.softmax(scores, -1, out=weights)
        else:
            weights.copy_(scores.softmax(-1))
        torch.bmm(weights, v[:, :end], out=out[:, begin:end])
    return out, kept


def _kept_weights(groups: int, chunk: int, block: int) -> int:
    """Numbers that blocks keep, in terms that hold for a length that a compiler leaves open."""
    whole = (chunk + block - 1) // block - 1
    return groups * (block * block * whole * (whole + 1) // 2 + (chunk - whole * block) * chunk)


def _weights_of_blocks(kept: Tensor, q: Tensor, block: int) -> Iterator[tuple[int, int, Tensor]]:
    """First and end of each block of queries, and what is kept of it, (G, c, J)."""
    (groups, chunk), place = q.shape[:2], 0
    for begin in range(0, chunk, block):
        end = min(begin + block, chunk)
        size = groups * (end - begin) * end
        yield begin, end, kept[place : place + size].view(groups, end - begin, end)
        place += size


def _causal_attention_backward_fake(gradient, q, k, v, kept, scale, block, biased):
    d_bias = q.new_empty(2 * q.shape[1] - 1 if biased else 0)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), d_bias


@operator(_causal_attention_backward_fake)
def _causal_attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, scale: float, block: int, biased: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, and of the bias (2C - 1,) unless it is none: then no numbers."""
    chunk = q.shape[1]
    d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    d_matrix = q.new_zeros(chunk, chunk) if biased else None
    # From the end: the last block, which meets every key, writes what the others add to.
    for begin, end, weights in reversed([*_weights_of_blocks(kept, q, block)]):
        own, d_out = q[:, begin:end], gradient[:, begin:end]
        d_weights = (d_out @ v[:, :end].mT).to(q.dtype)
        d_scores = torch._softmax_backward_data(d_weights, weights.to(q.dtype), -1, q.dtype)
        if d_matrix is not None:
            d_matrix[begin:end, :end] = d_scores.sum(0)
        if scale != 1.0:
            torch.mul(d_scores, scale, out=d_scores)
        torch.bmm(d_scores, k[:, :end], out=d_q[:, begin:end])
        if end == chunk:
            torch.bmm(d_scores.mT, own, out=d_k)
            torch.bmm(weights.mT, d_out, out=d_v)
        else:
            d_k[:, :end].baddbmm_(d_scores.mT, own)
            d_v[:, :end].baddbmm_(weights.mT, d_out)
    return d_q, d_k, d_v, q.new_empty(0) if d_matrix is None else _by_distance(d_matrix).contiguous()


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotary positions (arXiv 2104.09864): neighbouring channels 2j, 2j + 1 turn by `position base^(-2j / Z)` radians.

    x is (B, L, H, Z) with Z even, any floating dtype, which the result has; positions are (L,), or (B, L) to differ
    between rows. Turning happens in at least fp32.
    """
    return turn(x, turns(positions, x.shape[-1], base, torch.promote_types(x.dtype, torch.float32)))


def turns(positions: Tensor, width: int, base: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Cosines and sines by which `turn` turns pairs of channels: positions (..., L) to (..., L, width / 2, 2).

    Make them once for all layers, and for queries and keys.
    """
    if width % 2:
        raise ValueError(f"width={width} is odd: rotary positions turn pairs of channels")
    # In fp64 until rounded once: in fp32, an angle of thousands of radians is off by 1e-4.
    powers = torch.arange(0, width, 2, device=positions.device, dtype=torch.float64) / -width
    angles = positions.to(torch.float64)[..., None] * base**powers
    return torch.stack((angles.cos(), angles.sin()), -1).to(dtype)


def turn(x: Tensor, turns: Tensor) -> Tensor:
    """Turn pairs of channels of x (B, L, H, Z) by `turns`, (L, Z / 2, 2) or (B, L, Z / 2, 2)."""
    turns = turns.unsqueeze(-3)
    if tracing() == "compile":  # a compiler computes x once more at the neighbours, in the kernel around it
        pairs = x.to(turns.dtype).unflatten(-1, (-1, 2))
        sign = 2 * torch.arange(2, device=x.device, dtype=turns.dtype) - 1
        return (pairs * turns[..., :1] + pairs.flip(-1) * (turns[..., 1:] * sign)).flatten(-2).to(x.dtype)
    if tracing() == "trace":
        return _Turn.forward(None, x, turns)
    turned: Tensor = _Turn.apply(x, turns)
    return turned


class _Turn(torch.autograd.Function):
    """The backward pass turns the other way; x is not saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, turns: Tensor) -> Tensor:
        if ctx is not None:
            ctx.save_for_backward(turns)
        pairs = x.to(turns.dtype).unflatten(-1, (-1, 2))
        if tracing() is None:  # one pass over memory; compilers and exporters lack complex numbers
            # A complex number cannot begin at an odd place of memory.
            pairs = pairs.clone() if pairs.storage_offset() % 2 else pairs.contiguous()
            turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turns))
        else:  # without stacking, so that a compiler can make it part of the kernel around it
            cos, sin = turns[..., :1], turns[..., 1:]
            sign = 2 * torch.arange(2, device=x.device, dtype=turns.dtype) - 1
            turned = pairs * cos + pairs.flip(-1) * (sin * sign)
        return turned.flatten(-2).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (turns,) = ctx.saved_tensors
        sign = 1 - 2 * torch.arange(2, device=turns.device, dtype=turns.dtype)
        return _Turn.apply(gradient, turns * sign), None


def toeplitz(vector: Tensor, queries: int) -> Tensor:
    """The matrix whose entry (i, j) is `vector[I - 1 + j - i]`: (..., I + J - 1) to (..., I, J)."""
    if tracing() == "trace":
        return _Toeplitz.forward(None, vector, queries)
    if queries == 1:  # a decoding step; a size that grows with it would make a compiled graph its own
        return vector.unsqueeze(-2)
    matrix: Tensor = _Toeplitz.apply(vector, queries)
    return matrix


class _Toeplitz(torch.autograd.Function):
    """PyTorch's own backward of `unfold` takes a GPU as long as a matrix product."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, queries: int) -> Tensor:
        if tracing():  # unfold takes no size that a compiler leaves open
            places = torch.arange(vector.shape[-1] - queries + 1, device=vector.device)
            return vector[..., places + torch.arange(queries, device=vector.device).flip(0)[:, None]]
        return vector.unfold(-1, vector.shape[-1] - queries + 1, 1).flip(-2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _by_distance(gradient), None


def _by_distance(matrix: Tensor) -> Tensor:
    """Sums of diagonals: with I zeros behind each row, read in rows one shorter, a diagonal is a column."""
    queries, keys = matrix.shape[-2:]
    rows = F.pad(matrix.flip(-2), (0, queries)).flatten(-2)
    return rows[..., : queries * (queries + keys - 1)].unflatten(-1, (queries, -1)).sum(-2)
