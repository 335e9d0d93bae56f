"""Chunks that hold several documents: each document's part attends as it does alone."""

import pytest
import torch

from mega_scale.ops.attention import ChunkDocuments, chunk_attention

NUMBERS = torch.tensor([[[0, 0, 0, 0, 0, 0], [1, 1, 2, 3, 3, 3]], [[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]])


def case(queries: int = 6, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 2, queries, 4), (2, 2, 6, 4), (2, 2, 6, 3), (queries + 5,))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def test_chunks_are_sorted_by_whether_they_need_a_mask():
    documents = ChunkDocuments.of(NUMBERS)
    assert documents.several.tolist() == [1, 2] and documents.single.tolist() == [0, 3]
    assert torch.cat([documents.single, documents.several])[documents.order].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("activation", ["softmax", "laplace", "relu2"])
@pytest.mark.parametrize("way", ["auto", "eager", "weights", "dropped by a function"])
def test_every_document_attends_as_it_does_alone(activation, causal, way):
    q, k, v, bias = case()
    settings = {"activation": activation, "causal": causal}
    extra = {
        "auto": {}, "eager": {"impl": "eager"}, "weights": {"return_weights": True},
        "dropped by a function": {"dropout": lambda weights: weights},
    }[way]  # fmt: skip
    found, weights = chunk_attention(q, k, v, bias, documents=ChunkDocuments.of(NUMBERS), **settings, **extra)
    assert (weights is not None) == (way == "weights")
    expected = torch.zeros_like(found)
    for b in range(2):
        for c in range(2):
            for number in NUMBERS[b, c].unique().tolist():
                first, size = int((NUMBERS[b, c] < number).sum()), int((NUMBERS[b, c] == number).sum())
                own = slice(first, first + size)
                parts = (t[b : b + 1, c : c + 1, own] for t in (q, k, v))
                expected[b, c, own] = chunk_attention(*parts, bias[6 - size : 5 + size], **settings)[0][0, 0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), (q, k, v, bias)),
        torch.autograd.grad(expected.square().sum(), (q, k, v, bias)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["softmax", "laplace"])
def test_queries_behind_remembered_keys_and_masked_keys(activation):
    q, k, v, bias = case(queries=2)
    mask = torch.ones(2, 2, 6, dtype=torch.bool)
    mask[1, 1, 5] = False
    settings = {"activation": activation, "causal": True, "key_mask": mask}
    found, _ = chunk_attention(q, k, v, bias, offset=4, documents=ChunkDocuments.of(NUMBERS), **settings)
    q_whole = torch.cat([torch.zeros(2, 2, 4, 4), q], 2)
    wider = torch.cat([bias, torch.zeros(4)])  # keys further ahead, which nobody sees
    whole, _ = chunk_attention(q_whole, k, v, wider, documents=ChunkDocuments.of(NUMBERS), **settings)
    torch.testing.assert_close(found, whole[:, :, 4:], rtol=1e-5, atol=1e-6)


def test_bf16_is_near_fp32():
    exact, _ = chunk_attention(*case(), causal=True, documents=ChunkDocuments.of(NUMBERS))
    rounded, _ = chunk_attention(*case(dtype=torch.bfloat16), causal=True, documents=ChunkDocuments.of(NUMBERS))
    torch.testing.assert_close(rounded.float(), exact, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize(("numbers", "offset"), [(NUMBERS[:1], 0), (NUMBERS, torch.tensor([0, 0]))])
def test_numbers_of_other_keys_and_offsets_by_row_are_refused(numbers, offset):
    q, k, v, bias = case()
    bias = bias if isinstance(offset, int) else bias.expand(2, -1)
    with pytest.raises(ValueError, match=r"documents have numbers of shape .*expected \(2, 2, 6\) and one offset"):
        chunk_attention(q, k, v, bias, offset=offset, documents=ChunkDocuments.of(numbers))
