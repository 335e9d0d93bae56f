"""write_export: what the folder holds, who loads it, what is refused, and how much is in memory at once."""

import json
import os
from collections.abc import Mapping

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers_at_hand import TEXTS, bert_like, byte_level, unigram, word_level
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from mega_scale.data import as_trained, load_tokenizer, vocabulary_size
from mega_scale.data.tokenizer import train_bpe
from mega_scale.hub.export import write_export, write_tokenizer
from mega_scale.hub.folder import open_folder

EMBEDDING = "mega.embedding_layer.word_embeddings.weight"
HEAD = "lm_head.weight"


def logits_of(model, input_ids):
    with torch.no_grad():
        return model(input_ids=input_ids, use_cache=False).logits


def stored_tensors(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def auto_load(folder, **options):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


CASES = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "no dense layer": {"add_lm_hidden_dense_layer": False},
    "simple bias": {"relative_positional_bias": "simple", "normalization_type": "layernorm"},
    "chunks": {"use_chunking": True, "chunk_size": 8, "attention_activation": "laplace"},
    "beyond 4.37.2": {"scale_embeddings": True, "final_norm": True, "lm_head_bias": False},
}


@pytest.fixture(params=[10**9, 10**4], ids=["single", "sharded"])
def max_shard_bytes(request):
    return request.param


MEGALODONS = {
    "megalodon": {},
    "megalodon, tied": {"tie_word_embeddings": True, "swiglu": True, "rescale_nffn": True, "norm_affine": False},
}


@pytest.fixture(params=[*CASES, *MEGALODONS])
def model(request, make_model, make_megalodon):
    name = request.param
    return make_model(**CASES[name]) if name in CASES else make_megalodon(**MEGALODONS[name])


def test_round_trip_is_exact(tmp_path, model, tokenizer, input_ids, max_shard_bytes):
    folder = tmp_path / "out"
    written = write_export(
        folder, model.state_dict(), model.config, tokenizer, "card\n", max_shard_bytes=max_shard_bytes
    )
    assert written == folder
    assert (folder / "README.md").read_text() == "card\n"
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    assert torch.equal(logits_of(auto_load(folder), input_ids), logits_of(model, input_ids))
    config, tensors = open_folder(folder)
    assert type(config) is type(model.config) and config.architectures == [type(model).__name__]
    assert set(tensors) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensors[name], tensor), name
    assert (HEAD in stored_tensors(folder)) == (not model.config.tie_word_embeddings)


def test_shards_stay_below_the_limit_and_the_index_is_complete(tmp_path, make_model, tokenizer):
    model, limit = make_model(), 10_000
    folder = write_export(tmp_path / "out", model.state_dict(), model.config, tokenizer, "", max_shard_bytes=limit)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    assert [file.name for file in files] == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    total = 0
    for file in files:
        tensors = load_file(file)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= limit or len(tensors) == 1
        assert {name for name, where in index["weight_map"].items() if where == file.name} == set(tensors)
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        total += size
    assert index["metadata"]["total_size"] == total


def test_every_tensor_is_read_once_and_one_shard_is_held(tmp_path, make_model, tokenizer):
    model = make_model()
    parent = tmp_path / "exports"
    reads = []

    class Lazy(Mapping):
        def __getitem__(self, name):
            reads.append((name, len(list(parent.glob(".out.*.partial/*.safetensors")))))
            return model.state_dict()[name]

        def __iter__(self):
            return iter(model.state_dict())

        def __len__(self):
            return len(model.state_dict())

    folder = write_export(parent / "out", Lazy(), model.config, tokenizer, "", max_shard_bytes=5_000)
    plan = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    # The files of earlier shards are already there whenever a tensor is read.
    assert len(reads) == len(plan) > 4
    assert dict(reads) == {name: int(file.split("-")[1]) - 1 for name, file in plan.items()}


def test_bf16_keeps_the_moving_average_and_buffers_in_fp32(tmp_path, make_model, tokenizer, input_ids):
    model = make_model()
    folder = write_export(tmp_path / "out", model.state_dict(), model.config, tokenizer, "", dtype="bf16")
    buffers = {name for name, _ in model.named_buffers()}
    for name, tensor in stored_tensors(folder).items():
        kept = ".ema_gate." in name or name in buffers
        assert tensor.dtype == (torch.float32 if kept else torch.bfloat16), name
        assert torch.equal(tensor, model.state_dict()[name].to(tensor.dtype)), name
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = auto_load(folder)
    for name, parameter in loaded.named_parameters():
        if ".ema_gate." in name:
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, model.get_parameter(name)), name
    exact, rounded = logits_of(model, input_ids), logits_of(auto_load(folder, dtype=torch.float32), input_ids)
    assert 0 < (exact - rounded).abs().max() < 0.05 * exact.abs().max()


