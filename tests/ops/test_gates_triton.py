"""Kernels of a compiled Megalodon's gates, queries and keys: interpreted against fp64, and which layers take them."""

import importlib.util
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from test_ema_triton import start
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode

from mega_scale.model.basic_layers import MegaLinear
from mega_scale.model.configuration_megalodon import MegalodonConfig
from mega_scale.model.megalodon_layers import MegalodonBlock, RotaryTurns
from mega_scale.ops import as_if

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
KERNELS = ("silu_gradient", "gate_gradients", "turned_queries", "queries_gradients", "layer_norm_gradient")
SIZES = {"vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "chunk_size": 64}
SIZES |= {"shared_representation_size": 16, "intermediate_size": 32, "nffn_hidden_size": 8, "ema_projection_size": 2}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gates", "queries", "layer_norm", "megalodon"])
def test_interpreted_kernels_match_fp64(name):
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", HERE / f"interpreted_{name}.py")
    done = start(*command, TRITON_INTERPRET="1")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


class Another(nn.Linear):
    """More than a product, as a layer in fp8 is."""

    def forward(self, input):
        return super().forward(2 * input)


def hooked(*sizes):
    layer = nn.Linear(*sizes)
    layer.register_forward_hook(lambda *_: None)
    return layer


NONE, OF_LAYERS = {}, {"turned_queries": 1, "queries_gradients": 1}
ALL = dict.fromkeys(KERNELS, 1)


@pytest.mark.parametrize(
    "kind, device, dtype, dropped, taken",
    [
        (nn.Linear, "cuda", torch.bfloat16, [], ALL),
        (MegaLinear, "cuda", torch.bfloat16, [], ALL),
        (nn.Linear, "cuda", torch.bfloat16, ["hidden_dropout_prob"], ALL | {"gate_gradients": 0}),
        (nn.Linear, "cuda", torch.bfloat16, ["dropout_prob"], ALL | {"layer_norm_gradient": 0}),
        (nn.Linear, "cuda", torch.float32, [], ALL | {"gate_gradients": 0}),
        (Another, "cuda", torch.bfloat16, [], OF_LAYERS),
        (hooked, "cuda", torch.bfloat16, [], OF_LAYERS),
        (nn.Linear, "cuda", torch.float64, [], NONE),
        (nn.Linear, "cpu", torch.bfloat16, [], NONE),
    ],
)
def test_layers_that_are_a_product_leave_biases_to_kernels(kind, device, dtype, dropped, taken):
    """Of compiled blocks for GPUs; all others add their own, and queries and keys need no layer of a kind."""
    graphs = []
    torch._dynamo.reset()

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    config = MegalodonConfig(**SIZES, timestep_norm_groups=4, **dict.fromkeys(dropped, 0.1))
    with torch.device("meta"):
        layer = MegalodonBlock(config, 0).train()
    for name in ("wv", "wz", "wr", "wh1"):
        old = layer.mega.get_submodule(name)
        layer.mega.add_module(name, kind(old.in_features, old.out_features))
    with as_if(device), FakeTensorMode():
        for module in layer.modules():
            own = torch.float32 if "Ema" in type(module).__name__ and dtype == torch.bfloat16 else dtype
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=own)))
        x = torch.empty(1, 128, 16, dtype=dtype, requires_grad=True)
        rotary = RotaryTurns.at(0, None, x, config)
        backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
        compiled = torch.compile(partial(layer.__call__), backend=backend, fullgraph=True, dynamic=False)
        out, _ = compiled(x, rotary)
        assert out.shape == x.shape and out.dtype == dtype
        out.sum().backward()
    found = Counter(
        str(node.target).split(".")[1]
        for graph in graphs
        for node in graph.graph.nodes
        if node.op == "call_function" and "." in str(node.target)
    )
    assert {name: found[name] for name in KERNELS} == dict.fromkeys(KERNELS, 0) | taken
