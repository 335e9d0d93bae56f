"""What the heads compute: losses against their definitions, the token they read, and what they refuse."""

import pytest
import torch
from builders import make_ids, make_model
from every_class import ENCODER, HEADS, LENGTH, answers, inputs_of, labels_of, make
from torch.nn import functional

from mega_scale.model.heads import MegaClassificationHead, cross_entropy, sequence_loss, valid_token

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def sequences(**changes):
    return make("MegaForSequenceClassification", **changes)


def test_losses_are_means_over_what_counts():
    for kind in ("MegaForMaskedLM", "MegaForTokenClassification", "MegaForMultipleChoice"):
        inputs = inputs_of(kind)
        labels = labels_of(kind, inputs)["labels"]
        outputs = make(kind)(**inputs, labels=labels)
        rows = outputs.logits.flatten(0, -2).log_softmax(-1)
        terms = [-row[label] for row, label in zip(rows, labels.flatten(), strict=True) if label != -100]
        torch.testing.assert_close(outputs.loss, torch.stack(terms).mean(), **CLOSE)


@pytest.mark.parametrize("kind", HEADS)
def test_micro_batches_add_up_to_the_batch(kind):
    model, inputs = make(kind), inputs_of(kind, batch=4)
    labels = labels_of(kind, inputs)
    whole = model(**inputs, **labels).loss
    counted = labels["labels"][..., 1:] if kind == "MegaForCausalLM" else next(iter(labels.values()))
    items = (counted != -100).sum()
    for number in (items, int(items)):
        parts = [
            model(**{name: x[i : i + 1] for name, x in {**inputs, **labels}.items()}, num_items_in_batch=number).loss
            for i in range(4)
        ]
        torch.testing.assert_close(sum(parts), whole, **CLOSE)


@pytest.mark.parametrize("kind", ["MegaForCausalLM", "MegaForMaskedLM", "MegaForTokenClassification"])
@pytest.mark.parametrize("count", [None, 0, torch.tensor(0), torch.tensor(0.0)], ids=repr)
def test_labels_that_all_do_not_count_give_zero_with_a_graph(kind, count):
    model, inputs = make(kind), inputs_of(kind)
    loss = model(**inputs, labels=torch.full_like(inputs["input_ids"], -100), num_items_in_batch=count).loss
    loss.backward()
    assert loss == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert model.mega.layers[0].mega_layer.mx_proj.weight.grad is not None


def test_problem_types_and_what_is_inferred():
    logits = torch.randn(4, 3)
    classes, several, values = torch.tensor([0, 2, 1, 1]), torch.randint(0, 2, (4, 3)), torch.randn(4, 3)
    one_class = functional.cross_entropy(logits, classes)
    many = functional.binary_cross_entropy_with_logits(logits, several.float())
    square = (logits - values).square().mean()
    for labels, problem, expected in (
        (classes, None, one_class), (classes.int(), None, one_class), (classes[:, None], None, one_class),
        (several.float(), None, many), (several.bool(), None, many), (several, "multi_label_classification", many),
        (values, "regression", square), (classes, "single_label_classification", one_class),
    ):  # fmt: skip
        torch.testing.assert_close(sequence_loss(logits, labels, problem), expected)
    one = logits[:, :1]
    for labels in (values[:, 0], values[:, :1]):
        torch.testing.assert_close(sequence_loss(one, labels), (one[:, 0] - values[:, 0]).square().mean())
    integers = sequence_loss(one, classes)
    torch.testing.assert_close(integers, (one[:, 0] - classes).square().mean())


@pytest.mark.parametrize(
    ("problem", "labels"),
    [(None, torch.ones(2, 3, dtype=torch.long)), (None, torch.rand(2)), ("regression", torch.rand(2)),
     ("multi_label_classification", torch.ones(2))],
)  # fmt: skip
def test_labels_that_do_not_fit_are_refused(problem, labels):
    model = sequences(problem_type=problem)
    with pytest.raises(ValueError, match=r"labels has shape .* needs .* problem_type"):
        model(**inputs_of("MegaForSequenceClassification"), labels=labels)


def test_an_unknown_problem_is_refused():
    with pytest.raises(ValueError, match="problem_type='single_label' is unknown: choose one of regression, single_"):
        sequences(problem_type="single_label")(make_ids(2, 5), labels=torch.tensor([0, 1]))