def test_a_source_may_hold_any_one_of_the_tied_names(tmp_path, make_model, tokenizer, input_ids):
    model = make_model()
    for kept, dropped in ((EMBEDDING, HEAD), (HEAD, EMBEDDING)):
        tensors = {name: tensor for name, tensor in model.state_dict().items() if name != dropped}
        folder = write_export(tmp_path / kept, tensors, model.config, tokenizer, "")
        assert set(stored_tensors(folder)) == set(model.state_dict()) - {HEAD}
        assert torch.equal(logits_of(auto_load(folder), input_ids), logits_of(model, input_ids))


def test_views_into_one_storage_are_written_apart(tmp_path, make_model, tokenizer):
    model = make_model()
    expected = model.state_dict()
    flat = torch.cat([tensor.flatten() for tensor in expected.values()])
    pieces = flat.split([tensor.numel() for tensor in expected.values()])
    views = {name: piece.view(expected[name].shape) for name, piece in zip(expected, pieces, strict=True)}
    folder = write_export(tmp_path / "out", views, model.config, tokenizer, "")
    for name, tensor in stored_tensors(folder).items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_tokenizer_and_generation_config_come_along(tmp_path, make_model, tokenizer):
    model = make_model(eos_token_id=5)
    folder = write_export(tmp_path / "out", model.state_dict(), model.config, tokenizer, "")
    text = "def f(x):\n    return 'né'\n"
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    # The name by which transformers 4 finds the class.
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.bos_token_id, generation.pad_token_id, generation.eos_token_id) == (0, 1, 2)


def test_tensors_that_do_not_fit_are_named(tmp_path, make_model, tokenizer):
    model = make_model()
    tensors = dict(model.state_dict())
    del tensors["lm_head.bias"]
    tensors["extra.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"missing \(1\): lm_head.bias; unexpected \(1\): extra.weight"):
        write_export(tmp_path / "out", tensors, model.config, tokenizer, "")
    tensors = dict(model.state_dict()) | {"lm_head.bias": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"lm_head.bias is \(3,\), expected \(259,\)"):
        write_export(tmp_path / "out", tensors, model.config, tokenizer, "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": "fp16"}, "dtype='fp16'"), ({"max_shard_bytes": 0}, "max_shard_bytes=0")],
)
def test_options_out_of_range_are_refused(tmp_path, make_model, tokenizer, options, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        write_export(tmp_path / "out", model.state_dict(), model.config, tokenizer, "", **options)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path, make_model, tokenizer):
    model = make_model(vocab_size=100)
    with pytest.raises(ValueError, match="259 tokens, but vocab_size=100"):
        write_export(tmp_path / "out", model.state_dict(), model.config, tokenizer, "")


