"""What a user of transformers expects of every model, whatever its architecture: one test an expectation."""

import pytest
import torch
from every_class import CLASSES, HEADS, answers, inputs_of, labels_of, make

KINDS = list(CLASSES)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_call_gives_the_same_answer_and_leaves_its_inputs_alone(kind):
    model, inputs = make(kind), inputs_of(kind)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    assert torch.equal(answers(model(**inputs)), answers(model(**inputs)))
    assert all(torch.equal(inputs[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_answer_in_any_batch(kind):
    model, inputs = make(kind), inputs_of(kind, batch=3)
    with torch.no_grad():
        together = answers(model(**inputs))
        for row in range(3):
            alone = answers(model(**{name: tensor[row : row + 1] for name, tensor in inputs.items()}))
            torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_and_attentions_are_one_a_layer_and_carry_gradients(kind):
    model, inputs = make(kind).train(), inputs_of(kind)
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    layers = model.config.num_hidden_layers
    assert len(outputs.hidden_states) == layers + 1 and len(outputs.attentions) == layers
    for tensor in (*outputs.hidden_states, *outputs.attentions):
        tensor.retain_grad()
    answers(outputs).square().sum().backward()
    # The last hidden state is the answer itself, or what it is computed from; attention weights reach every answer.
    for number, tensor in enumerate((*outputs.hidden_states, *outputs.attentions)):
        assert tensor.grad is not None and tensor.grad.abs().sum() > 0, number


@pytest.mark.parametrize("kind", HEADS)
def test_every_parameter_learns_and_a_batch_can_be_learned_by_heart(kind):
    torch.manual_seed(0)
    model, inputs = make(kind).train(), inputs_of(kind)
    labels = labels_of(kind, inputs)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = model(**inputs, **labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0], losses
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle, idle


@pytest.mark.parametrize("kind", KINDS)
def test_training_mode_differs_by_dropout_only(kind):
    inputs = inputs_of(kind)
    model = make(kind)
    torch.testing.assert_close(answers(model.train()(**inputs)), answers(model.eval()(**inputs)), atol=1e-6, rtol=1e-5)
    wet = make(kind, dropout_prob=0.5).train()
    assert not torch.equal(answers(wet(**inputs)), answers(wet(**inputs)))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_says_nothing(kind):
    """What stands where the mask is 0 changes no answer at the tokens that count."""
    model, inputs = make(kind), inputs_of(kind)
    other = inputs | {"input_ids": inputs["input_ids"].where(inputs["attention_mask"] == 1, 7)}
    with torch.no_grad():
        one, two = answers(model(**inputs)), answers(model(**other))
    if one.dim() == 3:
        one, two = (tensor[inputs["attention_mask"] == 1] for tensor in (one, two))
    torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)
