"""A Megalodon's block by the kernels of compiled blocks, interpreted on a CPU, against the plain form in fp64.

`test_gates_triton.py` runs this file, in a process of its own: TRITON_INTERPRET has to be set before anything imports
triton.
"""

import os

assert os.environ.get("TRITON_INTERPRET") == "1", "run tests/ops/test_gates_triton.py, which sets TRITON_INTERPRET"

# ruff: noqa: E402
import pytest
import torch
from interpreting import round_bf16
from torch import nn

from mega_scale.model.configuration_megalodon import MegalodonConfig
from mega_scale.model.megalodon_layers import MegalodonAttention, MegalodonBlock, RotaryTurns
from mega_scale.model.rows import DocumentBorders
from mega_scale.ops import attention
from mega_scale.ops.attention import ChunkDocuments

SIZES = {"vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "chunk_size": 16}
SIZES |= {"shared_representation_size": 12, "intermediate_size": 20, "nffn_hidden_size": 8, "ema_projection_size": 2}


class _More(nn.Linear):
    """Multiplies as a linear layer, and is none to compilers: as layers in fp8 are."""

    def forward(self, x):
        return super().forward(1.0 * x)


def made(kind=nn.Linear):
    config = MegalodonConfig(**SIZES, timestep_norm_groups=4)
    torch.manual_seed(3)
    layer = MegalodonBlock(config, 0)
    for name in ("wv", "wz", "wr", "wh1"):
        old = layer.mega.get_submodule(name)
        layer.mega.add_module(name, kind(old.in_features, old.out_features))
    for name, parameter in layer.named_parameters():
        width = parameter.shape[-1] if parameter.dim() == 2 else 4
        parameter.data = torch.randn(parameter.shape) * width**-0.5
        if "cema" in name:
            parameter.data = parameter.data.abs()
    return layer, config


def run(layer, config, x, dtype, borders):
    for name, module in layer.named_modules():
        if name != "mega.cema":
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    if dtype == torch.float64:
        layer = layer.double()
    x = x.to(dtype).requires_grad_()
    rotary = RotaryTurns.at(0, None, x, config)
    out, _ = layer.train()(x, rotary, borders=borders)
    names, leaves = zip(*layer.named_parameters(), strict=True)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = torch.autograd.grad(out, [x, *leaves], gradient)
    return {"out": out, **dict(zip(("x", *names), found, strict=True))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("kind", [nn.Linear, _More])
@pytest.mark.parametrize("length", [9, 32, 37])
def test_kernels_compute_what_the_plain_form_does(length, kind, documents, dtype, monkeypatch):
    """In bf16 attention and its gate are kernels, too; the plain form in bf16 is off by 0.022."""
    round_bf16(monkeypatch)
    x = torch.randn(2, length, SIZES["hidden_size"], generator=torch.Generator().manual_seed(length))
    borders = None
    if documents:
        begins = torch.rand(2, length, generator=torch.Generator().manual_seed(2)) < 0.2
        chunk = SIZES["chunk_size"]
        numbers, fill = begins.cumsum(1), -length % chunk if length > chunk else 0
        numbers = torch.cat([numbers, numbers[:, -1:].expand(-1, fill)], 1).unflatten(1, (-1, min(chunk, length)))
        borders = DocumentBorders(begins, ChunkDocuments.of(numbers))
    want = run(*made(kind), x, torch.float64, borders)
    monkeypatch.setattr(MegalodonAttention, "_has_kernels", lambda *_: True)
    monkeypatch.setattr(attention, "runs_triton", lambda *_, **__: True)
    got = run(*made(kind), x, dtype, borders)
    assert want.keys() == got.keys()
    for name, exact in want.items():
        error = (got[name].double() - exact).abs().max() / exact.abs().max().clamp(min=1)
        assert error <= (1e-5 if dtype == torch.float32 else 3e-2), f"{name} differs by {error:.1e}"
