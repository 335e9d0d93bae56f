"""Causal softmax attention of whole chunks on a GPU: large matrix products, and Triton kernels that hold scores.

Values of Mega are thousands of channels wide, wider than fused attention kernels hold in a multiprocessor. So products
with values are the vendor's, in blocks of queries that each meet only the keys up to their end. Scores are never in
memory: one kernel multiplies queries and keys twice, for the statistics of each query and then for its weights, as the
product is an eighth of that with values or less. Weights are saved in the dtype of values: C numbers a token and head.
By `delta = sum dO O`, which is the mean that the softmax's gradient subtracts, gradients of scores are written where
their product `dO V^T` is computed: neither it nor weights in fp32 are in memory.

Dropout of weights is that of places (`dropout_triton`). Both kernels hash in registers, and write weights as they are
and as they are multiplied; the latter are not saved. Places are numbers, or in compiled blocks a tensor on the device.

Tokens stay as layers make them, heads side by side: to lay each head out by itself would be a pass over memory.

Legend: M chunks of all sequences, H heads, G = M H of both, C chunk, Z width of a head's queries and keys, E width of
its values, R queries of a block. ROWS queries meet KEYS keys in a program's tile, DEPTH channels at a time.

    q, k, v, out         (M, C, H, Z), (M, C, H, Z), (M, C, H, E) and (M, C, H, E), contiguous, of one dtype
    weights, d_scores    (G, C, C) in it; read and written up to the last key of each block of queries
    dropped              the same of the weights that values are multiplied with; empty without dropout
    bias                 (2C - 1,) fp32: its entry m belongs to key minus query m - (C - 1)
    since                (G, C) int32: the first key that a query sees
    place                (3,) int64, in place of the numbers key, first_row and first_position of dropout
    delta                (M, C, H) fp32
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mega_scale.ops import KERNELS, device_kind, once_differentiable, operator, tracing, without_autocast
from mega_scale.ops.attention import GPU_BLOCK
from mega_scale.ops.elementwise import MOST_KEYS, PositionalDropout

try:
    # In a `try`, as transformers demands every other import of a model's own files to be installed.
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("attention by Triton kernels needs triton: pip install 'mega_scale[triton]'") from missing

from mega_scale.ops.dropout_triton import column_hash, keep, launch_numbers, place_hash
from mega_scale.ops.gates_triton import gate_gradients

# Of 4,096 tokens, blocks of 256 multiply 0.53 of the square, of 512 0.56, and read values at 256 FLOPs a byte.
BLOCK = GPU_BLOCK
ROWS = 128
DISTANCES = {"ROWS": 32, "KEYS": 128, "num_warps": 4}
WIDTH = {"WIDTH": 1024, "num_warps": 4}
# Enough of the bias's programs for a GPU.
_PROGRAMS = 1024


def tile(narrow: bool) -> dict[str, int]:
    """What a kernel with products is compiled with: guesses until they are measured. Narrow ones hold more numbers."""
    return {"ROWS": ROWS, "KEYS": 64 if narrow else 128, "DEPTH": 64, "num_warps": 8, "num_stages": 3}


_HEAD_COLUMNS = tl.constexpr(MOST_KEYS)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _tile_product(
    a, b, group, row, column, rows, width, heads, DEPTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """`a b^T` of some rows of one group in each, (M, rows, heads, width), in fp32."""
    first = (group // heads * rows * heads + group % heads) * width
    a += first
    b += first
    step = heads * width
    total = tl.zeros((ROWS, KEYS), tl.float32)
    for begin in range(0, width, DEPTH):
        z = begin + tl.arange(0, DEPTH)
        own = tl.load(
            a + row[:, None] * step + z[None, :],
            mask=(row < rows)[:, None] & (z < width)[None, :], other=0.0,
        )  # fmt: skip
        other = tl.load(
            b + column[None, :] * step + z[:, None],
            mask=(column < rows)[None, :] & (z < width)[:, None], other=0.0,
        )  # fmt: skip
        if INTERPRETED:  # the interpreter multiplies bf16 as if its bits were integers
            own, other = own.to(tl.float32), other.to(tl.float32)
        total = tl.dot(own, other, total, input_precision="ieee")
    return total


@triton.jit
def _scores(
    q, k, bias, group, query, first, own, chunk, width, heads, scale, BIAS: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Scores of queries by KEYS keys from `first` on; `own` is the first key that each sees."""
    key = first + tl.arange(0, KEYS)
    score = _tile_product(q, k, group, query, key, chunk, width, heads, DEPTH, ROWS, KEYS) * scale
    visible = (key[None, :] <= query[:, None]) & (key[None, :] >= own[:, None])
    if BIAS:
        at = (chunk - 1) + key[None, :] - query[:, None]
        score += tl.load(bias + at, mask=visible & (query < chunk)[:, None], other=0.0)
    return tl.where(visible, score, float("-inf"))


