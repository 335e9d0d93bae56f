"""The Trainer of transformers with Mega models: training, saving, resuming, evaluation, accumulation."""

import numpy as np
import pytest
import torch
from builders import make_ids, make_model
from transformers import Trainer, TrainingArguments
from transformers.models.auto import modeling_auto

import mega_scale

PROBABILITIES = ("dropout_prob", "hidden_dropout_prob", "attention_probs_dropout_prob", "nffn_activation_dropout_prob")
ENCODER = {"is_decoder": False, "bidirectional": True}


def language(count=16, seed=0):
    """Rows of one length whose tokens repeat with a period, so that they can be learned."""
    ids = make_ids(count, 4, seed=seed).repeat(1, 6)
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def uneven(count=8):
    """Rows that count 3 to 23 labels."""
    rows = language(count)
    for i, row in enumerate(rows):
        row["labels"][i * 20 // (count - 1) + 4 :] = -100
    return rows


def arguments(folder, **changes):
    settings = {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "max_steps": 20, "learning_rate": 1e-2,
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "logging_steps": 1, "save_strategy": "no",
        "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    return TrainingArguments(**{**settings, **changes})


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trains_saves_and_loads(tmp_path):
    model = make_model(spread=0.05)
    trainer = Trainer(model, arguments(tmp_path, max_steps=60), train_dataset=language(), eval_dataset=language(8))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < 0.8 * before and losses(trainer)[-1] < losses(trainer)[0]
    trainer.save_model()
    loaded = mega_scale.MegaForCausalLM.from_pretrained(tmp_path).eval()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_resumes_where_it_ended(tmp_path, checkpointing):
    def run(folder, resume=None, **changes):
        model = make_model(spread=0.05, **dict.fromkeys(PROBABILITIES, 0.1))
        settings = {"save_strategy": "steps", "save_steps": 6, "max_steps": 12, **changes}
        settings["gradient_checkpointing"] = checkpointing
        trainer = Trainer(model, arguments(folder, **settings), train_dataset=language())
        trainer.train(resume_from_checkpoint=resume)
        return model, losses(trainer)

    whole, log = run(tmp_path / "whole")
    again, resumed = run(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-6"))
    assert resumed == log
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_accumulated_loss_equals_that_of_one_large_batch(tmp_path):
    results = []
    for size, accumulation in ((8, 1), (2, 4), (1, 8)):
        model = make_model(spread=0.05, **dict.fromkeys(PROBABILITIES, 0.0))
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 3}
        settings |= {"train_sampling_strategy": "sequential", "optim": "sgd"}
        trainer = Trainer(model, arguments(tmp_path, **settings), train_dataset=uneven())
        trainer.train()
        results.append((losses(trainer), model.state_dict()))
    first = make_model(spread=0.05)(**{key: torch.stack([row[key] for row in uneven()]) for key in uneven()[0]})
    assert results[0][0][0] == pytest.approx(first.loss.item(), abs=1e-5)
    for log, state in results[1:]:
        assert log == pytest.approx(results[0][0], abs=1e-5)
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, results[0][1][name], atol=1e-6, rtol=1e-5, msg=name)


def test_classifies_with_metrics_on_padded_batches(tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "input_ids": [10 + label] * 2 + torch.randint(20, 60, (length,), generator=generator).tolist(),
            "labels": label,
        }
        for label in (0, 1, 2)
        for length in range(3, 15)
    ]

    def collate(batch):
        width = max(len(row["input_ids"]) for row in batch)
        ids = torch.tensor([row["input_ids"] + [1] * (width - len(row["input_ids"])) for row in batch])
        return {"input_ids": ids, "attention_mask": ids != 1, "labels": torch.tensor([row["labels"] for row in batch])}

    def accuracy(prediction):
        logits, labels = prediction
        assert logits.shape == (36, 3)
        return {"accuracy": float((np.argmax(logits, -1) == labels).mean())}

    model = make_model(kind="MegaForSequenceClassification", num_labels=3, spread=0.05, **ENCODER)
    settings = arguments(tmp_path, max_steps=30)
    trainer = Trainer(
        model, settings, train_dataset=rows, eval_dataset=rows, data_collator=collate, compute_metrics=accuracy
    )
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] > 0.9