def test_one_batch_does_not_decide_the_problem_for_the_next():
    model, inputs = sequences(), inputs_of("MegaForSequenceClassification")
    several = torch.ones(2, 3)
    first = model(**inputs, labels=several)
    second = model(**inputs, labels=torch.tensor([0, 2]))
    assert model.config.problem_type is None
    torch.testing.assert_close(first.loss, functional.binary_cross_entropy_with_logits(first.logits, several))
    torch.testing.assert_close(second.loss, functional.cross_entropy(second.logits, torch.tensor([0, 2])))


def test_losses_are_computed_in_fp32():
    logits = torch.randn(5, 7, dtype=torch.bfloat16)
    labels = torch.arange(5)
    torch.testing.assert_close(cross_entropy(logits, labels), functional.cross_entropy(logits.float(), labels))
    assert sequence_loss(logits[:, :1], labels.bfloat16()).dtype == torch.float32


def test_the_token_that_stands_for_a_sequence():
    hidden = torch.arange(12.0).view(3, 4, 1)
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]])
    assert valid_token(hidden, None)[:, 0].tolist() == [0, 4, 8]
    assert valid_token(hidden, None, last=True)[:, 0].tolist() == [3, 7, 11]
    assert valid_token(hidden, mask)[:, 0].tolist() == [0, 6, 8]
    assert valid_token(hidden, mask.bool(), last=True)[:, 0].tolist() == [2, 7, 11]


@pytest.mark.parametrize("decoder", [True, False], ids=["decoder", "encoder"])
@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "whole"])
@pytest.mark.parametrize("kind", ["MegaForSequenceClassification", "MegaForMultipleChoice"])
def test_padding_on_either_side_equals_rows_alone(kind, decoder, chunked):
    changes = {"is_decoder": decoder, "bidirectional": not decoder, "use_chunking": chunked}
    model = make(kind, **changes)
    rows = [make_ids(1, length, seed=length)[0] for length in (19, 8, 5)]
    choice = kind == "MegaForMultipleChoice"

    def scores(ids, mask=None):
        with torch.no_grad():
            given = [None if x is None else x[:, None] if choice else x for x in (ids, mask)]
            return model(input_ids=given[0], attention_mask=given[1]).logits

    expected = torch.cat([scores(row[None]) for row in rows])
    for left in (True, False):
        ids, mask = torch.ones(3, 19, dtype=torch.long), torch.zeros(3, 19)
        for i, row in enumerate(rows):
            span = slice(19 - len(row), None) if left else slice(0, len(row))
            ids[i, span], mask[i, span] = row, 1
        torch.testing.assert_close(scores(ids, mask), expected, **CLOSE)


def test_a_decoder_classifies_by_all_its_tokens():
    model = sequences(is_decoder=True, bidirectional=False)
    ids = make_ids(2, LENGTH)
    changed = ids.clone()
    changed[:, -1] = 7
    assert (model(ids).logits - model(changed).logits).abs().max() > 1e-3


def test_choices_are_independent_rows():
    model, inputs = make("MegaForMultipleChoice"), inputs_of("MegaForMultipleChoice", batch=3)
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert outputs.logits.shape == (3, 2) and outputs.hidden_states[0].shape == (6, LENGTH, 24)
    assert outputs.attentions[0].shape[0] == 6
    for i in range(3):
        for j in range(2):
            alone = {name: x[i : i + 1, j : j + 1] for name, x in inputs.items()}
            torch.testing.assert_close(model(**alone).logits[0, 0], outputs.logits[i, j], **CLOSE)
    with pytest.raises(ValueError, match="choices"):
        model(inputs["input_ids"][0])
    with pytest.raises(ValueError, match="inputs_embeds"):
        model(inputs_embeds=torch.zeros(2, LENGTH, 24))


def test_token_types_reach_every_head():
    for kind in HEADS:
        model, inputs = make(kind, add_token_type_embeddings=True), inputs_of(kind)
        types = torch.ones_like(inputs["input_ids"])
        changed = (answers(model(**inputs, token_type_ids=types)) - answers(model(**inputs))).abs().max()
        assert changed > 1e-3, kind


def answer_model():
    return make("MegaForQuestionAnswering")


def test_question_answering_ignores_positions_outside():
    model, inputs = answer_model(), inputs_of("MegaForQuestionAnswering", batch=4)
    starts, ends = torch.tensor([0, LENGTH, 3, -1]), torch.tensor([LENGTH - 1, 99, -100, 2])
    outputs = model(**inputs, start_positions=starts, end_positions=ends[:, None])
    start, end = outputs.start_logits.log_softmax(-1), outputs.end_logits.log_softmax(-1)
    expected = -(start[0, 0] + start[2, 3]) / 2, -(end[0, LENGTH - 1] + end[3, 2]) / 2
    torch.testing.assert_close(outputs.loss, sum(expected) / 2, **CLOSE)
    assert outputs.start_logits.shape == outputs.end_logits.shape == (4, LENGTH)


