"""A model of either family in parts of rows and of channels against one process, in fp64: loss and all gradients."""

import itertools
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn

from mega_scale.model import MegaConfig, MegaForCausalLM, MegalodonConfig, MegalodonForCausalLM
from mega_scale.ops.timestep_norm import timestep_norm
from mega_scale.parallel import ParallelConfig, Place, World, seeded_values
from mega_scale.parallel.model_parallel import apply_model_parallelism
from mega_scale.parallel.sequence_parallel import MomentExchange
from mega_scale.parallel.shard import Sharding, assemble, by_source, fill, shardings
from mega_scale.parallel.world import ALONE, Axis

pytestmark = pytest.mark.distributed

RANKS = 8
CHUNK, TOKENS = 4, 48  # two chunks a part of six; two rows


class Case(NamedTuple):
    """A layout, and what else is on in it."""

    sp: int
    tp: int
    model: str = "heads"
    documents: bool = False
    every: int = 0
    dropout: float = 0.0
    segment: int = 0


MODELS: dict[str, dict[str, Any]] = {
    "heads": {"num_attention_heads": 2, "swiglu": True, "rescale_nffn": True},
    "plain": {"num_attention_heads": 4, "norm_affine": False, "tie_word_embeddings": True, "scale_embeddings": True},
    "mega": {},
    "mega post-norm": {
        "normalize_before_mega": False, "normalize_before_ffn": False, "normalization_type": "rmsnorm",
        "attention_activation": "laplace", "relative_positional_bias": "simple",
    },
}  # fmt: skip
# Two, three, four and eight parts of a row; several heads a rank, one, and two ranks a head.
CASES = [
    Case(2, 1),
    Case(2, 1, "plain", documents=True, every=1),
    Case(3, 1, documents=True, every=1, dropout=0.1),
    Case(4, 1, documents=True),
    Case(4, 1, "plain", every=2, dropout=0.1),
    Case(8, 1, every=1),
    Case(8, 1, "plain", documents=True),
    Case(1, 2, "plain", dropout=0.1),
    Case(1, 2, every=1),
    Case(1, 4, documents=True, every=1, dropout=0.1),
    Case(1, 4, "plain"),
    Case(2, 2, documents=True, every=1, dropout=0.1),
    Case(2, 4, "plain", documents=True, dropout=0.1),
    Case(2, 4),
    Case(1, 2, every=1, segment=16),
    Case(1, 2, "mega", dropout=0.1),
    Case(1, 4, "mega", documents=True, every=1, segment=16),
    Case(1, 4, "mega post-norm", documents=True, every=1, dropout=0.1),
    Case(2, 4, "mega", documents=True, every=1, dropout=0.1),
    Case(2, 2, "mega post-norm", every=1),
]


def config(case: Case) -> Any:
    names = ("dropout_prob", "hidden_dropout_prob", "attention_probs_dropout_prob")
    sizes = {
        "vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 2, "shared_representation_size": 16,
        "intermediate_size": 16, "nffn_hidden_size": 20, "ema_projection_size": 3, "chunk_size": CHUNK,
        **MODELS[case.model], **dict.fromkeys(names, case.dropout),
    }  # fmt: skip
    if case.model.startswith("mega"):
        return MegaConfig(use_chunking=True, is_decoder=True, bidirectional=False, max_positions=64, **sizes)
    return MegalodonConfig(timestep_norm_groups=4, **sizes)


def length(case: Case) -> int:
    return 64 if case.sp in (4, 8) else TOKENS


