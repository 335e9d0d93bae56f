"""A run's loss on its validation sets, each by itself and all together."""

import itertools
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from mega_scale.data import validation_batches
from mega_scale.data.packing import PackedDataset
from mega_scale.data.tokenizer import text_size
from mega_scale.training.trained_model import Evaluation, combine, evaluate

if TYPE_CHECKING:
    from mega_scale.training.trainer import Trainer


def evaluate_weights(trainer: "Trainer", dataset: PackedDataset, average: bool = False) -> dict[str, Any]:
    """Report loss, perplexity, bits per byte and tokens, as the engine computes now, and return them; collective.

    Where the text has several sets, `sets` has those of each, and the others are of all together. `average` says that
    the engine computes with the average of the weights. Raises StopRun.
    """
    step, reporter = trainer.progress.step, trainer.reporter
    if not dataset.parts:
        whole = _evaluate_set(trainer, dataset)[0]._asdict()
        reporter.evaluation(step, whole, average)
        return whole
    found = {}
    for name, part in dataset.parts.items():
        found[name] = _evaluate_set(trainer, part)
        reporter.evaluation(step, found[name][0]._asdict(), average, name)
    whole = combine(found.values())._asdict()
    reporter.evaluation(step, whole, average)
    return whole | {"sets": {name: one._asdict() for name, (one, _) in found.items()}}


def _evaluate_set(trainer: "Trainer", dataset: PackedDataset) -> tuple[Evaluation, float]:
    """The evaluation on one text, and the bytes of text that it is of; collective. Raises StopRun."""
    trainer.watchdog.beat("evaluating")
    train, readers, step = trainer.config.train, trainer.readers, trainer.progress.step
    rows = train.eval_batches * train.global_batch_size or len(dataset)
    batches = validation_batches(dataset, rows, train.micro_batch_size, trainer.reader, readers)
    ratio = dataset.tokens_per_byte(rows, partial(text_size, trainer.tokenizer))
    batches_of_rank = -(-min(rows, len(dataset)) // (train.micro_batch_size * readers))
    done, began = itertools.count(1), time.monotonic()

    def after_batch() -> None:
        trainer.check_stop("evaluating")
        trainer.reporter.progress(step, "evaluating", next(done), batches_of_rank, "batches", since=began)

    engine = trainer.engine
    found = evaluate(engine.module, engine.forward, batches, ratio, trainer.world, after_batch)
    return found, found.tokens / ratio
