"""torch.compile without graph breaks: forward, training and the decoding step, in a handful of graphs.

Models have one layer: a second one costs as much time to compile and takes the same branches.
"""

import inspect

import pytest
import torch
import torch._dynamo
import torch._functorch.config
import torch._inductor.config
from builders import make_ids, make_model
from tiny_run import meta_model, tiny_config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.dependencies import MemoryDep
from torch._inductor.scheduler import NopKernelSchedulerNode, Scheduler
from torch._inductor.virtualized import V

from mega_scale.model.megalodon_layers import RotaryTurns


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def loss_and_gradients(call, model, ids):
    model.zero_grad()
    loss = call(ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "changes"),
    [
        ("softmax", {}),
        pytest.param("laplace", {"relative_positional_bias": "simple"}, marks=pytest.mark.slow),
        pytest.param("relu2", {}, marks=pytest.mark.slow),
        pytest.param("softmax", {"use_chunking": False}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_training(activation, changes):
    """With `mark_dynamic`, one graph has to hold for every length: nothing may depend on the first one's."""
    model = make_model(num_hidden_layers=1, attention_activation=activation, **changes)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for length in (21, 30):  # three chunks, the last one filled up; then four
        ids = make_ids(2, length)
        torch._dynamo.mark_dynamic(ids, 1)
        loss, gradients = loss_and_gradients(compiled, model, ids)
        expected_loss, expected = loss_and_gradients(model, model, ids)
        torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=1e-4)
    assert graphs() == 1


@pytest.mark.parametrize("changes", [{}, {"use_chunking": False, "relative_positional_bias": "simple"}], ids=str)
def test_forward_with_padding(changes):
    model, ids = make_model(num_hidden_layers=1, **changes), make_ids(2, 21)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        got, want = (f(ids, attention_mask=mask, use_cache=False).logits for f in (compiled, model))
    torch.testing.assert_close(got[:, 5:], want[:, 5:], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "changes"),
    [
        ("aot_eager", {}),
        ("eager", {"use_chunking": False}),
        ("eager", {"attention_activation": "laplace", "relative_positional_bias": "simple"}),
    ],
    ids=str,
)
def test_decoding_step(backend, changes):
    model, ids = make_model(num_hidden_layers=1, chunk_size=4, **changes), make_ids(2, 19)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        cache = model(ids[:, :6], use_cache=True).past_key_values
        for i in range(6, 19):  # three borders of chunks
            logits = compiled(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits
            torch.testing.assert_close(logits[:, 0], want[:, i], atol=1e-5, rtol=1e-4)
    assert graphs() <= 6


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_lengths_share_a_few_graphs(batch):
    """One for the first length; then one each for a chunk at most, for whole chunks and for any other length."""
    model = make_model(num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for length in (13, 21, 30, 11, 45):
            ids = make_ids(batch, length)
            torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert graphs() <= 4


# Kernels that read or write tokens, forward and backward: what a compiler makes of all that is neither a product nor an
# operator of ours. Forward, one a gap between these: for a Mega its norm, the average's gate, queries and keys, values,
# the gate, the update with the next norm, the activation, the residual stream. Backward, one a gap as well, and one for
# each bias and gain, whose gradient sums over tokens.
KERNELS = {"mega": (8, 18), "megalodon": (11, 20)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KERNELS)
def test_a_block_is_a_kernel_a_gap_and_its_graph_no_larger_for_longer_rows(kind, monkeypatch):
    """Forward and backward, as engines compile it; what is generated is not compiled, so results are of no use."""
    model = meta_model(tiny_config(kind, num_hidden_layers=1)).to_empty(device="cpu")
    block, nodes = model.base_model.layers[0], {512: [], 8192: []}
    generate = Scheduler.codegen

    def count(scheduler):
        kernels = [
            node for node in scheduler.nodes if not (node.is_extern() or isinstance(node, NopKernelSchedulerNode))
        ]
        found.append(sum(any(map(tokens, node.read_writes.reads_and_writes())) for node in kernels))
        nodes[length].append(len(V.graph.module.graph.nodes))
        return generate(scheduler)

    def tokens(dependency):
        return isinstance(dependency, MemoryDep) and int(V.graph.get_numel(dependency.name)) >= length

    monkeypatch.setattr(Scheduler, "codegen", count)
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda *_: lambda *_: None)
    caches = torch._functorch.config.patch(enable_autograd_cache=False)
    with caches, torch._inductor.config.patch(fx_graph_cache=False):
        for length in nodes:
            found = []
            forward = torch.compile(inspect.unwrap(type(block).forward), fullgraph=True, dynamic=False)
            x = torch.randn(1, length, 18, requires_grad=True)
            more = {} if kind == "mega" else {"rotary": RotaryTurns.at(0, None, x, model.config)}
            forward(block, x, **more)[0].sum().backward()
            # A sum over more tokens may join its neighbour.
            assert len(found) == 2 and all(count <= most for count, most in zip(found, KERNELS[kind], strict=True))
    assert nodes[512] == nodes[8192]