@triton.jit
def _stays(
    group, query, column, key, first_row, first_position, first_column, threshold, chunk, chunks, heads,
):  # fmt: skip
    """Which weights are kept, of queries by keys of one group."""
    row, of_row = group // (chunks * heads), group % (chunks * heads)
    place = place_hash(row + first_row, (of_row // heads) * chunk + query + first_position, key)
    columns = column + first_column + (of_row % heads) * _HEAD_COLUMNS
    return keep(place[:, None], column_hash(columns, key)[None, :], threshold)


@triton.jit
def _read_place(place, key, first_row, first_position, PLACED: tl.constexpr):
    """Key, first row and first position: the last 32 bits of those in `place`, or the numbers."""
    if PLACED:
        key, first_row = tl.load(place).to(tl.int32), tl.load(place + 1).to(tl.int32)
        first_position = tl.load(place + 2).to(tl.int32)
    return key, first_row, first_position


@triton.jit(do_not_specialize=["place", "key", "first_row", "first_position", "first_column", "threshold"])
def weights_kernel(
    q, k, bias, since, weights, dropped, place, key, first_row, first_position, first_column, threshold, factor, chunk,
    width, chunks, heads, scale, BIAS: tl.constexpr, DOCUMENTS: tl.constexpr, DROPOUT: tl.constexpr,
    PLACED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Weights of ROWS queries, zero where they do not see; program (i, g) has the i-th last ones of group g."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # those that take longest first
    group = tl.program_id(1).to(tl.int64)
    query = tile * ROWS + tl.arange(0, ROWS)
    end = tl.minimum((tile + 1) * ROWS, chunk)
    met = tl.minimum(((tile * ROWS) // BLOCK + 1) * BLOCK, chunk)
    own, begin = query * 0, 0
    if DOCUMENTS:
        own = tl.load(since + group * chunk + query, mask=query < chunk, other=0x7FFFFFFF)
        begin = tl.min(own, 0) // KEYS * KEYS
        own = tl.where(query < chunk, own, 0)

    largest, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    for first in range(begin, end, KEYS):
        score = _scores(q, k, bias, group, query, first, own, chunk, width, heads, scale, BIAS, ROWS, KEYS, DEPTH)
        most = tl.maximum(largest, tl.max(score, 1))
        # A tile in which a query sees nothing, before its document.
        beyond = tl.where(most == float("-inf"), 0.0, most)
        total = total * tl.exp(largest - beyond) + tl.sum(tl.exp(score - beyond[:, None]), 1)
        largest = most

    key, first_row, first_position = _read_place(place, key, first_row, first_position, PLACED)
    # Places in a group are of 32 bits: addresses of a tile would fill the registers.
    weights += group * chunk * chunk
    dropped += group * chunk * chunk
    row = (query * chunk)[:, None]
    for first in range(0, met, KEYS):
        column = first + tl.arange(0, KEYS)
        there = (query < chunk)[:, None] & (column < met)[None, :]
        weight = tl.zeros((ROWS, KEYS), tl.float32)
        if (first >= begin) & (first < end):
            score = _scores(q, k, bias, group, query, first, own, chunk, width, heads, scale, BIAS, ROWS, KEYS, DEPTH)
            weight = tl.exp(score - largest[:, None]) / total[:, None]
        tl.store(weights + row + column[None, :], weight.to(weights.dtype.element_ty), mask=there)
        if DROPOUT:
            stays = _stays(
                group, query, column, key, first_row, first_position, first_column, threshold, chunk, chunks, heads
            )
            # Rounded as they are where another operation drops them.
            weight = weight.to(weights.dtype.element_ty).to(tl.float32)
            weight = tl.where(stays, weight * factor, 0.0)
            tl.store(dropped + row + column[None, :], weight.to(weights.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["place", "key", "first_row", "first_position", "first_column", "threshold"])
def scores_gradient_kernel(
    d_out, v, weights, delta, d_scores, dropped, place, key, first_row, first_position, first_column, threshold, factor,
    chunk, width, chunks, heads, DROPOUT: tl.constexpr, PLACED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Gradients of scaled scores, `P (dO V^T - delta)`; program (i, j, g) has the i-th queries and j-th keys."""
    first_query, first = tl.program_id(0) * ROWS, tl.program_id(1) * KEYS
    met = tl.minimum((first_query // BLOCK + 1) * BLOCK, chunk)
    if first < met:
        group = tl.program_id(2).to(tl.int64)
        query, column = first_query + tl.arange(0, ROWS), first + tl.arange(0, KEYS)
        at, of_group = (query * chunk)[:, None] + column[None, :], group * chunk * chunk
        there = (query < chunk)[:, None] & (column < met)[None, :]
        slope, kept = tl.zeros((ROWS, KEYS), tl.float32), tl.zeros((ROWS, KEYS), tl.float32)
        if first < first_query + ROWS:
            slope = _tile_product(d_out, v, group, query, column, chunk, width, heads, DEPTH, ROWS, KEYS)
            weight = tl.load(weights + of_group + at, mask=there, other=0.0).to(tl.float32)
            if DROPOUT:
                key, first_row, first_position = _read_place(place, key, first_row, first_position, PLACED)
                stays = _stays(
                    group, query, column, key, first_row, first_position, first_column, threshold, chunk, chunks, heads
                )
                slope, kept = tl.where(stays, slope * factor, 0.0), tl.where(stays, weight * factor, 0.0)
            of_query = (group // heads * chunk + query) * heads + group % heads
            mean = tl.load(delta + of_query, mask=query < chunk, other=0.0)
            slope = weight * (slope - mean[:, None])
        tl.store(d_scores + of_group + at, slope.to(d_scores.dtype.element_ty), mask=there)
        if DROPOUT:
            tl.store(dropped + of_group + at, kept.to(dropped.dtype.element_ty), mask=there)


@triton.jit
def distances_kernel(d_scores, sums, chunk, pairs, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Sums of gradients by distance; program (i, s) has KEYS distances, of every n-th of the `pairs` of a group and
    ROWS queries, n being the number of programs along s. `sums` is (n, C) fp32."""
    distance = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    tiles = tl.cdiv(chunk, ROWS)
    total = tl.zeros((KEYS,), tl.float32)
    for pair in range(tl.program_id(1), pairs, tl.num_programs(1)):
        query = pair % tiles * ROWS + tl.arange(0, ROWS)
        key = query[:, None] - distance[None, :]
        at = ((tl.cast(pair // tiles, tl.int64) * chunk + query) * chunk)[:, None] + key
        total += tl.sum(tl.load(d_scores + at, mask=(key >= 0) & (query < chunk)[:, None], other=0.0).to(tl.float32), 0)
    tl.store(sums + tl.program_id(1).to(tl.int64) * chunk + distance, total, mask=distance < chunk)


@triton.jit
def row_products_kernel(a, b, products, width, WIDTH: tl.constexpr):
    """Sums of `a b` over the channels of a row, one row a program."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((WIDTH,), tl.float32)
    for begin in range(0, width, WIDTH):
        at = begin + tl.arange(0, WIDTH)
        own = tl.load(a + row * width + at, mask=at < width, other=0.0).to(tl.float32)
        total += own * tl.load(b + row * width + at, mask=at < width, other=0.0).to(tl.float32)
    tl.store(products + row, tl.sum(total, 0))


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
    numbers: Tensor | None = None,
    dropout: PositionalDropout | None = None,
    gate: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`softmax(scale q k^T + bias) v` over the keys up to each query, of its own document, times `silu` of the gate.

    q and k are (B, K, [H,] C, Z) in any floating dtype, v (B, K, [H,] C, E) in bf16 or fp16 (in fp32 matrix products
    are slow), the bias (2C - 1,) and the scale as in `chunk_attention`; `numbers` (B, K, C) do not decrease in a chunk
    and are equal in a document, none where a chunk is one. Queries and keys are rounded to the dtype of v, as fused
    attention does. Scores, softmax and the gradients of weights are fp32; weights and the gradients of scores are
    multiplied in the dtype of v. `dropout` drops weights by place. The gate is as in `chunk_attention`. Differentiable
    once.
    """
    if device_kind(v) != "cuda" and not INTERPRETED.value:
        raise ValueError(
            f"impl='triton' needs a GPU and v is on {v.device}: use impl='causal', or 'sdpa' for documents"
        )
    if v.dtype == torch.float64:
        raise ValueError("impl='triton' computes in fp32 and v is in fp64: use impl='causal', or 'sdpa' for documents")
    with without_autocast(q.device):
        heads = v.shape[2] if v.dim() == 5 else 1
        # (M, C, H, W), which is what layers made before heads became an axis of their own.

        def by_token(t: Tensor) -> Tensor:
            t = t.transpose(2, 3) if t.dim() == 5 else t.unsqueeze(3)
            return t.to(v.dtype).flatten(0, 1).contiguous()

        q, k, own = by_token(q), by_token(k), by_token(v)
        pre, shift = (None, None) if gate is None else (by_token(gate[0]), gate[1])
        since = None
        if numbers is not None:
            # The place in its chunk where each token's document begins.
            numbers = numbers.flatten(0, 1)
            begins = F.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0), value=True)
            places = torch.arange(numbers.shape[1], device=numbers.device)
            since = torch.where(begins, places, 0).cummax(1).values.int().repeat_interleave(heads, 0)
        bias = None if bias is None else bias.float().contiguous()
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        drop = (v.shape[1], *((0.0, 0, 0, 0, 0) if dropout is None else dropout[:5]))
        place = None if dropout is None else dropout.place
        out: Tensor = _TritonAttention.apply(q, k, own, bias, since, place, scale, drop, pre, shift)
        out = out.unflatten(0, v.shape[:2])
        return out.transpose(2, 3) if v.dim() == 5 else out.squeeze(3)


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, since: Tensor | None, place: Tensor | None,
        scale: float, drop: Any, pre: Tensor | None, shift: Tensor | None,
    ) -> Tensor:  # fmt: skip
        weights, dropped = softmax_weights(q, k, bias, since, place, scale, *drop)
        out: Tensor = weighted_values(dropped if drop[1] else weights, v)
        ctx.save_for_backward(q, k, v, weights, out, place, pre, shift)
        ctx.scale, ctx.drop = scale, drop
        return out if pre is None or shift is None else (out * F.silu(pre + shift.view(v.shape[2:]))).to(v.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, out, place, pre, shift = ctx.saved_tensors
        d_pre = d_shift = None
        if pre is not None:
            d_out, d_pre, delta, d_shift = _ungate(d_out, out, pre, shift)
        elif tracing() is None:
            delta = row_products(d_out, out)
        else:  # a compiler makes it part of the kernel that computes d_out, which reads out as well
            delta = (d_out.float() * out.float()).sum(-1)
        d_scores, dropped = scores_gradient(d_out, v, weights, delta, place, *ctx.drop)
        d_q, d_k = score_products(d_scores, q, k, ctx.scale)
        d_v = values_gradient(dropped if ctx.drop[1] else weights, d_out)
        d_bias = None
        if ctx.needs_input_grad[3]:
            by_distance = distance_sums(d_scores).flip(0)
            d_bias = torch.cat([by_distance, by_distance.new_zeros(len(by_distance) - 1)])
        return d_q, d_k, d_v, d_bias, None, None, None, None, d_pre, d_shift


def _ungate(gradient: Tensor, out: Tensor, pre: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the gradient of gated outputs those of outputs and of the gate (M, C, H, E), delta, and that of its bias."""
    tokens, heads = out.shape[:2], out.shape[2]
    flat = (t.flatten(2).flatten(0, 1) for t in (gradient, out, pre))
    d_out, d_pre, delta, sums = gate_gradients(*flat, shift, heads)
    d_out, d_pre = (t.view(out.shape) for t in (d_out, d_pre))
    return d_out, d_pre, delta.sum(-1).unflatten(0, tokens), sums.sum(0).to(shift.dtype)


def _products(x: Tensor, squares: Tensor, *others: Tensor) -> Iterable[tuple[slice, int, list[Tensor]]]:
    """Queries of each block of tokens x (M, C, H, W), the number of keys that they meet, and what a launch multiplies:
    matrices of `squares` (G, C, C), and with them tokens (batch, C, W) of x and others like x.

    A batch is all chunks of a head, or all heads of a chunk, whichever makes fewer launches: no library of products
    takes both, as both have strides of their own.
    """
    many, chunk, heads, _ = x.shape
    given = [squares.view(many, heads, chunk, chunk), *(t.transpose(1, 2) for t in (x, *others))]
    batches = [list(batch) for batch in zip(*(t.unbind(int(heads <= many)) for t in given), strict=True)]
    for begin in range(0, chunk, BLOCK):
        end = min(begin + BLOCK, chunk)
        for batch in batches:
            yield slice(begin, end), end, batch


def _launches(x: Tensor) -> int:
    """How many products `_products` says for tokens (M, C, H, W)."""
    return -(-x.shape[1] // BLOCK) * min(x.shape[0], x.shape[2])


KERNELS |= {
    "mega_scale::weighted_values": lambda weights, v: _launches(v),
    "mega_scale::values_gradient": lambda weights, d_out: _launches(d_out),
    "mega_scale::score_products": lambda scores, q, *_: 2 * _launches(q),
    "mega_scale::distance_sums": lambda *_: 2,
}


def _place_arguments(
    p: float, key: int, first_row: int, first_position: int, first_column: int, like: Tensor
) -> tuple[Any, ...]:
    """What kernels take of dropout."""
    key, threshold, factor = launch_numbers(p, key, like.dtype)
    return key, first_row, first_position, first_column, threshold, factor


def _softmax_weights_fake(q, k, bias, since, place, scale, chunks, p, *_):
    weights = q.new_empty(q.shape[0] * q.shape[2], q.shape[1], q.shape[1])
    return weights, torch.empty_like(weights) if p else q.new_empty(0)


@operator(_softmax_weights_fake)
def softmax_weights(
    q: Tensor, k: Tensor, bias: Tensor | None, since: Tensor | None, place: Tensor | None, scale: float, chunks: int,
    p: float, key: int, first_row: int, first_position: int, first_column: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weights, and with p > 0 those that dropout leaves; rows are of so many chunks."""
    many, chunk, heads, width = q.shape
    groups = many * heads
    weights = q.new_empty(groups, chunk, chunk)
    dropped = torch.empty_like(weights) if p else q.new_empty(0)
    with torch.cuda.device_of(q):
        weights_kernel[(-(-chunk // ROWS), groups)](
            q, k, q if bias is None else bias, q if since is None else since, weights, dropped if p else weights,
            q if place is None else place, *_place_arguments(p, key, first_row, first_position, first_column, q), chunk,
            width, chunks, heads, scale, BIAS=bias is not None, DOCUMENTS=since is not None, DROPOUT=p > 0,
            PLACED=place is not None, BLOCK=BLOCK, **tile(True),
        )  # fmt: skip
    return weights, dropped


def _weighted_values_fake(weights, v):
    return torch.empty_like(v)


@operator(_weighted_values_fake)
def weighted_values(weights: Tensor, v: Tensor) -> Tensor:
    """`weights v`, (M, C, H, E), by `_products`."""
    out = torch.empty_like(v)
    for rows, keys, (weight, value, result) in _products(v, weights, out):
        torch.bmm(weight[:, rows, :keys], value[:, :keys], out=result[:, rows])
    return out


def _row_products_fake(a, b):
    return a.new_empty(a.shape[:-1], dtype=torch.float32)


@operator(_row_products_fake)
def row_products(a: Tensor, b: Tensor) -> Tensor:
    """Sums of `a b` over channels: (M, C, H, E) twice to (M, C, H) fp32."""
    products = a.new_empty(a.shape[:-1], dtype=torch.float32)
    with torch.cuda.device_of(a):
        row_products_kernel[(products.numel(),)](a.contiguous(), b, products, a.shape[-1], **WIDTH)
    return products


def _scores_gradient_fake(d_out, v, weights, delta, place, chunks, p, *_):
    return torch.empty_like(weights), torch.empty_like(weights) if p else v.new_empty(0)


@operator(_scores_gradient_fake)
def scores_gradient(
    d_out: Tensor, v: Tensor, weights: Tensor, delta: Tensor, place: Tensor | None, chunks: int, p: float, key: int,
    first_row: int, first_position: int, first_column: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of scaled scores, and with p > 0 the weights that dropout left, as `softmax_weights` has them."""
    many, chunk, heads, width = v.shape
    d_scores = torch.empty_like(weights)
    dropped = torch.empty_like(weights) if p else v.new_empty(0)
    own = tile(narrow=p > 0)
    with torch.cuda.device_of(v):
        scores_gradient_kernel[(-(-chunk // ROWS), -(-chunk // own["KEYS"]), many * heads)](
            d_out.contiguous(), v, weights, delta, d_scores, dropped if p else d_scores, v if place is None else place,
            *_place_arguments(p, key, first_row, first_position, first_column, v), chunk, width, chunks, heads,
            DROPOUT=p > 0, PLACED=place is not None, BLOCK=BLOCK, **own,
        )  # fmt: skip
    return d_scores, dropped


def _score_products_fake(d_scores, q, k, scale):
    return torch.empty_like(q), torch.empty_like(k)


@operator(_score_products_fake)
def score_products(d_scores: Tensor, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradients of queries and keys, from those of scaled scores."""
    d_q, d_k = torch.empty_like(q), torch.empty_like(k)
    for rows, keys, (slopes, query, key, of_query, of_key) in _products(q, d_scores, k, d_q, d_k):
        _scaled_product(slopes[:, rows, :keys], key[:, :keys], scale, of_query[:, rows])
        # A block of keys is seen from its first token on: one product sums over all of its queries.
        _scaled_product(slopes[:, rows.start :, rows].mT, query[:, rows.start :], scale, of_key[:, rows])
    return d_q, d_k


def _scaled_product(a: Tensor, b: Tensor, scale: float, out: Tensor) -> None:
    torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)  # with beta 0, what `out` holds does not count


def _values_gradient_fake(weights, d_out):
    return torch.empty_like(d_out, memory_format=torch.contiguous_format)


@operator(_values_gradient_fake)
def values_gradient(weights: Tensor, d_out: Tensor) -> Tensor:
    """`weights^T d_out`, (M, C, H, E), by `_products`, of blocks of keys."""
    d_v = torch.empty_like(d_out, memory_format=torch.contiguous_format)
    for rows, _, (weight, slopes, result) in _products(d_out, weights, d_v):
        torch.bmm(weight[:, rows.start :, rows].mT, slopes[:, rows.start :], out=result[:, rows])
    return d_v


def _distance_sums_fake(d_scores):
    return d_scores.new_empty(d_scores.shape[1], dtype=torch.float32)


@operator(_distance_sums_fake)
def distance_sums(d_scores: Tensor) -> Tensor:
    """Sums over queries and groups by how many tokens before the query a key is: (G, C, C) to (C,) fp32."""
    groups, chunk, _ = d_scores.shape
    pairs, tiles = groups * -(-chunk // DISTANCES["ROWS"]), -(-chunk // DISTANCES["KEYS"])
    # Partial sums, as atomic additions change their order, and so the last bits, from run to run.
    sums = d_scores.new_empty(min(pairs, max(_PROGRAMS // tiles, 1)), chunk, dtype=torch.float32)
    with torch.cuda.device_of(d_scores):
        distances_kernel[(tiles, len(sums))](d_scores, sums, chunk, pairs, **DISTANCES)
    return sums.sum(0)
