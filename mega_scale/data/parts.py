"""The datasets of a run, from its configuration."""

from transformers import PreTrainedTokenizerBase

from mega_scale.data.cache import cache_folder
from mega_scale.data.config import DataConfig
from mega_scale.data.corpus import Documents, load_corpus, load_documents
from mega_scale.data.packing import PackedDataset, pack
from mega_scale.data.streaming import StreamedDataset


def load_datasets(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[PackedDataset | StreamedDataset, PackedDataset | None]:
    """Make what a run trains on and what it validates on.

    Args:
        config: The keys under `data:`.
        tokenizer: As `load_tokenizer` gives it.

    Returns:
        The rows to train on, and those to validate on, None where the configuration holds out nothing.

    Raises:
        ValueError: A key cannot work, the text cannot be read, or a part has less than one row.
    """
    config.validate()
    corpus = load_corpus(config)
    length, cache = config.sequence_length, cache_folder(config.cache_dir)
    train: PackedDataset | StreamedDataset
    if config.streaming:
        train = StreamedDataset(corpus.train, tokenizer, length)
    else:
        train = pack(corpus.train, tokenizer, length, cache)
        if not len(train):
            raise ValueError(
                f"the text to train on ({_source(config)}) has {train.tokens} tokens, less than one row of "
                f"data.sequence_length={length} + 1: give more text{_held_out_hint(config)}, or shorter sequences"
            )
    if corpus.validation is None:
        return train, None
    held_out = corpus.validation
    if config.streaming:  # hashing and tokenising would each read the stream, so its few documents are kept meanwhile
        texts = list(held_out)
        held_out = Documents(lambda: iter(texts))
    validation = pack(held_out, tokenizer, length, cache)
    if not len(validation):
        raise ValueError(
            f"the text to validate on has {validation.tokens} tokens, less than one row of data.sequence_length="
            f"{length} + 1: {_validation_remedy(config)}"
        )
    return train, validation


def load_whole(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> PackedDataset:
    """Make one dataset of all of a configuration's text, none held out, to evaluate on.

    Args:
        config: The keys under `data:`; `streaming` and what concerns validation are not used.
        tokenizer: As `load_tokenizer` gives it.

    Returns:
        The rows; a text that is shorter than one is in the `tail`.

    Raises:
        ValueError: A key cannot work, the text cannot be read, or there is none.
    """
    config.validate()
    dataset = pack(load_documents(config), tokenizer, config.sequence_length, cache_folder(config.cache_dir))
    if not dataset.tokens:
        raise ValueError(f"{_source(config)} holds no text: give some")
    return dataset


def _source(config: DataConfig) -> str:
    if config.source == "hub":
        return f"data.hub_name={config.hub_name!r}, data.hub_split={config.hub_split!r}"
    return f"data.source={config.source!r}" if config.path is None else f"data.path={config.path!r}"


def _separate(config: DataConfig) -> bool:
    return bool(config.validation_path or config.validation_split)


def _held_out_hint(config: DataConfig) -> str:
    if _separate(config) or not config.validation_fraction:
        return ""
    return f" (data.validation_fraction={config.validation_fraction} of the documents is held out)"


def _validation_remedy(config: DataConfig) -> str:
    if _separate(config):
        return "give more validation text, or a shorter sequence_length"
    own = "data.validation_split" if config.source == "hub" else "data.validation_path"
    return (
        f"whole documents are held out, data.validation_fraction={config.validation_fraction} of them; raise it, give "
        f"text of its own with {own}, set it to 0, or give a shorter sequence_length"
    )
