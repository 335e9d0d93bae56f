"""A trained model: opened from wherever it lies, its loss on held-out text, and texts that it continues."""

import contextlib
import itertools
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, StoppingCriteriaList

from mega_scale.checkpoint.folder import STATE, checkpoints, find_checkpoint, own_files, verify
from mega_scale.data import validation_batches
from mega_scale.data.packing import PackedDataset
from mega_scale.data.tokenizer import end_ids, prompt_ids, separator_id, text_size, vocabulary_size
from mega_scale.model import MegaConfig, causal_lm_class
from mega_scale.model.basic_layers import BasePreTrainedModel, use_own_linear
from mega_scale.model.configuration_mega import BaseConfig
from mega_scale.parallel import World, fill
from mega_scale.process import log_to_stderr

if TYPE_CHECKING:
    from mega_scale.training.trainer import Trainer

CACHES = ("dynamic", "static")
"""What a text is generated with: a `MegaCache`, or a `MegaStaticCache`, whose steps are compiled on a GPU."""

# Opening one


class Opened(NamedTuple):
    """A model whose weights are not read yet."""

    config: BaseConfig
    tensors: Mapping[str, Tensor]  # full CPU tensors by state-dict name, read when asked for
    tokenizer: PreTrainedTokenizerBase  # that lies beside it
    folder: Path  # the export, or the checkpoint, that it is


def open_model(path: Path, key: bytes | None = None, *, log: Callable[[str], None] = log_to_stderr) -> Opened:
    """Open an export or Hugging Face folder (it has config.json), or what `open_checkpoint` opens; reads no weights.

    Raises ValueError where it is none of these, is damaged, or does not fit its configuration.
    """
    if not (path / "config.json").is_file() or checkpoints(path):
        return open_checkpoint(path, key, log=log)
    from mega_scale.hub.folder import open_folder

    config, tensors = open_folder(path)
    return _fitting(Opened(config, tensors, read_tokenizer(path), path))


def open_checkpoint(
    path: Path,
    key: bytes | None = None,
    *,
    older: bool = True,
    average: bool = False,
    log: Callable[[str], None] = log_to_stderr,
) -> Opened:
    """Open the model of a checkpoint, every byte of which is verified first, or of a run's newest valid one.

    Its weights are those of the last step, or their `average`. `log` is given one line that says which checkpoint is
    taken where none that is newer can be. For `key`, `older` and errors see `find_checkpoint`.
    """
    from mega_scale.checkpoint.state import open_weights

    folder, notes = find_checkpoint(path, key, older=older, proof=verify)
    if notes:
        log(f"{folder} is taken: {'; '.join(notes)}")
    tensors = open_weights(folder / STATE, average)
    return _fitting(Opened(read_model(folder), tensors, read_own_tokenizer(folder), folder))


def _fitting(opened: Opened) -> Opened:
    """Refuse a tokenizer that is not the model's."""
    if (size := vocabulary_size(opened.tokenizer)) > opened.config.vocab_size:
        raise ValueError(
            f"{opened.folder} has a tokenizer of {size} ids, but a model of vocab_size={opened.config.vocab_size}: "
            "save there the tokenizer that the model was trained with"
        )
    return opened


def read_model(folder: Path) -> BaseConfig:
    """Configuration of a verified checkpoint's model, from its own files. Raises ValueError where they have none."""
    from mega_scale.hub.folder import read_config

    with _own_model(folder) as described:
        try:
            return read_config(described)
        except Exception as error:  # of any kind, for a file that describes no model
            named = folder / "model"
            raise ValueError(f"{named} describes no model ({_reason(error)}): choose another checkpoint") from None


