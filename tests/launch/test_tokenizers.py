"""Runs with other people's tokenizers: empty prompts, ends, ids with holes, and what the export's tokenizer adds."""

import json

import pytest
from launching import metrics, pretrain, start
from tokenizers_at_hand import TEXTS, bert_like, byte_level, word_level
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import mega_scale  # noqa: F401  registers the model
from mega_scale.data.tokenizer import own_tokens

pytestmark = [pytest.mark.launch, pytest.mark.slow]
WORDS = {word: 1000 * i for i, word in enumerate(sorted({word for text in TEXTS for word in text.split()}))}
KINDS = {  # tokenizer, keys, what the export's tokenizer puts before a text, what ends documents
    "sep alone": (bert_like, [], [], 3),
    "bos": (lambda: byte_level("<s> $A </s>"), ["data.add_bos=true"], [0], 2),
    "holes": (lambda: word_level({**WORDS, "<unk>": 69_999, "</s>": 70_000}, eos_token="</s>"), [], [], 70_000),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_samples_saves_and_exports(kind, tmp_path):
    make, keys, before, end = KINDS[kind]
    make().save_pretrained(tmp_path / "tokenizer")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in TEXTS * 40))
    keys = [*keys, "data.source=json", f"data.path={text}", f"data.tokenizer={tmp_path / 'tokenizer'}"]
    keys += ["data.validation_fraction=0", "train.eval_every=0", f"data.cache_dir={tmp_path / 'cache'}"]
    keys += ["train.steps=4", "train.sample_every=2", "train.sample_prompt=", "model.vocab_size=null"]
    output = pretrain("forked", tmp_path / "run", *keys)
    assert ("trained without" in output) == (kind == "sep alone")
    assert metrics(tmp_path / "run")[4]["loss"] > 0
    export = tmp_path / "export"
    code, output = start(["forked", "launch/export.py"], [str(tmp_path / "run"), str(export)])
    assert code == 0, output
    tokenizer = AutoTokenizer.from_pretrained(export)
    assert own_tokens(tokenizer) == (before, []) and tokenizer.eos_token_id == end
    assert GenerationConfig.from_pretrained(export).eos_token_id == end
    assert AutoModelForCausalLM.from_pretrained(export).config.eos_token_id == end
    for file in export.rglob("*"):
        assert str(tmp_path).encode() not in file.read_bytes(), file
    code, output = start(
        ["forked", "launch/generate.py"], [str(tmp_path / "run"), "--stop-at-eos", "--max-new-tokens", "5"]
    )
    assert code == 0, output
    figures = []
    for model in ("run", "export"):
        arguments = [str(tmp_path / model), str(text), "--source", "json", "--json", "--sequence-length", "64"]
        code, output = start(["forked", "launch/evaluate.py"], arguments)
        assert code == 0, output
        figures.append(json.loads(output.splitlines()[-1]))
    models = [row.pop("model") for row in figures]
    assert (
        figures[0] == figures[1]
        and models[0].startswith(str(tmp_path / "run"))
        and models[1] == str(tmp_path / "export")
    )
