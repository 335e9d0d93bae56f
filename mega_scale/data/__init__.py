"""Text to tokens to batches: corpus, tokenizer, packing, and a loader that is a pure function of the step."""

from mega_scale.data.config import DataConfig, LengthSchedule
from mega_scale.data.loader import Loader, validation_batches
from mega_scale.data.mixture import Mixture
from mega_scale.data.packing import PackedDataset
from mega_scale.data.parts import load_datasets, load_whole
from mega_scale.data.sources import Corpus, Documents, load_corpus
from mega_scale.data.special_tokens import adds_bos, as_trained, end_ids, prompt_ids, separator_id, unlike_training
from mega_scale.data.streaming import StreamedDataset
from mega_scale.data.tokenizer import load_tokenizer, text_size, vocabulary_size

__all__ = [
    "Corpus",
    "DataConfig",
    "Documents",
    "LengthSchedule",
    "Loader",
    "Mixture",
    "PackedDataset",
    "StreamedDataset",
    "adds_bos",
    "as_trained",
    "end_ids",
    "load_corpus",
    "load_datasets",
    "load_tokenizer",
    "load_whole",
    "prompt_ids",
    "separator_id",
    "text_size",
    "unlike_training",
    "validation_batches",
    "vocabulary_size",
]
