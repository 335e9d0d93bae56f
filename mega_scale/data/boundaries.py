"""What a model needs to keep the documents of a row apart, from `Loader.document_starts`.

Shapes: B rows, L sequence length. `starts` (B, L + 1) bool is True where a document's first token stands; place p < L
is that of `input_ids[:, p]`, place p + 1 that of `shift_labels[:, p]`.
"""

import torch
from torch import Tensor

IGNORED = -100  # a label that no loss counts


def segment_ids(starts: Tensor) -> Tensor:
    """Number the documents of a row: two places see each other only where their numbers are equal.

    Args:
        starts: (B, L + 1) bool.

    Returns:
        (B, L) int64, ascending; 0 is the document that the row goes on with, 1 the first that starts in it. Places
        behind a row's last token count as its last document's: they have no label, and come after all others.
    """
    return starts[:, :-1].long().cumsum(dim=1)


def resets(starts: Tensor) -> Tensor:
    """Say where a carried state, such as a moving average, begins anew: before a document's first token.

    Args:
        starts: (B, L + 1) bool.

    Returns:
        (B, L) bool.
    """
    return starts[:, :-1]


def separate_labels(labels: Tensor, starts: Tensor) -> Tensor:
    """Leave out the labels that would predict a document's first token from the document before.

    Args:
        labels: (B, L) int64, as `shift_labels`.
        starts: (B, L + 1) bool.

    Returns:
        (B, L) int64, -100 at those places.
    """
    return torch.where(starts[:, 1:], IGNORED, labels)
