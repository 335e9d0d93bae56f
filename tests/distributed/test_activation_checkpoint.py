"""What is recomputed changes neither losses nor gradients: saved matmuls, segments of rows, documents across them."""

import itertools
from typing import Any

import pytest
import recomputation_study
import tiny_run
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mega_scale.ops.attention import chunk_attention
from mega_scale.ops.linear import ONEDNN_PRODUCTS
from mega_scale.parallel import ParallelConfig, Place, seeded_values
from mega_scale.parallel.mesh import check_segments
from mega_scale.parallel.model_parallel import apply_model_parallelism
from mega_scale.parallel.shard import fill
from mega_scale.parallel.world import ALONE

LENGTH = 61  # chunks of 8, the last with 5 tokens
DROPOUT = dict.fromkeys(("dropout_prob", "hidden_dropout_prob", "nffn_activation_dropout_prob"), 0.2)
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {**DROPOUT, "attention_probs_dropout_prob": 0.1},
    "laplace": {"attention_activation": "laplace", "normalize_before_mega": False},
    "megalodon": {
        "model_type": "megalodon",
        **dict.fromkeys(("dropout_prob", "hidden_dropout_prob", "attention_probs_dropout_prob"), 0.1),
    },
}


PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, *ONEDNN_PRODUCTS)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self, operators=PRODUCTS):
        super().__init__()
        self.operators, self.count = operators, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in self.operators
        return function(*args, **(kwargs or {}))


def recomputing(every: int, policy: str, segment: int) -> ParallelConfig:
    how = {"activation_checkpoint_policy": policy, "activation_checkpoint_segment": segment}
    return ParallelConfig(activation_checkpoint=every, **how)


def step(
    changes: dict[str, Any], how: ParallelConfig, documents: bool = False, mask: Tensor | None = None
) -> tuple[dict[str, Tensor], int]:
    """Loss, gradients and number of matrix products of one step."""
    config = tiny_run.tiny_config(**changes)
    model, template = tiny_run.meta_model(config), tiny_run.meta_model(config)
    row_slice = apply_model_parallelism(model, sp=ALONE, tp=ALONE, checkpointing=how, seed=1)
    place = {"template": template}
    fill(model, seeded_values(config, 2), lambda old, value: nn.Parameter(value.clone()), torch.device("cpu"), **place)
    model.train()
    ids = torch.randint(3, 60, (2, LENGTH), generator=torch.Generator().manual_seed(4))
    starts = torch.zeros_like(ids, dtype=torch.bool)
    starts[0, [0, 3, 16, 17, 58]] = True
    inputs, labels = row_slice.take(Place(3, 8), ids, ids.roll(-1, 1))
    with Products() as products, row_slice:
        loss = model(
            input_ids=inputs,
            shift_labels=labels,
            attention_mask=mask,
            document_starts=starts if documents else None,
            skip_logits=True,
        ).loss
        loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}, products.count


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_gradients_are_those_of_a_step_without_recomputation(model, documents):
    expected, least = step(MODELS[model], ParallelConfig(), documents)
    hows = [
        (1, "full", 0),
        (1, "save_matmuls", 0),
        (1, "full", 16),
        (2, "save_matmuls", 24),
        (1, "full", 64),
        (1, "full", 8),
    ]
    for how in itertools.starmap(recomputing, hows):
        found, products = step(MODELS[model], how, documents)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=f"{how}: {name}")
        if how.activation_checkpoint_segment == 0:
            assert products == least if how.activation_checkpoint_policy == "save_matmuls" else products > least


def test_rows_with_a_mask_are_computed_whole():
    mask = torch.arange(LENGTH)[None] < torch.tensor([[LENGTH], [LENGTH - 9]])
    expected, _ = step({}, ParallelConfig(), mask=mask)
    found, _ = step({}, recomputing(1, "full", 16), mask=mask)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_attention_is_saved_with_the_matmuls():
    operators = (torch.ops.mega_scale.causal_attention.default,)
    counts = {}
    for policy in ("full", "save_matmuls"):
        model = tiny_run.meta_model(tiny_run.tiny_config())
        apply_model_parallelism(model, sp=ALONE, tp=ALONE, checkpointing=recomputing(1, policy, 0), seed=1)
        checkpoint: Any = model.mega.layers[0]._gradient_checkpointing_func
        q, k, v = (torch.randn(1, 2, 8, width, requires_grad=True) for width in (4, 4, 6))
        with Products(operators) as products:
            checkpoint(lambda *leaves: chunk_attention(*leaves, causal=True)[0].square(), q, k, v).sum().backward()
        counts[policy] = products.count
    assert counts == {"full": 2, "save_matmuls": 1}


class Widest(TorchDispatchMode):
    """Width of the widest tensor as long as a row."""

    width = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dim() == 3 and out.shape[:2] == (2, LENGTH):
            self.width = max(self.width, out.shape[2])
        return out


def test_only_the_stream_is_as_long_as_a_row():
    width = tiny_run.tiny_config().hidden_size
    for segment in (8, 0):
        with Widest() as widest:
            step({}, recomputing(1, "full", segment))
        assert (widest.width == width) if segment else (widest.width > width)


@pytest.mark.parametrize(
    "changes,segment,every,sp,words",
    [
        ({}, -1, 1, 1, "segment=-1 .*choose 0 for whole rows"),
        ({}, 16, 0, 1, "activation_checkpoint=0"),
        ({}, 12, 1, 1, r"multiple of model.chunk_size=8, use 8 or 16"),
        ({}, 16, 1, 2, "parallel.sp=2"),
        ({"use_chunking": False}, 16, 1, 1, "model.use_chunking=False"),
        ({"truncation": 8}, 16, 1, 1, "model.truncation=8"),
    ],
)
def test_what_has_no_segments_is_refused(changes, segment, every, sp, words):
    with pytest.raises(ValueError, match=words):
        check_segments(tiny_run.tiny_config(**changes), segment, every, sp)


@pytest.fixture(scope="module")
def recomputed(tmp_path_factory):
    return run_ranks(recomputation_study.study, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("engine", "model"), recomputation_study.RUNS)
def test_bf16_is_the_same_however_blocks_are_recomputed(recomputed, engine, model):
    for rank in recomputed:
        found = {way: rank[engine, model, way] for way in recomputation_study.WAYS}
        assert found["save_matmuls"] == found["every second"] == found["not"]
        assert found["save_matmuls of segments"] == found["segments"]
