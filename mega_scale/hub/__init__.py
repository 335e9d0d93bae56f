"""Weights in Hugging Face folders: writing one, reading one, and the model card."""

from mega_scale.hub.checkpoint_folder import FolderTensors, open_folder
from mega_scale.hub.export import DEFAULT_SHARD_BYTES, check_destination, write_export
from mega_scale.hub.model_card import TrainingFacts, beyond_transformers_4, model_card

__all__ = [
    "DEFAULT_SHARD_BYTES",
    "FolderTensors",
    "TrainingFacts",
    "beyond_transformers_4",
    "check_destination",
    "model_card",
    "open_folder",
    "write_export",
]
