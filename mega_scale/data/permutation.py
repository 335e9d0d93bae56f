"""A new order for every epoch that needs no memory: any place of a permutation can be computed on its own."""

import hashlib

import numpy as np

_ROUNDS = 8


def shuffled(positions: np.ndarray, length: int, seed: int, epoch: int) -> np.ndarray:
    """Look up places of a pseudo-random permutation of 0..length-1.

    A Feistel network permutes the next power of four; what falls outside the range is permuted again till it is inside.
    The order depends on the arguments only, not on a library's random generator, so a run can be resumed anywhere.

    Args:
        positions: (n,) places, 0 to below length.
        length: Length of the permutation.
        seed: Chooses the permutations of a run.
        epoch: Chooses one of them.

    Returns:
        (n,) int64, what stands at those places.
    """
    half = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    keys = np.frombuffer(digest, dtype="<u8")
    found = _permute(np.asarray(positions).astype(np.uint64), half, keys)
    outside = np.flatnonzero(found >= length)
    while outside.size:
        found[outside] = _permute(found[outside], half, keys)
        outside = outside[found[outside] >= length]
    return found.astype(np.int64)


def _permute(values: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every bit of the input changes about half the bits of the result."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
