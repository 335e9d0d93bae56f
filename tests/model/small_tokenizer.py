"""Small tokenizers in the manner of RoBERTa, trained on a few sentences."""

import pathlib

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]  # bos 0, pad 1, eos 2, as in MegaConfig
MASK = AddedToken("<mask>", lstrip=True, special=True)  # stands for a word and the space before it


def train(texts: list[str]) -> Tokenizer:
    """Byte-level BPE with the merges of the texts: every word of theirs is one token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        special_tokens=[*SPECIAL, MASK],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return tokenizer


def make_tokenizer(texts: list[str], **settings: object) -> PreTrainedTokenizerFast:
    """A fast tokenizer with all special tokens, whose mask takes the space before it along."""
    return PreTrainedTokenizerFast(
        tokenizer_object=train(texts),
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token=MASK,
        **settings,
    )


def save_vocabulary(texts: list[str], folder: pathlib.Path) -> int:
    """Write vocab.json and merges.txt alone, as old folders have them; returns the number of tokens."""
    tokenizer = train(texts)
    tokenizer.model.save(str(folder))
    return tokenizer.get_vocab_size()