def test_question_answering_without_any_position_inside_is_zero_with_a_graph():
    model, inputs = answer_model(), inputs_of("MegaForQuestionAnswering")
    outside = torch.tensor([LENGTH, LENGTH + 5])
    loss = model(**inputs, start_positions=outside, end_positions=outside).loss
    loss.backward()
    assert loss == 0 and not model.qa_outputs.weight.grad.any()


def test_question_answering_refuses_what_it_cannot_mean():
    for labels in (1, 3):
        with pytest.raises(ValueError, match=f"num_labels={labels}.*set num_labels=2"):
            make("MegaForQuestionAnswering", num_labels=labels)
    with pytest.raises(ValueError, match="start_positions and end_positions"):
        answer_model()(**inputs_of("MegaForQuestionAnswering"), start_positions=torch.tensor([1, 1]))


def test_dropout_of_the_heads():
    for changes, expected in (({}, 0.3), ({"classifier_dropout": 0.0}, 0.0), ({"classifier_dropout": 0.7}, 0.7)):
        settings = {**ENCODER, "hidden_dropout_prob": 0.3, **changes}
        assert make_model(kind="MegaForSequenceClassification", **settings).classifier.dropout.p == expected
        assert make_model(kind="MegaForTokenClassification", **settings).dropout.p == expected
        assert make_model(kind="MegaForMultipleChoice", **settings).dropout.p == 0.3
    head = MegaClassificationHead(make("MegaForSequenceClassification", classifier_dropout=0.5).config)
    x = torch.randn(4, 24)
    assert not torch.equal(head.train()(x), head(x)) and torch.equal(head.eval()(x), head(x))


def test_heads_of_decoders_keep_no_cache():
    model = make("MegaForTokenClassification", is_decoder=True, bidirectional=False)
    assert "past_key_values" not in model(**inputs_of("MegaForTokenClassification"), use_cache=True)


def test_cross_attention_reaches_the_heads():
    source = torch.randn(2, 6, 24)
    settings = {"is_decoder": True, "bidirectional": False, "add_cross_attention": True}
    for kind in ("MegaForMaskedLM", "MegaForTokenClassification"):
        model, inputs = make(kind, **settings), inputs_of(kind)
        first = answers(model(**inputs, encoder_hidden_states=source))
        assert (answers(model(**inputs, encoder_hidden_states=source + 1)) - first).abs().max() > 1e-3
        mask = torch.tensor([[1, 1, 1, 0, 0, 0]] * 2)
        masked = answers(model(**inputs, encoder_hidden_states=source, encoder_attention_mask=mask))
        changed = torch.cat([source[:, :3], source[:, 3:] + 1], 1)
        same = answers(model(**inputs, encoder_hidden_states=changed, encoder_attention_mask=mask))
        torch.testing.assert_close(same, masked)


def test_shift_labels_come_before_labels():
    model, ids = make_model(), make_ids(2, 12)
    following = torch.cat([ids[:, 1:], make_ids(2, 1, seed=7)], 1)
    for more in ({}, {"num_items_in_batch": 5}, {"skip_logits": True, "num_items_in_batch": torch.tensor(5)}):
        alone = model(ids, shift_labels=following, **more)
        both = model(ids, labels=ids.flip(1), shift_labels=following, **more)
        assert torch.equal(both.loss, alone.loss) and both.past_key_values is None
    assert not torch.equal(alone.loss, model(ids, labels=ids, **more).loss)


@pytest.mark.parametrize("kind", HEADS)
def test_labels_of_another_shape_or_kind_are_refused(kind):
    model, inputs = make(kind), inputs_of(kind)
    labels = labels_of(kind, inputs)
    bad = [{k: v.float() / 2 for k, v in labels.items()}, {k: v[:1] for k, v in labels.items()}]
    bad.append({k: torch.cat([v, v], -1) for k, v in labels.items()})
    if kind == "MegaForSequenceClassification":
        bad[0] = {"labels": labels["labels"].float()}  # taken for several labels a sequence
    if next(iter(labels.values())).dim() == 2:
        bad.append({k: v.T for k, v in labels.items()})
    if kind == "MegaForCausalLM":
        bad += [{"shift_labels": labels["labels"][:, :-1]}, {"shift_labels": labels["labels"].float()}]
        bad += [labels | {"logits_to_keep": 3}, labels | {"logits_to_keep": 3, "skip_logits": True}]
    for wrong in bad:
        with pytest.raises(ValueError, match="labels"):
            model(**inputs, **wrong)
