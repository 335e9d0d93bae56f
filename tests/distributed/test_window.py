"""Cutting rows into parts, and telling the model which one it computes."""

import pytest
import torch

from mega_scale.parallel.sequence_parallel import START, Place, RowSlice


@pytest.mark.parametrize(
    ("length", "parts", "chunk", "each"), [(64, 2, 16, 32), (61, 2, 16, 32), (65, 4, 16, 32), (8, 8, 1, 1)]
)
def test_parts_are_whole_chunks_and_lose_nothing(length, parts, chunk, each):
    inputs = torch.arange(2 * length).view(2, length)
    labels = inputs + 1
    taken = [RowSlice(part, parts, chunk).take(START, inputs, labels) for part in range(parts)]
    for pieces, whole, fill in zip(zip(*taken, strict=True), (inputs, labels), (0, -100), strict=True):
        assert all(piece.shape == (2, each) and piece.is_contiguous() for piece in pieces)
        joined = torch.cat(pieces, 1)
        assert torch.equal(joined[:, :length], whole)
        assert (joined[:, length:] == fill).all()


def test_alone_rows_stay_as_they_are():
    inputs = torch.arange(7).view(1, 7)
    assert RowSlice().take(START, inputs, inputs)[0] is inputs


def test_knows_its_place_only_inside():
    window = RowSlice(part=2, parts=4, chunk=8)
    inputs = torch.zeros(1, 64, dtype=torch.int64)
    window.take(Place(5, 12), inputs, inputs)
    assert not window.cut and window.place == START
    with window:
        assert window.cut and window.first_token == 32 and window.place == Place(5, 12)
    assert not window.cut and window.first_token == 0 and window.place == START
    with pytest.raises(KeyError), window:
        raise KeyError
    assert not window.cut
    with window:  # the backward pass of the same micro-batch
        assert window.first_token == 32
