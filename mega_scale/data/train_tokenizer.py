"""A tokenizer of one's own: byte-level BPE, which loses nothing of any text."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mega_scale.data.tokenizer import batched

# The ids that MegaConfig has for them by default.
_SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>"}


def train_bpe(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer.

    Args:
        documents: Texts to learn merges from.
        vocab_size: Number of ids: three special tokens, the 256 bytes, and merges.

    Returns:
        A tokenizer that adds nothing to a text, and reads "</s>" in a text as characters. It has fewer ids where the
        texts have too few pairs to merge.

    Raises:
        ValueError: The vocabulary has no place for the bytes.
    """
    least = len(_SPECIAL) + 256
    if vocab_size < least:
        raise ValueError(f"a vocabulary of {vocab_size} ids has no place for special tokens and bytes: give {least}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(batched(documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **_SPECIAL,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
