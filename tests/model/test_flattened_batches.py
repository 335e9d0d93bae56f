"""Batches of transformers' DataCollatorWithFlattening: every document as if alone, however its start is said."""

import pytest
import torch
from builders import make_ids, make_model
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

import mega_scale

LENGTHS = (7, 11, 1, 12, 8, 1)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
BOTH_WAYS = {"is_decoder": False, "bidirectional": True}


def documents():
    return [make_ids(1, length, seed=length + 1)[0] for length in LENGTHS]


def flattened(**options):
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True, **options)
    return dict(collate([{"input_ids": document.tolist()} for document in documents()]))


SAYING = [
    ["position_ids"], ["seq_idx"], ["cu_seq_lens_q", "cu_seq_lens_k"], ["cu_seq_lens_k", "max_length_k"],
    ["position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"],
]  # fmt: skip


@pytest.mark.parametrize("saying", SAYING, ids=",".join)
@pytest.mark.parametrize("activation", ["softmax", "laplace"])
def test_every_document_as_if_alone(saying, activation):
    batch = flattened()
    more = {key: batch[key] for key in saying}
    for kind, changes in (("MegaForCausalLM", {}), ("MegaForMaskedLM", BOTH_WAYS), ("MegaModel", BOTH_WAYS)):
        model = make_model(kind=kind, use_chunking=False, attention_activation=activation, **changes)
        with torch.no_grad():
            got = model(batch["input_ids"], **more)[0][0].split(LENGTHS)
            for ours, document in zip(got, documents(), strict=True):
                torch.testing.assert_close(ours, model(document[None])[0][0], **CLOSE)
    chunked = make_model(attention_activation=activation)
    starts = batch["position_ids"] == 0
    want = chunked(batch["input_ids"], document_starts=starts).logits
    assert torch.equal(chunked(batch["input_ids"], **more).logits, want)
    assert torch.equal(chunked(batch["input_ids"], document_starts=starts, **more).logits, want)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint8", "uint16", "uint32", "uint64"])
def test_integers_of_any_width(dtype):
    model, batch = make_model(), flattened()
    keys = ("position_ids", "seq_idx", "cu_seq_lens_q")
    more = {key: batch[key].to(getattr(torch, dtype)) for key in keys}
    want = model(batch["input_ids"], position_ids=batch["position_ids"]).logits
    for given in (more, *({key: value} for key, value in more.items())):
        assert torch.equal(model(batch["input_ids"], **given).logits, want)


def test_a_batch_without_rows():
    empty = torch.zeros(0, 5, dtype=torch.long)
    ends = torch.zeros(1, dtype=torch.long)
    for given in ({"position_ids": empty}, {"seq_idx": empty}, {"cu_seq_lens_q": ends, "max_length_q": 0}):
        assert make_model()(empty, **given).logits.shape == (0, 5, 61)


def test_the_loss_is_that_of_the_documents_alone():
    model, batch = make_model(use_chunking=False), flattened()
    count = sum(LENGTHS) - len(LENGTHS)
    alone = [model(d[None], labels=d[None], num_items_in_batch=count).loss for d in documents() if len(d) > 1]
    torch.testing.assert_close(model(**batch).loss, sum(alone), **CLOSE)


def test_the_trainer_takes_the_collator(tmp_path):
    model, seen = make_model(), []
    model.register_forward_hook(lambda module, args, kwargs, out: seen.append((kwargs, out.logits)), with_kwargs=True)
    settings = TrainingArguments(
        tmp_path, per_device_train_batch_size=3, max_steps=2, report_to=[], use_cpu=True, save_strategy="no"
    )
    rows = [{"input_ids": document.tolist()} for document in documents()]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    Trainer(model, settings, train_dataset=rows, data_collator=collate).train()
    assert len(seen) == 2 and all({"position_ids", "cu_seq_lens_q"} <= kwargs.keys() for kwargs, _ in seen)


@pytest.mark.parametrize("chunked", [True, False])
def test_positions_as_generate_makes_them_change_nothing(chunked):
    model, ids = make_model(seed=3, use_chunking=chunked), make_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "attention_mask": mask}
    want = model.generate(ids, **settings)
    for fill in (0, 1):
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, fill)
        for use_cache in (True, False):
            assert torch.equal(model.generate(ids, position_ids=positions, use_cache=use_cache, **settings), want)
    plain = model(ids, position_ids=torch.arange(9)[None]).logits
    assert torch.equal(plain, model(ids).logits)


