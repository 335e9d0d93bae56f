"""Attention's Triton kernels: interpreted against the reference, and refused on CPUs."""

import importlib.util
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

from mega_scale.ops import KERNELS, as_if
from mega_scale.ops.attention import chunk_attention
from mega_scale.ops.elementwise import PositionalDropout
from mega_scale.parallel.meter import Meter

HERE = Path(__file__).parent


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@needs_triton
def test_a_cpu_is_refused():
    q = torch.zeros(1, 1, 4, 2)
    with pytest.raises(ValueError, match="needs a GPU and v is on cpu"):
        chunk_attention(q, q, q, torch.zeros(7), causal=True, impl="triton")


@pytest.mark.slow
@needs_triton
def test_interpreted_kernels_match_the_reference():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
         str(HERE / "interpreted_attention.py")],
        capture_output=True, text=True, check=False, timeout=600, cwd=HERE.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


@needs_triton
@pytest.mark.parametrize(("chunks", "heads"), [(1, 1), (1, 4), (8, 4), (4, 8), (3, 1)])
def test_products_are_as_many_launches_as_operators_say(chunks, heads, monkeypatch):
    """However many heads there are: one for each block of queries, and for each head or for each chunk."""
    from mega_scale.ops import attention_triton  # noqa: PLC0415

    launches = []

    def counted(product, *given, **options):
        launches.append(given)
        return product(*given, **options)

    for name in ("bmm", "baddbmm"):
        monkeypatch.setattr(torch, name, partial(counted, getattr(torch, name)))
    length = 600
    x = torch.randn(chunks, length, heads, 4)
    squares = torch.randn(chunks * heads, length, length)
    for operator, given, each in (
        ("weighted_values", (squares, x), 1), ("values_gradient", (squares, x), 1),
        ("score_products", (squares, x, x, 0.5), 2),
    ):  # fmt: skip
        launches.clear()
        getattr(attention_triton, operator)(*given)
        assert len(launches) == KERNELS[f"mega_scale::{operator}"](*given) == 3 * each * min(chunks, heads), operator


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("p", [0.0, 0.1], ids=["", "dropout"])
def test_a_compiler_gets_operators_and_no_scores_on_a_gpu(p):
    """As many nodes for 8,192 tokens as for 512, whether or not weights are dropped by a place in a tensor."""

    def graphs(chunk):
        found = []

        def keep(graph, inputs):
            found.append([(str(node.target), node.meta.get("val")) for node in graph.graph.nodes])
            return graph.forward

        def attend(place, *given):
            drop = PositionalDropout(p, 0, 0, 0, 0, place=place) if p else 0.0
            return chunk_attention(*given, causal=True, scale=1.0, dropout=drop)[0]

        torch._dynamo.reset()
        compiled = torch.compile(
            attend, fullgraph=True, dynamic=False, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep)
        )
        with FakeTensorMode(), as_if("cuda"), torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
            leaves = [torch.empty(1, 2, 4, chunk, w, dtype=torch.bfloat16, requires_grad=True) for w in (16, 16, 32)]
            compiled(torch.empty(3, dtype=torch.int64), *leaves)
        nodes = [node for graph in found for node in graph if node[0].startswith(("aten.", "mega_scale."))]
        own = [name.split(".")[1] for name, _ in nodes if name.startswith("mega_scale.")]
        assert own == ["softmax_weights", "weighted_values", "scores_gradient", "score_products", "values_gradient"]
        assert not any(
            isinstance(value, torch.Tensor) and value.numel() >= chunk**2
            for name, value in nodes
            if name.startswith("aten.")
        )
        return [len(graph) for graph in found]

    assert graphs(512) == graphs(8192)


@needs_triton
@pytest.mark.parametrize("p,squares", [(0.0, 6), (0.1, 8)], ids=["", "dropout"])
def test_bytes_of_a_token_have_a_bound_and_no_fp32_number_is_a_score(p, squares):
    """As on a GPU: forward and backward of a chunk of 2,048 tokens, 256 keys and 2,048 values wide, in bf16."""
    chunk, width, values = 2048, 256, 2048
    with FakeTensorMode(), as_if("cuda"):
        leaves = [
            torch.empty(1, 1, 1, chunk, w, dtype=torch.bfloat16, requires_grad=True) for w in (width, width, values)
        ]
        with Meter() as meter:
            drop = PositionalDropout(p, 1) if p else 0.0
            out, _ = chunk_attention(*leaves, causal=True, scale=1.0, dropout=drop)
            kept = sum(meter.kept().values())
            out.backward(torch.empty_like(out))
    own = [event for event in meter.events if event.name.startswith("mega_scale::")]
    # In bf16, weights are written, and read by two products and for gradients, which are written and read by products;
    # dropout writes weights twice more. An fp32 copy would be two more of them. Of the square 0.56.
    scores = 0.5625 * 2 * chunk * squares
    assert sum(event.read + event.written for event in own) / chunk <= scores + 2 * (8 * values + 6 * width) + 16
    assert kept / chunk <= 2 * chunk + 2 * values + 4, "weights and outputs"