def test_evaluation_returns_logits_and_no_cache(tmp_path):
    model = make_model()
    rows = [{"input_ids": row["input_ids"]} for row in language(8)]
    prediction = Trainer(model, arguments(tmp_path)).predict(rows)
    assert isinstance(prediction.predictions, np.ndarray) and prediction.predictions.shape == (8, 24, 61)
    with torch.no_grad():
        want = model(torch.stack([row["input_ids"] for row in rows])).logits
    np.testing.assert_allclose(prediction.predictions, want.numpy(), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["MegaForMaskedLM", "MegaForTokenClassification", "MegaForQuestionAnswering"])
def test_trains_the_other_heads(tmp_path, kind):
    model = make_model(kind=kind, spread=0.05, num_labels=2, **ENCODER)
    rows = language()
    for row in rows:
        ids = row["input_ids"]
        if kind == "MegaForTokenClassification":
            row["labels"] = ids % 2
        elif kind == "MegaForMaskedLM":
            row["input_ids"] = ids.masked_fill(torch.arange(24) % 7 == 0, 2)
        elif kind == "MegaForQuestionAnswering":
            del row["labels"]
            row["start_positions"] = row["end_positions"] = int((ids == ids.max()).nonzero()[0])
    trainer = Trainer(model, arguments(tmp_path, max_steps=40), train_dataset=rows)
    trainer.train()
    assert sum(losses(trainer)[-4:]) < 0.8 * sum(losses(trainer)[:4])


def smoothed(logits, labels, epsilon):
    """Loss of the next token with labels smoothed over the vocabulary, by its definition."""
    logs = logits[:, :-1].log_softmax(-1)
    target = torch.full_like(logs, epsilon / logs.shape[-1])
    target.scatter_add_(2, labels[:, 1:, None].clamp(min=0), torch.full_like(logs[..., :1], 1 - epsilon))
    return -((target * logs).sum(-1) * (labels[:, 1:] != -100)).sum() / (labels[:, 1:] != -100).sum()


@pytest.mark.parametrize("derived", [False, True])
def test_label_smoothing_predicts_the_next_token(tmp_path, derived):
    rows = uneven()
    model = make_model(spread=0.05, **dict.fromkeys(PROBABILITIES, 0.0))
    if derived:  # as FSDP2 does
        model.__class__ = type("FSDPMegaForCausalLM", (type(model),), {})
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    with torch.no_grad():
        expected, before = smoothed(model(batch["input_ids"]).logits, batch["labels"], 0.2), model(**batch).loss
    settings = arguments(tmp_path, max_steps=30, per_device_train_batch_size=8, label_smoothing_factor=0.2)
    trainer = Trainer(model, settings, train_dataset=rows)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected.item(), abs=1e-4)
    assert model.eval()(**batch).loss < 0.8 * before


def test_a_loss_of_ones_own_gets_the_tokens_of_the_whole_batch(tmp_path):
    seen = []

    def loss(outputs, labels, num_items_in_batch):
        seen.append(int(num_items_in_batch))
        logs = outputs.logits[:, :-1].log_softmax(-1).gather(2, labels[:, 1:, None].clamp(min=0))[..., 0]
        return -(logs * (labels[:, 1:] != -100)).sum() / num_items_in_batch

    found = []
    for own in (loss, None):
        model = make_model(spread=0.05, **dict.fromkeys(PROBABILITIES, 0.0))
        settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 3}
        settings |= {"train_sampling_strategy": "sequential", "average_tokens_across_devices": True}
        trainer = Trainer(model, arguments(tmp_path, **settings), train_dataset=uneven(), compute_loss_func=own)
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    assert set(seen) == {sum(int((row["labels"][1:] != -100).sum()) for row in uneven())}


def test_every_class_is_named_where_transformers_looks():
    """A class that an Auto class gives is in the table of names beside it."""
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None) if name.startswith("AutoModel") else None
        if mapping is not None and mega_scale.MegaConfig in mapping:
            assert mapping._model_mapping["mega"] == mapping[mega_scale.MegaConfig].__name__, name
    assert modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["mega"] == "MegaForCausalLM"
