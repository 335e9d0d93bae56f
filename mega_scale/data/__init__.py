"""Text to tokens to batches: corpus, tokenizer, packing, and a loader that is a pure function of the step.

Names are imported when asked for: a command that refuses its keys need not wait for torch, pyarrow and transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mega_scale.data.config import DataConfig, LengthSchedule

if TYPE_CHECKING:
    from mega_scale.data.loader import Loader, load_datasets, load_whole, validation_batches
    from mega_scale.data.packing import Mixture, PackedDataset, StreamedDataset
    from mega_scale.data.sources import Corpus, Documents, load_corpus
    from mega_scale.data.tokenizer import as_trained, load_tokenizer, vocabulary_size


def __getattr__(name: str) -> Any:
    for module in ("tokenizer", "sources", "packing", "loader") if name in __all__ else ():
        found = importlib.import_module(f"{__name__}.{module}")
        if hasattr(found, name):
            return getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Corpus", "DataConfig", "Documents", "LengthSchedule", "Loader", "Mixture", "PackedDataset", "StreamedDataset",
    "as_trained", "load_corpus", "load_datasets", "load_tokenizer", "load_whole", "validation_batches",
    "vocabulary_size",
]  # fmt: skip
