"""A tokenizer from fairseq's dictionary of words, `dict.txt`."""

import os
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

# fairseq puts these before the words of the file, in this order.
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")


def tokenizer_from_dictionary(path: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """Read a dictionary as a tokenizer that splits at white space, as fairseq does.

    Args:
        path: a text file with one word and its count a line, the most frequent first.

    Returns:
        The tokenizer, with fairseq's ids: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, then the words in order.

    Raises:
        ValueError: a line is not a word and a count, or a word comes twice.
    """
    vocabulary = {word: number for number, word in enumerate(_SPECIAL)}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        word, _, count = line.rpartition(" ")
        if not word or not count.isdecimal():
            raise ValueError(f"{path}, line {number} is {line!r}: expected a word, a space and a count")
        if word in vocabulary:
            raise ValueError(f"{path}, line {number} repeats the word {word!r}: remove the line")
        vocabulary[word] = len(vocabulary)
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    bos, pad, eos, unknown = _SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, pad_token=pad, eos_token=eos, unk_token=unknown
    )
