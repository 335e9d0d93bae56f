"""The special tokens around documents, and the tokenizer that gives a trained model such beginnings."""

import copy

from tokenizers import processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_PROBE = "a"
_ADDS_BOS = "add_bos"  # in tokenizer_config.json; `add_bos_token` is transformers' own, which it does not save


def separator_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Find the token that ends a document, and so stands before the next one: eos, else sep.

    Args:
        tokenizer: Any tokenizer.

    Returns:
        Its id.

    Raises:
        ValueError: It has neither.
    """
    if tokenizer.eos_token_id is not None:
        return int(tokenizer.eos_token_id)
    if tokenizer.sep_token_id is not None:
        return int(tokenizer.sep_token_id)
    raise ValueError(
        f"data.tokenizer={tokenizer.name_or_path!r} has neither an eos nor a sep token to end documents with; "
        "add one and save it again, or name another tokenizer"
    )


def require_end(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that has no token to end documents with, or whose end cannot be told from another token."""
    end, token = separator_id(tokenizer), str(tokenizer.eos_token or tokenizer.sep_token)
    same = [other for other, number in tokenizer.get_vocab().items() if number == end and other != token]
    if same:
        # transformers adds a token that the vocabulary lacks under the number of tokens, which ids with holes may have.
        raise ValueError(
            f"data.tokenizer={tokenizer.name_or_path!r} ends documents with {token!r}, whose id {end} is that of "
            f"{same[0]!r}: give it an id of its own and save it again, or name another tokenizer"
        )


def end_ids(tokenizer: PreTrainedTokenizerBase, configured: int | list[int] | None) -> int | list[int]:
    """Say what ends a generated text: the token that ends documents, or the configured ids if it is one of several."""
    end = separator_id(tokenizer)
    return configured if isinstance(configured, list) and end in configured else end


def own_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Find what a tokenizer's own call adds.

    Args:
        tokenizer: Any tokenizer.

    Returns:
        The ids that it puts before a text, such as bos, and those behind it.
    """
    plain, whole = (tokenizer(_PROBE, add_special_tokens=added)["input_ids"] for added in (False, True))
    for start in range(len(whole) - len(plain) + 1):
        if plain and whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    # It knows no such text: what ends a document stands behind.
    end = separator_id(tokenizer)
    start = whole.index(end) if end in whole else len(whole)
    return whole[:start], whole[start:]


def document_start(tokenizer: PreTrainedTokenizerBase, add_bos: bool) -> list[int]:
    """Find the ids that a document begins with.

    Args:
        tokenizer: Any tokenizer.
        add_bos: `data.add_bos`.

    Returns:
        Those that the tokenizer itself puts before a text, else its bos; none without `add_bos`.

    Raises:
        ValueError: They are wanted, and the tokenizer has none.
    """
    if not add_bos:
        return []
    if before := own_tokens(tokenizer)[0]:
        return before
    if tokenizer.bos_token_id is None:
        raise ValueError(
            f"data.add_bos=True: data.tokenizer={tokenizer.name_or_path!r} puts nothing before a text and has no bos "
            "token; set it to false, or name another tokenizer"
        )
    return [int(tokenizer.bos_token_id)]


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Say whether a tokenizer comes from a run with `data.add_bos`."""
    return bool(tokenizer.init_kwargs.get(_ADDS_BOS))


def as_trained(tokenizer: PreTrainedTokenizerBase, add_bos: bool) -> PreTrainedTokenizerBase:
    """Make the tokenizer that goes with a model: its own call gives a prompt such as the documents trained on.

    Args:
        tokenizer: The run's; it stays as it is.
        add_bos: `data.add_bos`.

    Returns:
        A tokenizer that puts before a text what documents began with, and nothing behind it, and whose eos is the token
        that ended them. A tokenizer written in Python still adds what it adds.
    """
    made = copy.deepcopy(tokenizer)
    made.init_kwargs.pop(_ADDS_BOS, None)
    if add_bos:
        made.init_kwargs[_ADDS_BOS] = True
    if made.eos_token is None:
        made.eos_token = made.sep_token
    start = document_start(tokenizer, add_bos)
    if isinstance(made, PreTrainedTokenizerFast) and own_tokens(tokenizer) != (start, []):
        piece = ["start:0"] if start else []
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=[*piece, "$A:0"],
            pair=[*piece, "$A:0", "$B:1"],
            special_tokens=[{"id": "start", "ids": start, "tokens": tokenizer.convert_ids_to_tokens(start)}],
        )
    return made


def unlike_training(tokenizer: PreTrainedTokenizerBase, add_bos: bool) -> str | None:
    """Say in one line what a tokenizer adds to a text by itself that documents are trained without.

    Args:
        tokenizer: The run's.
        add_bos: `data.add_bos`.

    Returns:
        The line; None where training is what the tokenizer's own call gives, but for the token that ends documents.
    """
    before, behind = own_tokens(tokenizer)
    left = [] if add_bos else before
    left += behind if behind != [separator_id(tokenizer)] else []
    if not left:
        return None
    names = " ".join(tokenizer.convert_ids_to_tokens(left))
    fast = isinstance(tokenizer, PreTrainedTokenizerFast)
    kept = "exports hold the tokenizer without them" if fast else "but the tokenizer of exports still adds them"
    remedy = "" if add_bos or not before else "; data.add_bos=true trains on what comes before a text"
    return f"data.tokenizer={tokenizer.name_or_path!r} adds {names} to a text: trained without, and {kept}{remedy}"


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Give the ids that a model continues: a document's beginning as it was trained on.

    Args:
        tokenizer: As `as_trained` makes it.
        text: The beginning; where it is empty, what ended the document before stands for it.

    Returns:
        One id or more.

    Raises:
        ValueError: The tokenizer has no tokens for the text.
    """
    try:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    except Exception as error:  # of any kind: half a surrogate, or no unk token
        raise ValueError(f"the tokenizer cannot read the prompt {text!r} ({error}): give another one") from None
    return [*document_start(tokenizer, adds_bos(tokenizer)), *ids] or [separator_id(tokenizer)]
