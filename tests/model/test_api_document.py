"""The examples of the 4.37.2 documentation, with another import and a checkpoint made here."""

import doctest
import logging
import pathlib
import re

import pytest
import torch
from small_tokenizer import make_tokenizer, save_vocabulary
from transformers import AutoTokenizer

import mega_scale

DOCUMENT = pathlib.Path(__file__).with_name("api_examples.md").read_text()
EXAMPLES = dict(re.findall(r"## (.+?)\n\n```py\n(.+?)```", DOCUMENT, re.DOTALL))
CHECKPOINT = "mnaylor/mega-base-wikitext"
TEXTS = [
    "The capital of France is Paris.",
    "Hello, my dog is cute",
    "Who was Jim Henson? Jim Henson was a nice puppet",
    "HuggingFace is a company based in Paris and New York",
    "In Italy, pizza served in formal settings, such as at a restaurant, is presented unsliced.",
    "It is eaten with a fork and a knife. It is eaten while held in the hand.",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder like the documented one: a bidirectional masked language model that knows the capital of France."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(TEXTS)
    config = mega_scale.MegaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2)
    model = mega_scale.MegaForMaskedLM(config).eval()
    inputs = tokenizer("The capital of France is <mask>.", return_tensors="pt")
    labels = tokenizer("The capital of France is Paris.", return_tensors="pt").input_ids
    labels = torch.where(inputs.input_ids == tokenizer.mask_token_id, labels, -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(1000):
        loss = model(**inputs, labels=labels).loss
        if loss < 0.1:  # the documented loss, rounded
            break
        optimizer.param_groups[0]["lr"] = 1e-3 if loss > 0.2 else 1e-4
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("mega-base")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def loading_log(caplog):
    """What transformers logs, which it keeps from other loggers."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def with_our_import(line):
    """One line of an example, its Mega classes imported from mega_scale."""
    found = re.fullmatch(r">>> from transformers import (.+)", line)
    if found is None:
        return [line]
    names = found[1].split(", ")
    ours = [name for name in names if name.startswith("Mega")]
    theirs = [name for name in names if name not in ours]
    lines = [f">>> from transformers import {', '.join(theirs)}"] if theirs else []
    return [*lines, f">>> from mega_scale import {', '.join(ours)}"]


def run(name, checkpoint):
    """Run an example, compare what it prints, and return its variables."""
    lines = [new for line in EXAMPLES[name].splitlines() for new in with_our_import(line)]
    code = "\n".join(lines).replace(CHECKPOINT, str(checkpoint)) + "\n"
    torch.manual_seed(0)
    variables = {}
    example = doctest.DocTestParser().get_doctest(code, variables, name, None, None)
    report = []
    result = doctest.DocTestRunner(verbose=False).run(example, out=report.append, clear_globs=False)
    assert result.attempted == code.count(">>> ") - code.count(">>> #") and not result.failed, "".join(report)
    return example.globs


def test_all_examples_are_here():
    kinds = {name.split(",")[0] for name in EXAMPLES}
    classes = {name for name in mega_scale.__all__ if not name.startswith("Megalodon")}
    classes -= {"DecodingGraph", "MegaCache", "MegaStaticCache"}  # which 4.37.2 does not have, as it has no Megalodon
    assert kinds == classes - {"MegaPreTrainedModel"} and len(EXAMPLES) == 9


@pytest.mark.slow
def test_config(checkpoint):
    found = run("MegaConfig", checkpoint)
    assert type(found["model"]) is mega_scale.MegaModel and found["configuration"].hidden_size == 128


def test_backbone(checkpoint):
    found = run("MegaModel", checkpoint)
    assert found["last_hidden_states"].shape == (*found["inputs"].input_ids.shape, 32)
    assert found["outputs"].pooler_output.shape == (1, 32)


def test_causal_from_a_bidirectional_checkpoint_says_what_it_reinitialised(checkpoint, loading_log):
    found = run("MegaForCausalLM", checkpoint)
    # Where CI is set, transformers also logs to the root, and every line comes twice.
    model, report = found["model"], set(loading_log.text.splitlines())
    assert found["prediction_logits"].isfinite().all()
    for name in ("damping_factor", "decay_factor", "ema_expansion_matrix", "kernel_projection_matrix"):
        (line,) = [line for line in report if f"ema_gate.{name} " in line]
        assert "mega.layers.{0, 1}.mega_layer" in line and "MISMATCH" in line and "Reinit" in line
    missing = [line for line in report if "MISSING " in line]
    assert len(missing) == 1 and missing[0].startswith("lm_head.bias")
    # All the rest is the checkpoint's, and what was drawn anew has the spread of a new model.
    source = mega_scale.MegaForMaskedLM.from_pretrained(checkpoint)
    old = source.state_dict()
    shared = [name for name, tensor in model.state_dict().items() if name in old and old[name].shape == tensor.shape]
    assert len(shared) > 30 and all(torch.equal(model.state_dict()[name], old[name]) for name in shared)
    gate = model.mega.layers[1].mega_layer.ema_gate
    assert 0.1 < gate.decay_factor.std() < 0.3 and 0.7 < gate.kernel_projection_matrix.std() < 1.3
    ids = found["inputs"].input_ids
    changed = torch.cat([ids[:, :-1], torch.full_like(ids[:, -1:], 7)], dim=1)
    torch.testing.assert_close(model(changed).logits[:, :-1], model(ids).logits[:, :-1])


def test_causal_without_the_flag_names_the_mismatch(checkpoint, loading_log):
    changes = {"is_decoder": True, "bidirectional": False}
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        mega_scale.MegaForCausalLM.from_pretrained(checkpoint, **changes)
    assert "ema_gate.decay_factor" in loading_log.text


def test_masked_language_model(checkpoint):
    found = run("MegaForMaskedLM", checkpoint)  # prints ' Paris' and 0.1
    assert (found["labels"] != -100).sum() == 1


@pytest.mark.parametrize("labels", ["one label", "several labels"])
def test_sequence_classification(checkpoint, loading_log, labels):
    found = run(f"MegaForSequenceClassification, {labels}", checkpoint)
    assert found["logits"].shape == (1, 2) and found["loss"].isfinite() and found["loss"].requires_grad
    assert "classifier.out_proj.weight" in loading_log.text
    problem = found["model"].config.problem_type
    assert problem == ("multi_label_classification" if labels == "several labels" else None)


def test_multiple_choice(checkpoint):
    found = run("MegaForMultipleChoice", checkpoint)
    assert found["logits"].shape == (1, 2)
    expected = -found["logits"].log_softmax(-1)[0, 0]
    torch.testing.assert_close(found["loss"], expected)


def test_token_classification(checkpoint):
    found = run("MegaForTokenClassification", checkpoint)
    assert len(found["predicted_tokens_classes"]) == found["inputs"].input_ids.shape[1]
    assert set(found["predicted_tokens_classes"]) <= {"LABEL_0", "LABEL_1"} and found["loss"] < 0.7


def test_question_answering(checkpoint):
    found = run("MegaForQuestionAnswering", checkpoint)
    outputs = found["outputs"]
    start = -outputs.start_logits.log_softmax(-1)[0, found["target_start_index"].item()]
    end = -outputs.end_logits.log_softmax(-1)[0, found["target_end_index"].item()]
    torch.testing.assert_close(found["loss"], (start + end) / 2)


def test_a_folder_that_names_no_tokenizer_gets_the_one_of_4_37_2(tmp_path):
    size = save_vocabulary(TEXTS, tmp_path)
    mega_scale.MegaConfig(vocab_size=size).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer).__name__ == "RobertaTokenizer"
    ids = tokenizer("my dog", "is cute").input_ids
    assert tokenizer.convert_ids_to_tokens(ids)[-4:] == ["</s>", "is", "Ġcute", "</s>"] and ids[0] == 0
