"""Activation checkpointing: which activations blocks recompute in the backward pass instead of saving them.

Legend: B batch, L length, D channels, C chunk.
"""

import inspect
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)
from transformers import PreTrainedModel

from mega_scale.model.cache import LayerState
from mega_scale.ops import NAMESPACE
from mega_scale.ops.linear import ONEDNN_PRODUCTS
from mega_scale.parallel.config import ParallelConfig
from mega_scale.parallel.shard import RowSlice

_MATMULS = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten._scaled_mm.default,
    *ONEDNN_PRODUCTS,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]
# Attention's own, by name, as those for GPUs are not there before they are needed.
_OWN_MATMULS = ("causal_attention", "softmax_weights", "weighted_values", "gathered_products", "scattered_product")
_BESIDE_COLLECTIVES = "symm_mem"  # namespace of products with what travels beside them


def _is_matmul(function: Any, *more: str) -> bool:
    own = function.namespace == NAMESPACE and function._opname in (*_OWN_MATMULS, *more)
    return own or function in _MATMULS or function.namespace == _BESIDE_COLLECTIVES


def _kept(context: Any, function: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # A compiler would have ranks send again what it computes again.
    kept = _is_matmul(function, "collective")
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _contexts_of_compilers() -> Any:
    return create_selective_checkpoint_contexts(_kept)


def saving_matmuls(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a block for a compiler, whose backward pass computes all again but for results of matmuls."""

    def recomputed(block: Any, x: Tensor, **others: Any) -> Any:
        def compute(x: Tensor) -> Any:
            return forward(block, x, **others)

        return checkpoint(compute, x, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts_of_compilers)

    return recomputed


def checkpoint_activations(
    model: PreTrainedModel, how: ParallelConfig, row_slice: RowSlice, contexts: Callable[[], Any] = noop_context_fn
) -> None:
    """Turn checkpointing on for every n-th block of a model; names of parameters stay as they are.

    Blocks are transformers' GradientCheckpointingLayer, which checkpoints its `forward` when training, with the
    function set here. Dropout depends on positions, so no random numbers have to be replayed. `contexts` gives those of
    a block's forward and of its recomputation.
    """

    def with_matmuls() -> Any:
        # By operator, in the order of its calls: what it returned, with versions of its tensors.
        results: defaultdict[Any, deque[Any]] = defaultdict(deque)

        @contextmanager
        def saving(outer: AbstractContextManager[Any], replay: bool) -> Iterator[None]:
            with outer, _SavedMatmuls(results, replay):
                yield

        forward, again = contexts()
        return saving(forward, replay=False), saving(again, replay=True)

    context_fn = contexts if how.activation_checkpoint_policy == "full" else with_matmuls
    recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=context_fn)
    segment = how.activation_checkpoint_segment
    for block in recomputed_blocks(model, how):
        if segment:
            again = _as_it_is if getattr(block.forward, "recomputes", False) else recompute
            block.forward = SegmentedForward(block, segment, row_slice, again)
        else:
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = recompute


def recomputed_blocks(model: PreTrainedModel, how: ParallelConfig) -> list[Any]:
    """Every n-th block, which is recomputed; none where none is."""
    backbone: Any = model.base_model
    every = how.activation_checkpoint
    return list(backbone.layers)[every - 1 :: every] if every else []


class _SavedMatmuls(TorchDispatchMode):
    """Saves matmul outputs, or returns the saved ones in place of computing them, and looks at nothing else.

    PyTorch's selective checkpointing expects every operation again, and casts of autocast, which keeps them over a
    step's segments, and marks of FSDP are not the same in both passes.
    """

    def __init__(self, results: defaultdict[Any, deque[Any]], replay: bool) -> None:
        super().__init__()
        self._results, self._replay = results, replay

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # matmuls are outside of what is compiled

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _is_matmul(function):
            return function(*args, **(kwargs or {}))
        if not self._replay:
            out = function(*args, **(kwargs or {}))
            # Detached: autograd will give the result itself a history.
            saved = tree_map_only(Tensor, Tensor.detach, out)
            self._results[function].append((saved, _versions(saved)))
            return out
        saved, versions = self._results[function].popleft()
        if _versions(saved) != versions:
            raise RuntimeError(f"the result of {function} was changed after it was saved for recomputation")
        return saved


def _versions(result: Any) -> list[int]:
    return [getattr(leaf, "_version", 0) for leaf in tree_leaves(result)]


def _as_it_is(segment: Callable[..., Any], *given: Any) -> Any:
    return segment(*given)


class SegmentedForward:
    """The forward of a block that computes, and in the backward pass recomputes, a segment of its rows at a time.

    Attention stays in chunks, so that only the state of moving average and norm crosses from segment to segment: a row
    saves its inputs, outputs, and one state a segment, and only one segment's activations are alive at once.
    """

    def __init__(self, block: Any, segment: int, row_slice: RowSlice, recompute: Callable[..., Any]) -> None:
        self._block, self._whole = block, block.forward
        self._segment_length, self._row_slice, self._recompute = segment, row_slice, recompute

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Anything but training on plain rows is computed whole."""
        given = inspect.signature(self._whole).bind(x, *args, **kwargs).arguments
        # Facts of tokens, such as where documents begin, have parts as rows do.
        facts = {name: given.pop(name) for name, value in list(given.items()) if hasattr(value, "between")}
        more = any(value is not None and value is not False for value in list(given.values())[1:])
        if more or not self._block.training or not torch.is_grad_enabled():
            found: tuple[Any, ...] = self._whole(x, *args, **kwargs)
            return found
        outputs, others, begin = [], 0, 0
        state: LayerState | None = None
        # Split in one go: the gradient of each slice taken alone would be as long as the row.
        for part in x.split(self._segment_length, 1):
            end = begin + part.shape[1]
            own = {name: value.between(begin, end) for name, value in facts.items()}
            out, state, others = self._recompute(self._segment, part, state, begin, end < x.shape[1], own)
            outputs.append(out)
            begin = end
        return torch.cat(outputs, 1), *[None] * others

    def _segment(
        self, x: Tensor, state: LayerState | None, begin: int, more: bool, facts: dict[str, Any]
    ) -> tuple[Tensor, LayerState | None, int]:
        """One segment (B, S, D) from the state before it to the one after it, if there is `more`.

        Also returns how many other values the block has.
        """
        with self._row_slice.shifted(begin):
            out, *others = self._whole(x, state=state, return_state=more, **facts)
        after = next((value for value in others if isinstance(value, LayerState)), None)
        if after is not None:
            # No chunk is open between segments, so the next one is as the first to attention.
            keys, values = (tensor.new_zeros(len(x), 0, *tensor.shape[2:]) for tensor in (after.keys, after.values))
            after = replace(after, keys=keys, values=values, position=0)
        return out, after, len(others)