def test_what_exists_is_replaced_only_when_it_is_an_export_and_asked_for(tmp_path, make_model, tokenizer):
    model, folder = make_model(), tmp_path / "out"
    folder.mkdir()
    write_export(folder, model.state_dict(), model.config, tokenizer, "first")
    with pytest.raises(ValueError, match=r"out exists and is not empty.*--overwrite"):
        write_export(folder, model.state_dict(), model.config, tokenizer, "second")
    assert (folder / "README.md").read_text() == "first"
    (folder / "stale.safetensors").touch()
    write_export(folder, model.state_dict(), model.config, tokenizer, "second", overwrite=True)
    assert (folder / "README.md").read_text() == "second"
    assert not (folder / "stale.safetensors").exists()
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.txt").touch()
    with pytest.raises(ValueError, match="is no export"):
        write_export(foreign, model.state_dict(), model.config, tokenizer, "", overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        write_export(foreign / "chapter.txt", model.state_dict(), model.config, tokenizer, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "thesis"]


def test_a_failed_export_leaves_the_earlier_one(tmp_path, make_model, tokenizer):
    model, folder = make_model(), tmp_path / "out"
    write_export(folder, model.state_dict(), model.config, tokenizer, "first")

    class Broken(dict):
        def __getitem__(self, name):
            if name == "lm_head.bias":
                raise OSError("disk gone")
            return super().__getitem__(name)

    with pytest.raises(OSError, match="disk gone"):
        write_export(folder, Broken(model.state_dict()), model.config, tokenizer, "second", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (folder / "README.md").read_text() == "first"


PEER_LOGITS = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, MegaForCausalLM
for folder in sys.argv[2:]:
    model, info = MegaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    input_ids = load_file(sys.argv[1])["input_ids"]
    with torch.no_grad():
        logits = model.eval()(input_ids=input_ids).logits
    tokens = torch.tensor(AutoTokenizer.from_pretrained(folder)("né")["input_ids"])
    save_file({"logits": logits, "tokens": tokens}, folder + "/peer-result.safetensors")
"""


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.skipif(
    "MEGA_SCALE_PEER_PYTHON" not in os.environ, reason="MEGA_SCALE_PEER_PYTHON names no Python with transformers 4.37.2"
)
def test_transformers_4_loads_exports_strictly(tmp_path, make_model, tokenizer, input_ids, run_peer):
    cases = {
        "tied": ({}, {}),
        "untied, sharded": ({"tie_word_embeddings": False}, {"max_shard_bytes": 10**4}),
        "simple bias": ({"relative_positional_bias": "simple", "normalization_type": "layernorm"}, {}),
        "chunks": ({"use_chunking": True, "chunk_size": 8, "add_lm_hidden_dense_layer": False}, {}),
        "bf16": ({}, {"dtype": "bf16", "max_shard_bytes": 10**4}),
    }
    save_file({"input_ids": input_ids}, tmp_path / "inputs.safetensors")
    for name, (changes, options) in cases.items():
        model = make_model(**changes)
        write_export(tmp_path / name, model.state_dict(), model.config, tokenizer, "", **options)
    run_peer(PEER_LOGITS, tmp_path / "inputs.safetensors", *(tmp_path / name for name in cases))
    for name in cases:
        result = load_file(tmp_path / name / "peer-result.safetensors")
        ours = logits_of(auto_load(tmp_path / name, dtype=torch.float32), input_ids)
        assert (result["logits"] - ours).abs().max() < 1e-4, name
        assert result["tokens"].tolist() == tokenizer("né")["input_ids"]


TOKENIZERS = {
    "bytes": lambda: load_tokenizer("byte"),
    "trained": lambda: train_bpe(TEXTS, 300),
    "word pieces": bert_like,
    "unigram": unigram,
    "byte-level, bos": lambda: byte_level("<s> $A"),
    "words with holes": lambda: word_level({"the": 0, "way": 17, "<unk>": 3, "</s>": 5000}, eos_token="</s>"),
}
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
PEER_TOKENS = """
import json, sys
from transformers import AutoTokenizer
text, *folders = sys.argv[1:]
loaded = [AutoTokenizer.from_pretrained(folder) for folder in folders]
print(json.dumps([
    [t(text)["input_ids"], t.decode(t(text)["input_ids"]), t.eos_token_id, len(t), t.chat_template] for t in loaded
]))
"""


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.skipif(
    "MEGA_SCALE_PEER_PYTHON" not in os.environ, reason="MEGA_SCALE_PEER_PYTHON names no Python with transformers 4.37.2"
)
def test_transformers_4_reads_every_kind_of_tokenizer(tmp_path, run_peer):
    expected, text = [], "the way né 12  of it"
    for name, make in TOKENIZERS.items():
        tokenizer = as_trained(make(), False)
        tokenizer.chat_template = CHAT
        write_tokenizer(tmp_path / name, tokenizer)
        loaded = AutoTokenizer.from_pretrained(tmp_path / name)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert loaded(text)["input_ids"] == ids and vocabulary_size(loaded) == vocabulary_size(tokenizer)
        expected.append([ids, tokenizer.decode(ids), tokenizer.eos_token_id, len(tokenizer), CHAT])
        assert loaded.chat_template == CHAT
    found = json.loads(run_peer(PEER_TOKENS, text, *(tmp_path / name for name in TOKENIZERS)))
    for name, one, other in zip(TOKENIZERS, found, expected, strict=True):
        assert one == other, name


def test_an_export_ends_where_its_documents_did_and_names_no_place(tmp_path, make_model):
    """With sep alone, as BERT has it; from a folder whose name must stay here."""
    bert_like().save_pretrained(tmp_path / "here")
    tokenizer = as_trained(load_tokenizer(str(tmp_path / "here")), False)
    model = make_model(eos_token_id=None, bos_token_id=None, pad_token_id=0)
    model.config._name_or_path = str(tmp_path / "here")
    folder = write_export(tmp_path / "out", model.state_dict(), model.config, tokenizer, "card")
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.bos_token_id, generation.pad_token_id, generation.eos_token_id) == (3, 0, 3)
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 3
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.eos_token == "[SEP]" and loaded("the way")["input_ids"][0] != loaded.cls_token_id
    for file in folder.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file


def test_several_ends_stay_in_an_export(tmp_path, make_model, tokenizer):
    model = make_model(eos_token_id=[2, 7])
    folder = write_export(tmp_path / "out", model.state_dict(), model.config, tokenizer, "")
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [2, 7]


def test_the_largest_id_must_fit_the_vocabulary(tmp_path, make_model):
    model = make_model()
    holes = word_level({"a": 0, "</s>": 5000}, eos_token="</s>")
    with pytest.raises(ValueError, match="5001 tokens, but vocab_size=259"):
        write_export(tmp_path / "out", model.state_dict(), model.config, holes, "")
