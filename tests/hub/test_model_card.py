"""The model card: facts, honesty about 4.37.2, and a loading recipe that runs."""

import re
from dataclasses import replace

import pytest
import yaml
from tokenizers_at_hand import TEXTS, bert_like, byte_level, merges_with_spaces, unigram, unsplit_metaspace

from mega_scale.data import load_tokenizer
from mega_scale.data.tokenizer import train_bpe
from mega_scale.hub.export import TrainingFacts, model_card, write_export

FACTS = TrainingFacts(
    name="stdlib-tiny",
    step=1200,
    tokens=9_830_400,
    validation_loss=2.0,
    bits_per_byte=2.8854,
    data="python-stdlib, tokenizer byte, sequences of 512 tokens",
    layout="deepspeed, ZeRO stage 3, 2 ranks",
    run_config="train:\n  steps: 1200\n",
    versions={"torch": "2.13.0", "transformers": "5.23.0"},
)


def test_card_tells_the_training_facts(make_config):
    card = model_card(FACTS, make_config(), dtype="bf16")
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "text-generation"
    for expected in (
        "# stdlib-tiny",
        "| steps | 1,200 |",
        "| tokens seen | 9,830,400 |",
        "| validation loss | 2.0000 nats/token (perplexity 7.39) |",
        "| validation text | 2.8854 bits/byte |",
        "| layout | deepspeed, ZeRO stage 3, 2 ranks |",
        "| data | python-stdlib, tokenizer byte, sequences of 512 tokens |",
        "```yaml\ntrain:\n  steps: 1200\n```",
        "| torch | 2.13.0 |",
        "| weights stored in | bf16; the moving average's parameters in fp32 |",
    ):
        assert expected in card


@pytest.mark.parametrize("tied", [True, False])
def test_card_counts_each_parameter_once(make_model, tied):
    model = make_model(tie_word_embeddings=tied)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"| parameters | {count:,} |" in model_card(FACTS, model.config)


def test_card_says_what_transformers_4_lacks(make_config):
    assert "also loads in transformers 4.37.2" in model_card(FACTS, make_config())
    config = make_config(
        scale_embeddings=True,
        final_norm=True,
        embedding_dropout_prob=0.1,
        lm_head_bias=False,
        normalization_type="rmsnorm",
    )
    card = model_card(FACTS, config)
    assert "also loads in transformers 4.37.2" not in card
    for key in (
        "scale_embeddings=True",
        "final_norm=True",
        "embedding_dropout_prob=0.1",
        "lm_head_bias=False",
        "normalization_type='rmsnorm'",
    ):
        assert f"* `{key}`: " in card


def test_card_without_known_losses_claims_none(make_config):
    card = model_card(TrainingFacts(name="x", step=0, tokens=0), make_config())
    assert "nats/token" not in card
    assert "bits/byte" not in card
    assert "| data | not recorded |" in card
    assert "beyond measure" in model_card(TrainingFacts("x", 1, 1, validation_loss=1e4), make_config())


def test_the_loading_recipe_runs(tmp_path, make_model, tokenizer, capsys):
    model = make_model()
    card = model_card(FACTS, model.config)
    folder = write_export(tmp_path / "out", model.state_dict(), model.config, tokenizer, card)
    recipe = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    assert '"path/to/this/folder"' in recipe
    exec(recipe.replace("path/to/this/folder", str(folder)), {})
    assert capsys.readouterr().out.startswith("def ")


PATHS = """
run_dir: /home/alice/runs/secret-host
resume: ~/runs/x
checkpoint: {key_file: 'C:\\Users\\alice\\key.txt'}
data:
  path: [/data/alice/*.txt, plain.txt, ../alice/up.txt]
  tokenizer: file:///srv/alice/tokenizer
  mixture: {code: {path: //host/share/code}}
parallel: {ds_config: {zero_optimization: {nvme: $HOME/alice/nvme}}}
train: {sample_prompt: /** a comment}
"""


def test_card_tells_no_place_of_the_machine(make_config):
    card = model_card(replace(FACTS, run_config=PATHS), make_config())
    for secret in ("alice", "/home", "/data", "host/", "/srv", "~", "C:", "$HOME", ".."):
        assert secret not in card, secret
    told = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert told["run_dir"] == "secret-host" and told["checkpoint"]["key_file"] == "key.txt"
    assert told["data"]["path"] == ["*.txt", "plain.txt", "up.txt"] and told["data"]["tokenizer"] == "tokenizer"
    assert told["data"]["mixture"]["code"]["path"] == "code"
    assert told["train"]["sample_prompt"] == "/** a comment"  # a text


@pytest.mark.parametrize("data", ["a|b", "a\n| steps | 7 |\nb", "`a`|<b>[c](d)*", "a\\|b"])
def test_no_value_breaks_the_cards_tables(make_config, data):
    run_config = yaml.safe_dump({"note": f"``` {data}"})
    card = model_card(replace(FACTS, name=data, data=data, run_config=run_config), make_config())
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert sum("| steps |" in row for row in rows) == 1
    for row in rows:
        cells = re.split(r"(?<!\\)(?:\\\\)*\|", row)
        assert len(cells) == 4, row
    assert len(re.findall(r"^# ", card, re.MULTILINE)) == 1
    assert f"````yaml\n{run_config}````\n" in card


def test_card_says_which_tokenizers_transformers_4_reads(make_config):
    def told(tokenizer):
        return model_card(FACTS, make_config(), tokenizer=tokenizer)

    for tokenizer in (load_tokenizer("byte"), train_bpe(TEXTS, 300), bert_like(), unigram(), byte_level("<s> $A")):
        assert "The folder also loads in transformers 4.37.2" in told(tokenizer)
    assert "spells out as that token" in told(load_tokenizer("byte")) and "spells out" not in told(bert_like())
    words = {merges_with_spaces: "spaces in them", unsplit_metaspace: "split=false"}
    for make, words_in_it in words.items():
        assert "also loads in" not in told(make()) and words_in_it in told(make())


def test_card_says_how_to_load_without_mega_scale(make_config):
    line = "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)"
    assert line in model_card(FACTS, make_config(), with_code=True)
    assert line not in model_card(FACTS, make_config())
