"""What a model is given: tokens of another shape, dtype or vocabulary are refused by name, for every class."""

import pytest
import torch
from builders import make_ids, make_model
from every_class import CLASSES, inputs_of, make

IDS = make_ids(2, 5)
WRONG = [
    ({"input_ids": IDS[0]}, r"input_ids is torch.int64 \(5,\): expected int64 \(batch, length\)"),
    ({"input_ids": IDS[None]}, r"input_ids is torch.int64 \(1, 2, 5\)"), ({"input_ids": IDS[:, :0]}, r"\(2, 0\)"),
    ({"input_ids": IDS.float()}, "input_ids is torch.float32"), ({"input_ids": IDS.short()}, "is torch.int16"),
    ({"input_ids": IDS + 60}, r"input_ids holds 1\d\d: expected 0 to 60 \(vocab_size=61\)"),
    ({"input_ids": IDS - 70}, r"input_ids holds -\d+: expected"),
    ({"inputs_embeds": torch.zeros(2, 5, 23)}, r"inputs_embeds is .*: expected \(batch, length, 24\)"),
    ({"inputs_embeds": torch.zeros(5, 24)}, r"\(5, 24\)"), ({"inputs_embeds": torch.zeros(2, 0, 24)}, "one token long"),
    ({"input_ids": IDS, "token_type_ids": IDS[:, :3]}, r"token_type_ids is .* \(2, 3\): expected int64 \(2, 5\)"),
    ({"input_ids": IDS, "token_type_ids": IDS[:, :1]}, r"token_type_ids is torch.int64 \(2, 1\)"),
    ({"input_ids": IDS, "token_type_ids": IDS % 2 + 1}, r"token_type_ids holds 2: .* \(type_vocab_size=2\)"),
    ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 5, 24)}, "exactly one"), ({}, "exactly one"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), WRONG)
def test_tokens_that_no_model_can_take_are_refused(given, message):
    model = make_model(add_token_type_embeddings=True)
    for module in (model, model.mega):
        with pytest.raises(ValueError, match=message) as error:
            module(**given)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", CLASSES)
def test_rows_without_a_token_are_refused_and_no_rows_give_none(kind):
    model = make(kind)
    given = {key: value[..., :0] for key, value in inputs_of(kind).items()}
    with pytest.raises(ValueError, match="at least one token long"):
        model(**given)
    given = {key: value[:0] for key, value in inputs_of(kind).items()}
    assert len(model(**given)[0]) == 0


def test_a_row_of_types_stands_for_all_and_int32_is_as_good():
    model = make_model(add_token_type_embeddings=True)
    types = torch.tensor([[0, 1, 1, 0, 1]])
    want = model(IDS, token_type_ids=types.expand(2, -1)).logits
    assert torch.equal(model(IDS.int(), token_type_ids=types.int()).logits, want)
