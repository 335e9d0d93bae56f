"""The built-in tokenizer: one token a UTF-8 byte, so that no text is outside its vocabulary."""

import json
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# The ids that MegaConfig has for them by default; the byte b is the token b + 3.
_SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>"}
_FIRST_BYTE = len(_SPECIAL)


def build_byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make the tokenizer: bos 0, pad 1, eos 2, then the 256 bytes; 259 ids.

    It adds nothing to a text, and reads "</s>" in a text as four characters. Its `save_pretrained` folder loads with
    AutoTokenizer alone.

    Returns:
        A fast Hugging Face tokenizer.
    """
    vocabulary = {token: i for i, token in enumerate(_SPECIAL.values())}
    vocabulary |= {letter: byte + _FIRST_BYTE for byte, letter in enumerate(_byte_letters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **_SPECIAL,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def is_byte_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Say whether a tokenizer is the built-in one, also when it comes from a folder."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return False
    return tokenizer.split_special_tokens and fast_definition(tokenizer) == fast_definition(build_byte_tokenizer())


def encode_bytes(texts: Sequence[bytes]) -> np.ndarray:
    """Do what the built-in tokenizer does, some hundred times as fast.

    Args:
        texts: Documents in UTF-8.

    Returns:
        (T,) uint16: each document's tokens, followed by eos.
    """
    end = list(_SPECIAL).index("eos_token")
    # The byte 0xff never occurs in UTF-8, so it can stand for the end of a document meanwhile.
    joined = np.frombuffer(b"".join(text + b"\xff" for text in texts), dtype=np.uint8)
    return np.where(joined == 0xFF, np.uint16(end), joined + np.uint16(_FIRST_BYTE))


def fast_definition(tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    """Describe a fast tokenizer as plain JSON, without what its last call left behind."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    return {name: part for name, part in definition.items() if name not in ("padding", "truncation")}


def _byte_letters() -> list[str]:
    """The printable letter that `tokenizers` has for each byte: itself, or one above U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