def test_a_cached_row_goes_on_with_its_document():
    model, batch = make_model(), flattened()
    ids, positions = batch["input_ids"], batch["position_ids"]
    whole = model(ids, position_ids=positions, use_cache=False).logits
    cache, got = None, []
    for part, places in zip(ids.split([9, 1, 10, 20], 1), positions.split([9, 1, 10, 20], 1), strict=True):
        out = model(part, position_ids=places, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        got.append(out.logits)
    torch.testing.assert_close(torch.cat(got, 1), whole, **CLOSE)
    with pytest.raises(ValueError, match=r"position_ids\[0, 0\] is 41"):
        model(ids[:, :2], position_ids=torch.tensor([[41, 42]]), past_key_values=cache)
    with pytest.raises(ValueError, match="seq_idx does not say"):
        model(ids[:, :2], seq_idx=torch.tensor([[0, 1]]), past_key_values=cache)


LONG = torch.arange(8)[None]
BAD = [
    ({"position_ids": LONG + 2}, r"position_ids\[0, 0\] is 2"),
    ({"position_ids": LONG.flip(1)}, r"position_ids\[0, 0\] is 7"),
    ({"position_ids": torch.tensor([[0, 1, 2, 5, 6, 7, 8, 9]])}, r"position_ids\[0, 3\] is 5"),
    ({"position_ids": torch.tensor([[2, 3, 4, 2, 3, 4, 2, 3]])}, r"position_ids\[0, 0\] is 2"),
    ({"position_ids": LONG[:, :7]}, r"position_ids is torch.int64 \(1, 7\)"),
    ({"position_ids": LONG[0]}, r"position_ids is"), ({"position_ids": LONG.float()}, r"position_ids is torch.float32"),
    ({"position_ids": LONG > 8}, "position_ids is torch.bool"),
    ({"position_ids": LONG.expand(3, -1)}, r"position_ids is"), ({"seq_idx": LONG[:, :3]}, "seq_idx is"),
    ({"position_ids": LONG % 4, "seq_idx": LONG // 2}, "seq_idx and position_ids say"),
    ({"position_ids": LONG % 4, "document_starts": torch.zeros(2, 8, dtype=torch.bool)}, "document_starts say"),
    ({"seq_idx": LONG // 4, "cu_seq_lens_q": torch.tensor([0, 8, 16])}, "cu_seq_lens_q and seq_idx say"),
    ({"cu_seq_lens_q": torch.tensor([0, 8, 16]), "cu_seq_lens_k": torch.tensor([0, 4, 8, 16])}, "cu_seq_lens_k and"),
    ({"cu_seq_lens_q": torch.tensor([0, 4, 12, 16])}, "from one row into the next"),
    ({"cu_seq_lens_q": torch.tensor([0, 8])}, "rise from 0 to the 16"),
    ({"cu_seq_lens_q": torch.tensor([0, 9, 8, 16])}, "rise"),
    ({"cu_seq_lens_q": torch.tensor([0, 9, 8, 16], dtype=torch.uint8)}, "rise"),
    ({"cu_seq_lens_q": torch.tensor([[0, 16]])}, "expected"),
    ({"cu_seq_lens_q": torch.tensor([0, 8, 16]), "max_length_q": 7}, "max_length_q=7 is less than the 8"),
    ({"max_length_k": 3}, "max_length_k=3"),
    ({"position_ids": LONG % 4, "attention_mask": torch.tensor([[0] + [1] * 7, [1] * 8])},
     r"position_ids\[0, 1\] is 1"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), BAD)
def test_what_contradicts_itself_or_means_something_else_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        make_model()(make_ids(2, 8), **given)


@pytest.mark.parametrize("kind", ["MegaForSequenceClassification", "MegaForQuestionAnswering", "MegaForMultipleChoice"])
def test_a_head_that_says_one_thing_of_a_row_refuses_several_documents(kind):
    model, ids = make_model(kind=kind, **BOTH_WAYS), make_ids(2, 8)
    one = torch.arange(8)[None]
    if kind == "MegaForMultipleChoice":
        ids, one = ids[None], one.expand(1, 2, -1)
    assert torch.equal(model(ids, position_ids=one)[0], model(ids)[0])
    with pytest.raises(ValueError, match="several documents in a row"):
        model(ids, position_ids=one % 4)
    assert isinstance(model, mega_scale.MegaPreTrainedModel)


@pytest.mark.parametrize("changes", [{"truncation": 4}, {"add_cross_attention": True}])
def test_models_that_cannot_keep_documents_apart_refuse(changes):
    encoder = {"encoder_hidden_states": torch.zeros(1, 5, 24)} if "add_cross_attention" in changes else {}
    with pytest.raises(ValueError, match=next(iter(changes))):
        make_model(**changes)(**flattened(), use_cache=False, **encoder)
