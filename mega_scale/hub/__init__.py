"""Weights in other hands: Hugging Face folders, their model card and code, and the original fairseq checkpoints."""

from mega_scale.hub.checkpoint_folder import FolderTensors, open_folder, read_config
from mega_scale.hub.export import DEFAULT_SHARD_BYTES, check_destination, write_export, write_then_rename
from mega_scale.hub.fairseq import fairseq_to_mega, mega_to_fairseq
from mega_scale.hub.fairseq_checkpoint import FairseqCheckpoint, config_from_args, find_layout, read_fairseq
from mega_scale.hub.fairseq_dictionary import tokenizer_from_dictionary
from mega_scale.hub.model_card import TrainingFacts, beyond_transformers_4, model_card, without_folder

__all__ = [
    "DEFAULT_SHARD_BYTES",
    "FairseqCheckpoint",
    "FolderTensors",
    "TrainingFacts",
    "beyond_transformers_4",
    "check_destination",
    "config_from_args",
    "fairseq_to_mega",
    "find_layout",
    "mega_to_fairseq",
    "model_card",
    "open_folder",
    "read_config",
    "read_fairseq",
    "tokenizer_from_dictionary",
    "without_folder",
    "write_export",
    "write_then_rename",
]