def batch(case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens, next tokens, and where documents begin: on borders of parts, beside them, several in a chunk."""
    tokens = torch.randint(3, 37, (2, length(case) + 1), generator=torch.Generator().manual_seed(4))
    starts = torch.zeros(2, length(case), dtype=torch.bool)
    starts[0, [0, 16, 17, 33, 34, 47]] = starts[1, [5, 15, 32]] = True
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), starts if case.documents else None


def differentiate(case: Case, sp: Axis, tp: Axis) -> tuple[dict[str, Tensor], dict[str, Sharding]]:
    """Loss and gradients of this rank's part, before they are summed over rows, and how they are sharded."""
    shape = config(case)
    with torch.device("meta"):
        kind: Any = MegaForCausalLM if isinstance(shape, MegaConfig) else MegalodonForCausalLM
        model, template = kind(shape), kind(shape)
    how = ParallelConfig()
    if sp.size * tp.size > 1:
        how = ParallelConfig(activation_checkpoint=case.every, activation_checkpoint_segment=case.segment)
    row_slice = apply_model_parallelism(model, sp=sp, tp=tp, checkpointing=how, seed=1)
    draw = seeded_values(shape, 2)

    def values(name: str, owner: nn.Module, local_name: str) -> Tensor:
        value = draw(name, owner, local_name).double()
        generator = torch.Generator().manual_seed(len(name))
        # So that scales and biases, which begin at zero, matter; and so that states reach over parts.
        value += 0.2 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
        return value - 3 if local_name == "delta" else value

    fill(model, values, lambda old, value: nn.Parameter(value.clone()), torch.device("cpu"), template=template, tp=tp)
    model.train()
    tokens, labels, starts = batch(case)
    inputs, targets = row_slice.take(Place(3, 8), tokens, labels)
    with row_slice:
        loss = model(
            input_ids=inputs,
            shift_labels=targets,
            num_items_in_batch=labels.numel(),
            document_starts=None if starts is None else row_slice.split(starts, False),
            skip_logits=True,
        ).loss
        loss.backward()
    found = {name: p.grad for name, p in model.named_parameters(remove_duplicate=False)}
    return found | {"loss": loss.detach()}, shardings(model)


def norm_problem(parts: int, documents: str, holes: bool) -> dict[str, Any]:
    """Rows with means that drift, documents as in the averages' test, and padding in front, inside and behind."""
    generator = torch.Generator().manual_seed(parts)
    tokens = 5 * parts
    x = torch.randn(3, tokens, 12, generator=generator, dtype=torch.float64)
    resets = torch.zeros(3, tokens, dtype=torch.bool)
    for row, shift in enumerate((0, -1, 1) if documents == "borders" else ()):
        resets[row, (torch.arange(1, parts) * 5 + shift) % tokens] = True
    if documents == "random":
        resets = torch.rand(3, tokens, generator=generator) < 0.1
    valid = torch.rand(3, tokens, generator=generator) < 0.7
    valid[0, :7] = valid[1, -6:] = False
    return {
        "x": x + torch.linspace(0, 9, tokens, dtype=torch.float64)[:, None],
        "weight": torch.randn(12, generator=generator, dtype=torch.float64),
        "bias": torch.randn(12, generator=generator, dtype=torch.float64),
        "probe": torch.randn(3, tokens, 12, generator=generator, dtype=torch.float64),
        "resets": None if documents == "none" else resets,
        "valid": valid if holes else None,
    }


NORMS = list(itertools.product((2, 3, 4, 8), ("none", "borders", "random"), (False, True)))


def differentiate_norm(given: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    leaves = {name: given[name].clone().requires_grad_() for name in ("x", "weight", "bias")}
    y, end = timestep_norm(*leaves.values(), 3, 1e-5, resets=given["resets"], valid=given["valid"], **options)
    (y * given["probe"]).sum().backward()
    gradients = {f"d{name}": leaf.grad for name, leaf in leaves.items()}
    return gradients | {"y": y.detach(), "count": end.count, "mean": end.mean.detach(), "var": end.var.detach()}


def study() -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    with World.start(ParallelConfig(timeout_s=120)) as world:

        def axis(*ranks: int) -> Axis:
            group = dist.new_group(list(ranks))
            return Axis(group, ranks.index(world.rank), len(ranks)) if world.rank in ranks else ALONE

        for parts in (2, 3, 4, 8):
            own = axis(*range(parts))
            for case in (norm for norm in NORMS if norm[0] == parts and world.rank < parts):
                given, cut = norm_problem(*case), slice(5 * world.rank, 5 * world.rank + 5)
                rows = {
                    name: given[name][:, cut] for name in ("x", "probe", "resets", "valid") if given[name] is not None
                }
                found[case] = differentiate_norm(given | rows, carry=MomentExchange(own))
        for case in CASES:
            lines = [[s * case.tp + t for t in range(case.tp)] for s in range(case.sp)]
            across = [axis(*line) for line in lines]
            along = [axis(*line) for line in zip(*lines, strict=True)]
            if world.rank < case.sp * case.tp:
                s, t = divmod(world.rank, case.tp)
                found[case] = differentiate(case, along[t], across[s])
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(study, RANKS, tmp_path_factory.mktemp("parts"))


@pytest.mark.parametrize("case", NORMS, ids=str)
def test_parts_of_a_norm_equal_the_whole(ranks, case):
    expected, found = (
        differentiate_norm(norm_problem(*case), impl="recurrent"),
        [rank[case] for rank in ranks[: case[0]]],
    )
    joined = found[-1] | {name: torch.cat([part[name] for part in found], 1) for name in ("y", "dx")}
    joined |= {name: sum(part[name] for part in found) for name in ("dweight", "dbias")}
    for name, tensor in expected.items():
        torch.testing.assert_close(joined[name], tensor, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parts_of_a_model_have_the_gradients_of_the_whole(ranks, case):
    alone, own = differentiate(case, ALONE, ALONE)
    expected = {source: assemble(names, alone.__getitem__) for source, names in by_source(own).items()}
    parts = [ranks[rank][case][0] for rank in range(case.sp * case.tp)]
    table = ranks[0][case][1]
    loss = sum(part["loss"] for part in parts[:: case.tp])
    torch.testing.assert_close(loss, alone["loss"], rtol=1e-12, atol=1e-12)
    joined = {}
    for name, sharding in table.items():
        summed = [sum(part[name] for part in parts[t :: case.tp]) for t in range(case.tp)]
        if sharding.dim is None:
            for other in summed[1:]:
                torch.testing.assert_close(other, summed[0], rtol=1e-12, atol=1e-13, msg=name)
        joined[name] = sharding.join(summed)
    found = {source: assemble(names, joined.__getitem__) for source, names in by_source(table).items()}
    assert len(found) == len(expected) > 30
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-12, msg=name)