def read_own_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Tokenizer of a verified checkpoint, from its own files. Raises ValueError where none can be loaded."""
    with _own_model(folder) as described:
        return read_tokenizer(described)


@contextlib.contextmanager
def _own_model(folder: Path) -> Iterator[Path]:
    """`model` in a verified checkpoint, or a copy without what is none of it: loaders take whatever they find."""
    found = {path.relative_to(folder).as_posix() for path in (folder / "model").rglob("*") if not path.is_dir()}
    names = {name for name in own_files(folder) if name.startswith("model/")}
    if found == names:
        yield folder / "model"
        return
    with tempfile.TemporaryDirectory() as copy:
        for name in names:
            target = Path(copy) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, target)
        yield Path(copy) / "model"


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder; code in it is not run. Raises ValueError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # every format has errors of its own
        raise ValueError(f"{folder} has no tokenizer ({_reason(error)}): save one there") from None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def load_model(
    path: Path,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    key: bytes | None = None,
    log: Callable[[str], None] = log_to_stderr,
) -> tuple[BasePreTrainedModel, PreTrainedTokenizerBase, Path]:
    """Load a model, see `open_model`, in eval mode on one device, one tensor at a time, with tokenizer and folder.

    Weights have the `dtype`, but those of the moving average stay fp32.
    """
    config, tensors, tokenizer, folder = open_model(path, key, log=log)
    with torch.device("meta"):
        model = causal_lm_class(config)(config)
    use_own_linear(model)

    def value(name: str, owner: nn.Module, local_name: str) -> Tensor:
        exact = any(part in name for part in model.fp32_modules)
        return tensors[name].to(torch.float32 if exact else dtype)

    fill(model, value, lambda old, tensor: nn.Parameter(tensor.to(device)), device)
    return model.eval(), tokenizer, folder


# Its loss


class Evaluation(NamedTuple):
    """How well a model predicts a text."""

    loss: float  # nats per token
    perplexity: float  # exp of the loss
    bits_per_byte: float  # of the text
    tokens: int  # predicted


def combine(found: Iterable[tuple[Evaluation, float]]) -> Evaluation:
    """The evaluation of several texts together, from that of each and how many bytes it was of."""
    evaluations, sizes = zip(*found, strict=True)
    nats, tokens = sum(one.loss * one.tokens for one in evaluations), sum(one.tokens for one in evaluations)
    bits_per_byte = nats / sum(sizes) / math.log(2) if sum(sizes) else 0.0
    return Evaluation(nats / tokens, math.exp(min(nats / tokens, 700.0)), bits_per_byte, tokens)


@torch.no_grad()
def evaluate(
    module: nn.Module,
    share: Callable[..., Tensor],
    batches: Iterable[dict[str, Tensor]],
    tokens_per_byte: float,
    world: World,
    every_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Evaluate a model; collective, every rank has as many batches. The figures are the same on all ranks.

    `share` computes this rank's share of the loss: `Engine.forward`, or `loss_of` of the model. This rank's `batches`
    hold `input_ids` and `shift_labels` (B, L) int64, -100 where none counts, and perhaps `document_starts` (B, L) bool;
    `tokens_per_byte` is of their text. `every_batch` is called after each of them; what it raises, on all ranks alike,
    ends the evaluation. Raises ValueError where the text has no token to predict.
    """
    was_training = module.training
    module.eval()
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    counted = torch.zeros((), dtype=torch.int64, device=world.device)
    try:
        for batch in batches:
            given = {name: tensor.to(world.device) for name, tensor in batch.items()}
            labels = given["shift_labels"]
            total += share(given["input_ids"], labels, 1, document_starts=given.get("document_starts")).double()
            counted += (labels != -100).sum()
            every_batch()
    finally:
        module.train(was_training)
    nats = world.number(world.sum(total, alike=("tp",)))
    tokens = int(world.number(world.sum(counted, alike=("sp", "tp"))))
    if tokens == 0:
        raise ValueError("the text has no token to predict: give a longer one, or a shorter data.sequence_length")
    loss = nats / tokens
    return Evaluation(loss, math.exp(min(loss, 700.0)), loss * tokens_per_byte / math.log(2), tokens)


def evaluate_run(trainer: "Trainer", dataset: PackedDataset) -> dict[str, Any]:
    """Evaluate the weights of a run and, where it has one, their average, as `average`; collective. Raises StopRun."""
    found = evaluate_weights(trainer, dataset)
    if trainer.engine.averages:
        trainer.saver.wait_copied()  # the average takes the weights' place
        with trainer.engine.averaged():
            found["average"] = evaluate_weights(trainer, dataset, average=True)
    return found


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


# Its texts


def check_sample(config: BaseConfig, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int) -> None:
    """Refuse (ValueError) a prompt that the tokenizer cannot read, or a text that leaves the model's positions."""
    length = len(prompt_ids(tokenizer, prompt)) + max_new_tokens
    if not isinstance(config, MegaConfig):
        return
    if config.relative_positional_bias == "simple" and not config.use_chunking and length - 1 > config.max_positions:
        raise ValueError(
            f"a prompt of {length - max_new_tokens} tokens and {max_new_tokens} more are beyond max_positions="
            f"{config.max_positions}, the reach of relative_positional_bias='simple' without chunks: generate fewer"
        )


@torch.no_grad()
def generate_text(
    module: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop_at_eos: bool = False,
    cache: str = CACHES[0],
    every_token: Callable[[], None] = lambda: None,
) -> str:
    """Continue a text, from a document's start; an empty one begins a document. Returns it with what follows.

    Collective when the model is sharded, and the same on all ranks. Leaves the random state as it found it, so that
    training does not depend on samples. A `temperature` of 0 takes the likeliest token; `top_p` is the share of
    probability to sample from. A static `cache` is for a model that is not sharded. `every_token` is called after each
    generated token; what it raises, on all ranks alike, ends the generation.
    """
    device = next(module.parameters()).device
    end = end_ids(tokenizer, module.config.eos_token_id)  # type: ignore[union-attr,arg-type]
    input_ids = torch.tensor([prompt_ids(tokenizer, prompt)], device=device)
    options = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    was_training = module.training

    def after_token(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        every_token()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)  # ends no row

    module.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            output = module.generate(  # type: ignore[operator]
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=max_new_tokens,
                eos_token_id=end if stop_at_eos else None,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else separator_id(tokenizer),
                use_cache=getattr(module.config, "truncation", None) is None,  # a truncated average has no state
                stopping_criteria=StoppingCriteriaList([after_token]),
                cache_implementation=None if cache == CACHES[0] else cache,
                **(options if temperature > 0 else {"do_sample": False}),
            )
    finally:
        module.train(was_training)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def generate_sample(trainer: "Trainer") -> str:
    """The text of `train.sample_prompt` and what the run's model makes of it now; collective. Raises StopRun."""
    train = trainer.config.train
    return generate_text(
        trainer.engine.module,
        trainer.tokenizer,
        train.sample_prompt,
        max_new_tokens=train.sample_tokens,
        seed=train.seed + trainer.progress.step,
        every_token=partial(trainer.check_stop, "generating text"),
    )
