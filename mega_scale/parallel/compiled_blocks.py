"""Compiled blocks: each block of a model is compiled by itself, and all of a kind share one graph.

A block's graph has as many nodes for any length of rows: averages and norms are operators. What engines do around a
block (gathering its parameters, recomputing it) stays outside, so the same graph serves every layout of rows and
weights. Shapes are compiled as they are, once each; generation, evaluation and anything but plain rows is not compiled.
"""

import inspect
from collections.abc import Container, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mega_scale.model.basic_layers import MegaDropout
from mega_scale.model.rows import DocumentBorders
from mega_scale.ops.attention import ChunkDocuments
from mega_scale.parallel.activation_checkpoint import saving_matmuls

_PLAIN = {"x", "rotary", "borders", "state", "return_state"}  # arguments of plain rows, and of segments of them
_MOST_GRAPHS = 6  # below PyTorch's own limit, beyond which a whole graph is an error


def compile_blocks(model: PreTrainedModel, saving: Container[Any] = ()) -> list[Any]:
    """Have every block compute by a compiled forward while it trains; returns what drops in blocks by position.

    Blocks among `saving` compute all again in the backward pass but for results of matmuls: in their graph, as nobody
    outside sees these.
    """
    backbone: Any = model.base_model
    kinds: dict[tuple[type, bool], tuple[Any, set[Any]]] = {}
    for block in backbone.layers:
        saves = block in saving
        if (kind := (type(block), saves)) not in kinds:
            # What transformers puts around a forward decides whether to recompute it; see CompiledForward.
            forward = inspect.unwrap(type(block).forward)
            whole = saving_matmuls(forward) if saves else forward
            kinds[kind] = torch.compile(whole, fullgraph=True, dynamic=False), set()
        block.forward = CompiledForward(block, *kinds[kind], recomputes=saves)
    drops = [module.drop for module in backbone.layers.modules() if isinstance(module, MegaDropout)]
    return [drop for drop in drops if drop is not None]


def compiled_kinds(model: PreTrainedModel) -> list[type]:
    """The classes of a model's compiled blocks."""
    backbone: Any = model.base_model
    return list({type(block): None for block in backbone.layers if isinstance(block.forward, CompiledForward)})


class CompiledForward:
    """The forward of a block, compiled for training on plain rows; blocks of one kind share `compiled` and `known`.

    Recomputation goes around the compiled function, so what a block received from other ranks is kept as ever.
    """

    def __init__(self, block: Any, compiled: Any, known: set[Any], recomputes: bool) -> None:
        self._block, self._whole = block, block.forward
        self._compiled, self._known, self.recomputes = compiled, known, recomputes
        self.__signature__ = inspect.signature(self._whole)  # what wraps this sees

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        block = self._block
        given = self.__signature__.bind(x, *args, **kwargs).arguments
        given = {name: value for name, value in given.items() if value is not None and value is not False}
        plain = given.keys() <= _PLAIN and block.training and torch.is_grad_enabled()
        key = x.shape, x.dtype, x.requires_grad, *given, torch.is_autocast_enabled(x.device.type)
        if not plain or (key not in self._known and len(self._known) == _MOST_GRAPHS):
            return self._whole(x, *args, **kwargs)
        self._known.add(key)
        if "borders" in given:
            given["borders"] = _one_size(given["borders"])
        compute = partial(self._compiled, block, **{name: value for name, value in given.items() if name != "x"})
        if block.gradient_checkpointing and not self.recomputes:
            return block._gradient_checkpointing_func(compute, x)
        return compute(x)


def _one_size(borders: DocumentBorders) -> DocumentBorders:
    """The same documents in tensors whose sizes do not depend on them: every chunk gets a mask."""
    if borders.chunks.single.numel():
        return DocumentBorders(borders.starts, ChunkDocuments.all_several(borders.chunks.numbers))
    return borders


@contextmanager
def inductor_graphs() -> Iterator[None]:
    """Have what `compile_blocks` compiles run the operators of inductor's graphs one by one, without kernels.

    These are the operators that it fuses, and what a forward graph keeps for a backward graph is what its kernels keep:
    for fake tensors, and to count.
    """
    # Slow to import, and only needed here.
    from torch._functorch import config  # noqa: PLC0415
    from torch._functorch.aot_autograd import make_boxed_func  # noqa: PLC0415
    from torch._inductor.compile_fx import compile_fx  # noqa: PLC0415

    def graphs(module: Any, inputs: Any) -> Any:
        def run(graph: Any, given: Any, **options: Any) -> Any:
            return make_boxed_func(graph.forward)

        return compile_fx(module, inputs, inner_compile=run)

    torch._dynamo.reset()  # functions keep graphs of all models, up to a limit
    with (
        patch.object(torch, "compile", partial(torch.compile, backend=graphs)),
        # Else the first backward pass copies the constants of its graph, which fake ones do not suffer.
        config.patch(force_non_lazy_backward_lowering=True),
    ):
        yield
    torch._dynamo.reset()
