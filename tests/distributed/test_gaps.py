"""What the roofline takes for one kernel, beside what inductor makes for a GPU."""

import inspect

import pytest
import torch
from inductor_kernels import fused_bytes
from torch import nn
from torch._functorch import config as functorch
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode

from mega_scale.config import RunConfig, model_config
from mega_scale.model import causal_lm_class
from mega_scale.model.megalodon_layers import RotaryTurns
from mega_scale.ops import as_if
from mega_scale.parallel.meter import Meter
from mega_scale.parallel.roofline import fused
from mega_scale.settings import resolve

LENGTH = 32768
# Bytes a token of a block's kernels between products, forward and backward, and how many read or write a number of
# every token's channels, at most; our own among them.
LIMITS = {"megalodon-1.3b": (235_500, 14)}
OWN = ("silu_gradient", "gate_gradients", "turned_queries", "queries_gradients", "layer_norm_gradient")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(LIMITS))
def test_inductor_fuses_what_the_roofline_says(name):
    """Forward and backward of a block in bf16, as on an H100."""
    config = model_config(resolve(RunConfig, [f"configs/{name}.yaml"], [])[0].model)
    config.num_hidden_layers = 1
    graphs = []

    def keep(graph, inputs, **options):
        graphs.append((graph, list(inputs), bool(options.get("is_backward"))))
        return make_boxed_func(graph.forward)

    def backend(graph, inputs):
        return compile_fx(graph, inputs, inner_compile=keep)

    with torch.device("meta"):
        block = causal_lm_class(config)(config).base_model.layers[0].train()
    with as_if("cuda"), FakeTensorMode(), functorch.patch(force_non_lazy_backward_lowering=True):
        for module in block.modules():
            dtype = torch.float32 if "Ema" in type(module).__name__ else torch.bfloat16
            for own, parameter in module.named_parameters(recurse=False):
                setattr(module, own, nn.Parameter(torch.empty(parameter.shape, dtype=dtype)))
        x = torch.empty(1, LENGTH, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        forward = torch.compile(inspect.unwrap(type(block).forward), fullgraph=True, dynamic=False, backend=backend)
        rotary = RotaryTurns.at(0, None, x, config)
        with Meter(nn.ModuleList([nn.ModuleList([block])])) as meter:
            forward(block, x, rotary)[0].sum().backward()
    kernels = [size for graph in graphs for size in fused_bytes(*graph)]
    gaps = [event for event in fused([e._replace(module="layers.0") for e in meter.events]) if event.name == "fused"]
    said = sum(event.read + event.written for event in gaps)
    assert len(graphs) == 2
    assert said == pytest.approx(sum(kernels), rel=0.05)
    kernels += [e.read + e.written for e in meter.events if e.name.removeprefix("mega_scale::") in OWN]
    most, many = LIMITS[name]
    assert sum(kernels) <= most * LENGTH
    assert sum(size >= 1000 * LENGTH for size in kernels) <= many
