"""Triton kernels of the causal softmax with a Toeplitz bias, forward and backward: a program has rows of scores.

Legend: G chunks of all sequences, C chunk, R queries of a block, from `first` on, J the keys that they meet, from the
chunk's first on. WIDTH is J padded to a power of two.

    scores, d_weights    (G, R, J) fp32, contiguous
    weights, d_scores    (G, C, C), any floating dtype; only the block's queries and keys are written
    bias                 (2C - 1,) fp32: its entry m belongs to key minus query m - (C - 1)
    since                (G, C) int32: the first key that a query sees; read with DOCUMENTS only
    d_bias               (splits, C, C) fp32: its entry (s, i, a) belongs to query i and the key a before it
"""

try:
    # In a `try`, as transformers demands every other import of a model's own files to be installed.
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("attention by Triton kernels needs triton: pip install 'mega_scale[triton]'") from missing


@triton.jit
def weights_kernel(
    scores, bias, since, weights, first, keys, chunk, scale, WIDTH: tl.constexpr, DOCUMENTS: tl.constexpr
):  # fmt: skip
    """Weights of one query, zero where it does not see; program (i, j) has query i of the block in group j."""
    query = first + tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    key = tl.arange(0, WIDTH)
    visible = key <= query
    if DOCUMENTS:
        visible = visible & (key >= tl.load(since + group * chunk + query))
    at = (group * tl.num_programs(0) + tl.program_id(0)) * keys + key
    score = tl.load(scores + at, mask=visible, other=0.0) * scale
    score += tl.load(bias + (chunk - 1 - query) + key, mask=visible, other=0.0)
    score = tl.where(visible, score, float("-inf"))
    # Each query sees itself, so the largest score is a number.
    power = tl.exp(score - tl.max(score, 0))
    weight = power / tl.sum(power, 0)
    row = (group * chunk + query) * chunk
    tl.store(weights + row + key, weight.to(weights.dtype.element_ty), mask=key < keys)


@triton.jit
def scores_gradient_kernel(
    d_weights, weights, d_scores, d_bias, first, keys, chunk, groups, WIDTH: tl.constexpr
):  # fmt: skip
    """Gradients by scaled scores, and by the bias summed over groups; program (i, j) has query i in every n-th group,
    n being the number of programs along j."""
    query = first + tl.program_id(0)
    key = tl.arange(0, WIDTH)
    met = key < keys
    total = tl.zeros((WIDTH,), tl.float32)
    for group in range(tl.program_id(1), groups, tl.num_programs(1)):
        at = (tl.cast(group, tl.int64) * tl.num_programs(0) + tl.program_id(0)) * keys + key
        row = (tl.cast(group, tl.int64) * chunk + query) * chunk
        weight = tl.load(weights + row + key, mask=met, other=0.0).to(tl.float32)
        slope = tl.load(d_weights + at, mask=met, other=0.0)
        slope = weight * (slope - tl.sum(weight * slope, 0))
        tl.store(d_scores + row + key, slope.to(d_scores.dtype.element_ty), mask=met)
        total += slope
    own = (tl.program_id(1).to(tl.int64) * chunk + query) * chunk
    tl.store(d_bias + own + (query - key), total, mask=key <= query)
    for begin in range(query + 1, chunk, WIDTH):
        tl.store(d_bias + own + begin + key, tl.zeros((WIDTH,), tl.float32), mask=begin + key < chunk)
