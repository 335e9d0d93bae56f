"""The model card: facts, honesty about 4.37.2, and a loading recipe that runs."""

import re
from importlib.metadata import version

import pytest
import yaml
from tokenizers_at_hand import TEXTS, bert_like, byte_level, merges_with_spaces, unigram, unsplit_metaspace

from mega_scale.data import load_tokenizer
from mega_scale.data.tokenizer import train_bpe
from mega_scale.hub.export import model_card, write_export

TRAINER = {
    "step": 1200,
    "tokens": 9_830_400,
    "validation": {"loss": 2.0, "bits_per_byte": 2.8854},
    "layout": {"engine": "deepspeed", "zero_stage": 3, "world_size": 2},
}
DATA = {"source": "python-stdlib", "mixture": None, "path": None, "tokenizer": "byte", "sequence_length": 512}
RUN = {"data": DATA, "train": {"steps": 1200}}


def card_of(config, name="stdlib-tiny", trainer=TRAINER, run=RUN, **how):
    return model_card(name, config, trainer, run, **how)


def test_card_tells_the_training_facts(make_config):
    card = card_of(make_config(), dtype="bf16")
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "text-generation"
    for expected in (
        "# stdlib-tiny",
        "| steps | 1,200 |",
        "| tokens seen | 9,830,400 |",
        "| validation loss | 2.0000 nats/token (perplexity 7.39) |",
        "| validation text | 2.8854 bits/byte |",
        "| layout | deepspeed, ZeRO stage 3, 2 rank(s) |",
        "| data | python-stdlib, tokenizer byte, sequences of 512 tokens |",
        "  sequence_length: 512\ntrain:\n  steps: 1200\n```",
        f"| torch | {version('torch')} |",
        "| weights stored in | bf16; the moving average's parameters in fp32 |",
    ):
        assert expected in card


@pytest.mark.parametrize("tied", [True, False])
def test_card_counts_each_parameter_once(make_model, tied):
    model = make_model(tie_word_embeddings=tied)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"| parameters | {count:,} |" in card_of(model.config)


def test_card_of_a_megalodon(make_megalodon_config):
    card = card_of(make_megalodon_config())
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["megalodon", "mega_scale"]
    assert "A Megalodon causal language model (arXiv 2404.08801)" in card and "chunks of 8 tokens" in card
    assert "No release of transformers has Megalodon itself." in card and "4.37.2" not in card


def test_card_says_what_transformers_4_lacks(make_config):
    assert "also loads in transformers 4.37.2" in card_of(make_config())
    config = make_config(
        scale_embeddings=True,
        final_norm=True,
        embedding_dropout_prob=0.1,
        lm_head_bias=False,
        normalization_type="rmsnorm",
    )
    card = card_of(config)
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
    card = card_of(make_config(), trainer={**TRAINER, "validation": {}})
    assert "nats/token" not in card
    assert "bits/byte" not in card
    assert "beyond measure" in card_of(make_config(), trainer={**TRAINER, "validation": {"loss": 1e4}})


@pytest.mark.parametrize(
    "data,told",
    [
        ({"source": "hub", "hub_name": "~/a/texts", "hub_split": "train"}, "texts (train), tokenizer byte"),
        ({"mixture": {"code": {}, "prose": {}}}, "a mixture of code, prose, tokenizer byte"),
        ({"source": "text", "path": ["/data/one.txt", "two.txt"]}, "text (one.txt, two.txt), tokenizer byte"),
    ],
)
def test_card_says_what_the_model_was_trained_on(make_config, data, told):
    assert f"| data | {told}" in card_of(make_config(), run={"data": DATA | data})


def test_the_loading_recipe_runs(tmp_path, make_model, tokenizer, capsys):
    model = make_model()
    card = card_of(model.config)
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
    run = yaml.safe_load(PATHS)
    card = card_of(make_config(), run={**run, "data": DATA | run["data"]})
    for secret in ("alice", "/home", "/data", "host/", "/srv", "~", "C:", "$HOME", ".."):
        assert secret not in card, secret
    told = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert told["run_dir"] == "secret-host" and told["checkpoint"]["key_file"] == "key.txt"
    assert told["data"]["path"] == ["*.txt", "plain.txt", "up.txt"] and told["data"]["tokenizer"] == "tokenizer"
    assert told["data"]["mixture"]["code"]["path"] == "code"
    assert told["train"]["sample_prompt"] == "/** a comment"  # a text


@pytest.mark.parametrize("text", ["a|b", "a\n| steps | 7 |\nb", "`a`|<b>[c](d)*", "a\\|b"])
def test_no_value_breaks_the_cards_tables(make_config, text):
    run = {"data": DATA | {"tokenizer": text}, "note": f"``` {text}"}
    card = card_of(make_config(), name=text, run=run)
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert sum("| steps |" in row for row in rows) == 1
    for row in rows:
        cells = re.split(r"(?<!\\)(?:\\\\)*\|", row)
        assert len(cells) == 4, row
    assert len(re.findall(r"^# ", card, re.MULTILINE)) == 1
    assert f"````yaml\n{yaml.safe_dump(run, sort_keys=False)}````\n" in card


def test_card_says_which_tokenizers_transformers_4_reads(make_config):
    def told(tokenizer):
        return card_of(make_config(), tokenizer=tokenizer)

    for tokenizer in (load_tokenizer("byte"), train_bpe(TEXTS, 300), bert_like(), unigram(), byte_level("<s> $A")):
        assert "The folder also loads in transformers 4.37.2" in told(tokenizer)
    assert "spells out as that token" in told(load_tokenizer("byte")) and "spells out" not in told(bert_like())
    words = {merges_with_spaces: "spaces in them", unsplit_metaspace: "split=false"}
    for make, words_in_it in words.items():
        assert "also loads in" not in told(make()) and words_in_it in told(make())


def test_card_says_how_to_load_without_mega_scale(make_config):
    line = "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)"
    assert line in card_of(make_config(), with_code=True)
    assert line not in card_of(make_config())
