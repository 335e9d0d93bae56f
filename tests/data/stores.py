"""Small stores of tokens, on disk as all are."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mega_scale.data.tokenizer import Encoded
from mega_scale.data.tokens import Shard, ShardWriter, TokenStore


def store_of(tokens: np.ndarray, lengths: Sequence[int] | None = None, cuts: Sequence[int] = ()) -> TokenStore:
    """Write tokens as documents of such lengths (one document without), in shards that end after so many documents.

    A token stands for two bytes of text. The files are removed at once, and stay mapped.
    """
    ends = np.cumsum(lengths if lengths is not None else [len(tokens)])
    with tempfile.TemporaryDirectory() as folder:
        shards = []
        for first, last in zip([0, *cuts], [*cuts, len(ends)], strict=True):
            start = 0 if first == 0 else int(ends[first - 1])
            own = ends[first:last] - start
            writer = ShardWriter(Path(folder), f"{len(shards):05}", "<u4")
            if len(own):
                writer.add(Encoded(tokens[start : start + own[-1]], own, 2 * own))
            shards.append(Shard(Path(folder), writer.close(), "<u4"))
        store = TokenStore(shards)
        store.map()
    return store
