"""A tokenizer's files as transformers 4.37.2, with tokenizers 0.15, reads them too; and what it cannot read."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# What tokenizers 0.15 knows; parts that came later are absent.
_KINDS = {
    "model": {"BPE", "WordPiece", "WordLevel", "Unigram"},
    "normalizer": {
        "BertNormalizer", "Strip", "StripAccents", "NFC", "NFD", "NFKC", "NFKD", "Sequence", "Lowercase", "Nmt",
        "Precompiled", "Replace", "Prepend",
    },
    "pre_tokenizer": {
        "BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Metaspace", "Whitespace", "Sequence", "Split",
        "Punctuation", "WhitespaceSplit", "Digits", "UnicodeScripts",
    },
    "post_processor": {"BertProcessing", "ByteLevel", "RobertaProcessing", "Sequence", "TemplateProcessing"},
    "decoder": {
        "BPEDecoder", "ByteFallback", "ByteLevel", "CTC", "Fuse", "Metaspace", "Replace", "Sequence", "Strip",
        "WordPiece",
    },
}  # fmt: skip


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save a tokenizer for both lines of transformers.

    Args:
        folder: where its files go.
        tokenizer: a fast one is described by tokenizer.json alone, so it loads as the general class.
    """
    # 4.37.2 reads a chat template in the settings only, 5 there too.
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    # The class that reads tokenizer.json as it is, under the name that transformers 4 knows; 5 reads both names.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    _write_json(path, settings)
    path = folder / "tokenizer.json"
    definition = json.loads(path.read_text(encoding="utf-8"))
    merges = definition["model"].get("merges")
    if merges and not _has_spaces(merges):
        definition["model"]["merges"] = [" ".join(pair) for pair in _pairs(merges)]
    for part in _parts(definition, ("pre_tokenizer", "decoder")):
        if part["type"] == "Metaspace":
            part["add_prefix_space"] = part["prepend_scheme"] != "never"
    _write_json(path, definition)


def tokenizer_beyond_transformers_4(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What of a tokenizer transformers 4.37.2 does not read, in words.

    Args:
        tokenizer: of the model.

    Returns:
        Lines; none when its files load there and give the same ids.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return [f"the tokenizer is of the class `{type(tokenizer).__name__}`, which was not tried there"]
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    model = definition["model"]
    lines = [
        f"the tokenizer's {room.replace('_', '-')} `{part['type']}` is not known there"
        for room, known in _KINDS.items()
        for part in _parts(definition, (room,))
        if part["type"] not in known
    ]
    if _has_spaces(model.get("merges") or []):
        lines.append("the tokenizer merges pieces with spaces in them, which its files cannot hold there")
    if model.get("ignore_merges"):
        lines.append("the tokenizer takes a whole word before its merges (`ignore_merges`), which it does not do there")
    if any(part["type"] == "Metaspace" and not part.get("split", True) for part in _parts(definition, _KINDS)):
        lines.append("the tokenizer does not split at spaces (`Metaspace` with `split=false`), which it does there")
    return lines


def _parts(definition: dict[str, Any], rooms: Any) -> list[dict[str, Any]]:
    """Every component in some places of a tokenizer.json, those inside sequences included."""
    waiting, found = [definition.get(room) for room in rooms], []
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict) and "type" in part:
            found.append(part)
            for name in ("normalizers", "pretokenizers", "processors", "decoders"):
                waiting += part.get(name, [])
    return found


def _pairs(merges: list[Any]) -> list[list[str]]:
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]


def _has_spaces(merges: list[Any]) -> bool:
    return any(" " in piece for pair in _pairs(merges) for piece in pair)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
