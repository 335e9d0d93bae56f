"""The original Megalodon checkpoints and ours: one table of names that runs both ways, and folders of shards.

The original (github.com/XuezheMax/megalodon at cff8ba5) writes `config.json`, `consolidate_config.json` and one pickled
state dict a model-parallel rank: `consolidated.pth`, or `consolidated.00.pth` and so on.
"""

import itertools
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mega_scale.files import check_destination, reason, write_folder, write_json
from mega_scale.hub.export import DTYPES, write_export, write_tokenizer
from mega_scale.hub.folder import LazyTensors, StateDictSpec, named_tensors, read_pickle, state_dict_spec
from mega_scale.model import MegalodonConfig

CONFIG, CONSOLIDATED, TOKENIZER = "config.json", "consolidate_config.json", "tokenizer"
_SHARD = re.compile(r"consolidated(\.\d+)?\.pth")
# Parts of names that wrappers put between those of modules: FSDP of fairscale and torch, checkpointing, compiling, DDP.
_WRAPPERS = {"_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_orig_mod", "module"}

# Tensors of a block, under the same names here, by the dimension along which ranks share them; none: each has all.
_BLOCK: dict[str, int | None] = {
    **{f"mega.timenorm.{name}": 0 for name in ("weight", "bias")},
    **{f"mega.cema.{name}": 0 for name in ("alpha", "delta", "theta", "gamma", "omega")},
    "mega.rmsnorm.weight": None,
    **{f"mega.{linear}.{name}": 0 for linear in ("wv", "wr", "wz", "wh1") for name in ("weight", "bias")},
    "mega.wh2.weight": 1,
    "mega.gamma": 1,
    "mega.beta": 1,
    "nffn.norm.weight": None,
    "nffn.norm.bias": None,
    "nffn.fc1.weight": 0,
    "nffn.fc2.weight": 1,
    "nffn.fc3.weight": 0,
    "nffn.alpha": None,
}
_EMBEDDING, _FREQUENCIES = "embed.weight", "rope.freqs"
# Buffers of every timestep norm: what it counts before the first token. The original's model always has zeros.
_PRIORS: dict[str, int | None] = {"prior_count": None, "prior_mean": 0, "prior_logv": 0}

# Field of MegalodonConfig to the original's field, and the original's default.
_FIELDS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", -1),
    "hidden_size": ("model_dim", 1024),
    "num_hidden_layers": ("num_layers", 8),
    "num_attention_heads": ("num_heads", 1),
    "shared_representation_size": ("z_dim", 256),
    "intermediate_size": ("value_dim", 2048),
    "nffn_hidden_size": ("ffn_hidden_dim", 2048),
    "ema_projection_size": ("cema_ndim", 16),
    "chunk_size": ("chunk_size", 2048),
    "timestep_norm_groups": ("norm_num_groups", 32),
    "norm_affine": ("norm_affine", True),
    "norm_eps": ("norm_eps", 1e-5),
    "rope_base": ("rope_base", None),
    "swiglu": ("swiglu", False),
    "rescale_nffn": ("rescale_nffn", False),
    "scale_embeddings": ("scale_emb", False),
    "tie_word_embeddings": ("share_emb", False),
    "dropout_prob": ("dropout", 0.0),
    "hidden_dropout_prob": ("hidden_dropout", 0.0),
    "attention_probs_dropout_prob": ("attention_dropout", 0.0),
    "init_mode": ("init_mode", "he"),
}
_ROPE_BASE = 10000.0  # where the original's rope_base is null
# Fields of the original that change no result: kernels, recomputation, how the loss is computed.
_WITHOUT_EFFECT = ("efficient_attn", "layerwise_ckpt", "custom_bwd", "loss_parallel")
# Widths that model-parallel ranks share; the original needs whole heads and whole groups a rank.
_SHARED = (
    "hidden_size",
    "timestep_norm_groups",
    "num_attention_heads",
    "shared_representation_size",
    "intermediate_size",
    "nffn_hidden_size",
)


class Place(NamedTuple):
    """Where a tensor of the original is here."""

    name: str  # in the state dict of MegalodonForCausalLM
    cut: int | None  # dimension along which model-parallel ranks share it; none: each rank has all of it


def name_table(blocks: int) -> dict[str, Place]:
    """Every parameter that an original model of so many blocks can have, to its place here; one to one."""
    table = {"embed.weight": Place("megalodon.embed.weight", 1)}
    for i in range(blocks):
        table |= {f"layers.{i}.{name}": Place(f"megalodon.layers.{i}.{name}", cut) for name, cut in _BLOCK.items()}
    table |= {f"output.final_norm.{name}": Place(f"megalodon.final_norm.{name}", 0) for name in ("weight", "bias")}
    return table | {"output.output.weight": Place("lm_head.weight", 1)}


# Configurations


def config_from_original(values: Mapping[str, Any], vocabulary: int) -> MegalodonConfig:
    """The configuration of the original's fields; absent ones have its defaults.

    `vocabulary` is the number of rows of the embedding, which counts where vocab_size is -1. Raises ValueError for
    a field that is unknown, out of range, or describes a model that there is none of here.
    """
    known = {theirs for theirs, _ in _FIELDS.values()} | {"output_size", *_WITHOUT_EFFECT}
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"the original's configuration has unknown fields ({', '.join(unknown)}): Megalodon has none")
    found = {ours: values.get(theirs, default) for ours, (theirs, default) in _FIELDS.items()}
    if found["vocab_size"] == -1:
        found["vocab_size"] = vocabulary
    if found["rope_base"] is None:
        found["rope_base"] = _ROPE_BASE
    if (size := values.get("output_size", -1)) not in (-1, found["vocab_size"]):
        raise ValueError(
            f"output_size={size!r} is a head of another width than vocab_size={found['vocab_size']}, which no model "
            "here has: convert a language model"
        )
    try:
        return MegalodonConfig(**found)
    except StrictDataclassError as error:
        # The strict dataclass wraps what its validators raise.
        raise ValueError(f"the original's configuration: {error.__cause__ or error}") from None


def config_to_original(config: MegalodonConfig) -> dict[str, Any]:
    """The original's fields of a configuration: the reverse of `config_from_original`. Ids of tokens have no field."""
    found = {theirs: getattr(config, ours) for ours, (theirs, _) in _FIELDS.items()}
    return found | {"output_size": -1, "efficient_attn": None, "layerwise_ckpt": False}


# Weights


def original_to_megalodon(shards: Mapping[str, Mapping[str, Tensor]], config: MegalodonConfig) -> LazyTensors:
    """Join the original's state dicts, one a model-parallel rank in order, by the names that messages give them.

    Returns tensors by the names of MegalodonForCausalLM's state dict, tied ones included, joined when they are looked
    up. Buffers are left out: rotary frequencies (see `frequencies_rounded`) and priors of zero.

    Raises ValueError, with all names, for a missing, unexpected or mis-shaped one; for shards that are the same or
    disagree about what each has whole, tied weights that differ, and priors other than zero.
    """
    spec, table = _spec(config, len(shards)), name_table(config.num_hidden_layers)
    clean = {label: _without_wrappers(label, state) for label, state in shards.items()}
    for label, state in clean.items():
        problem = f"{label} does not fit the configuration"
        spec.require({name: tensor.shape for name, tensor in state.items()}, problem)
        kinds = {
            name: (tensor.is_floating_point(), spec.tensors[name].is_floating_point()) for name, tensor in state.items()
        }
        if wrong := [f"{name} is {state[name].dtype}" for name, (found, needed) in kinds.items() if found != needed]:
            raise ValueError(f"{problem}: {', '.join(wrong)}")
        for name, owner in spec.unequal_ties(state):
            raise ValueError(f"{label}: share_emb is true, but {name} and {owner} differ: set it to false")
        if priors := [name for name in state if name in spec.buffers and name != _FREQUENCIES and state[name].any()]:
            raise ValueError(
                f"{label}: {', '.join(priors)} are not zero: a timestep norm with a prior is not the original's model"
            )
    cut = {name for name, place in table.items() if place.cut is not None}
    cut |= {name for name, (_, dimension) in _buffers(config).items() if dimension is not None}
    _check_ranks(clean, spec, cut)
    states = list(clean.values())
    joined = {
        place.name: partial(_join, [state[name] for state in states], place.cut)
        for name, place in table.items()
        if name in states[0]
    }
    return LazyTensors(state_dict_spec(config).complete(joined))


def megalodon_to_original(
    tensors: Mapping[str, Tensor], config: MegalodonConfig, *, shards: int = 1, dtype: str = "fp32"
) -> Iterator[dict[str, Tensor]]:
    """Convert a model's state dict to the original's, one a model-parallel rank: the reverse of the above.

    Every tensor, which is read once a shard, is "fp32" or "bf16". Of tied names one is enough. Raises ValueError, when
    the first is asked for, where the tensors do not fit, or the ranks cannot share a width of the configuration.
    """
    check_shards(config, shards)
    ours, spec = state_dict_spec(config), _spec(config, shards)
    # Only names: a mapping reads a tensor when it is looked up.
    shapes = {name: ours.tensors[name].shape if name in ours.tensors else () for name in tensors}
    ours.require(shapes, "the tensors do not fit the configuration")
    source_of = ours.complete({name: name for name in tensors})
    table = name_table(config.num_hidden_layers)
    for rank in range(shards):
        state: dict[str, Tensor] = {}
        for name, expected in spec.tensors.items():
            if name in spec.ties:
                state[name] = state[spec.ties[name]]
            elif name == _FREQUENCIES:
                state[name] = rotary_frequencies(config).to(DTYPES[dtype])
            elif name in spec.buffers:
                state[name] = torch.zeros(expected.shape, dtype=DTYPES[dtype] if expected.ndim else expected.dtype)
            else:
                place = table[name]
                whole, shape = tensors[source_of[place.name]], ours.tensors[place.name].shape
                if whole.shape != shape:
                    raise ValueError(f"{place.name} is {tuple(whole.shape)}, expected {tuple(shape)}")
                part = whole if place.cut is None else whole.chunk(shards, place.cut)[rank]
                # A copy: a pickle would hold all of a storage of which this is a part.
                state[name] = part.detach().to("cpu", DTYPES[dtype], copy=True).contiguous()
        yield state


def check_shards(config: MegalodonConfig, shards: int) -> None:
    """Refuse, by name, a width of the configuration that so many model-parallel ranks cannot share."""
    if shards < 1:
        raise ValueError(f"{shards} model-parallel shards: there has to be at least 1")
    if odd := [f"{name}={getattr(config, name)}" for name in _SHARED if getattr(config, name) % shards]:
        raise ValueError(f"{shards} model-parallel shards cannot share {', '.join(odd)}: choose a divisor")


def _spec(config: MegalodonConfig, shards: int) -> StateDictSpec:
    """Names and shapes of one shard of the original."""
    check_shards(config, shards)
    ours, buffers = state_dict_spec(config).tensors, _buffers(config)
    places = name_table(config.num_hidden_layers).items()
    whole = {name: (ours[place.name].shape, place.cut) for name, place in places if place.name in ours} | buffers
    tensors = {}
    for name, (shape, cut) in whole.items():
        part = [size // shards if dimension == cut else size for dimension, size in enumerate(shape)]
        kind = torch.int64 if name.endswith("prior_count") else torch.float32
        tensors[name] = torch.empty(part, dtype=kind, device="meta")
    ties = {"output.output.weight": "embed.weight"} if config.tie_word_embeddings else {}
    return StateDictSpec(tensors, ties, frozenset(buffers))


def _buffers(config: MegalodonConfig) -> dict[str, tuple[Sequence[int], int | None]]:
    """Shape and cut dimension of the original's buffers, none of which there is here."""
    head = config.shared_representation_size // config.num_attention_heads
    norms = [*(f"layers.{i}.mega.timenorm" for i in range(config.num_hidden_layers)), "output.final_norm"]
    priors = {f"{norm}.{name}": cut for norm in norms for name, cut in _PRIORS.items()}
    groups = [config.timestep_norm_groups]
    return {_FREQUENCIES: ([head // 2], None)} | {
        name: ([] if cut is None else groups, cut) for name, cut in priors.items()
    }


def _without_wrappers(label: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without what wrappers of modules put into names."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        bare = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if bare in found:
            raise ValueError(f"{label} holds {bare} twice, as {name} too: keep one of them")
        found[bare] = tensor
    return found


def _check_ranks(shards: Mapping[str, Mapping[str, Tensor]], spec: StateDictSpec, cut: Collection[str]) -> None:
    """Refuse shards that are one rank's twice, or that disagree about what each has whole: all that is not `cut`."""
    for (first, a), (second, b) in itertools.combinations(shards.items(), 2):
        if kinds := [name for name in a if name in b and a[name].dtype != b[name].dtype]:
            raise ValueError(f"{first} and {second} differ in the dtype of {', '.join(kinds)}: convert either")
        both = [name for name in cut if name in a and name in b and name not in spec.buffers]
        # Constant tensors are the same in all shards of a new model: biases, say.
        if all(torch.equal(a[name], b[name]) for name in both) and any(_varies(a[name]) for name in both):
            raise ValueError(f"{first} and {second} hold the same shard: put each rank's own file there")
        if differ := [name for name in a if name not in cut and name in b and not torch.equal(a[name], b[name])]:
            raise ValueError(f"{first} and {second} differ in {', '.join(differ)}, which every rank has whole")


def _varies(tensor: Tensor) -> bool:
    return bool((tensor != tensor.flatten()[0]).any())


def _join(parts: Sequence[Tensor], cut: int | None) -> Tensor:
    return parts[0] if cut is None or len(parts) == 1 else torch.cat(list(parts), cut)


def rotary_frequencies(config: MegalodonConfig) -> Tensor:
    """The original's `rope.freqs`, base^(-2j / dh) rounded as it rounds: fp32 (dh / 2,), in radians a token."""
    width = config.shared_representation_size // config.num_attention_heads
    return torch.tensor([config.rope_base ** (j / width) for j in range(0, width, 2)]).reciprocal()


def frequencies_rounded(found: Tensor, config: MegalodonConfig) -> str | None:
    """Name of the dtype, bf16 or fp16, to which an original's `rope.freqs` are rounded; none where they are exact.

    Raises ValueError where they are the frequencies of no such model.
    """
    width = config.shared_representation_size // config.num_attention_heads
    exact = config.rope_base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    found = found.double()
    error = ((found - exact) / exact).abs().max().item()
    if error < 2**-21:  # a few roundings of fp32
        return None
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        # To within the last bit, as both ways to round from fp32 take the same numbers.
        if torch.equal(found, found.to(dtype).double()) and error <= torch.finfo(dtype).eps:
            return name
    raise ValueError(
        f"{_FREQUENCIES} is {found.tolist()[:4]}..., but rope_base={config.rope_base} with heads of {width} channels "
        f"turns by {exact.tolist()[:4]}...: the configuration is not this checkpoint's"
    )


# Folders


class Original(NamedTuple):
    """An original checkpoint whose weights are not read yet."""

    config: MegalodonConfig
    tensors: LazyTensors  # by the names of MegalodonForCausalLM's state dict
    note: str | None  # why logits may differ a little from those that its training saw


def open_original(path: str | os.PathLike[str]) -> Original:
    """Open a folder of the original, of any number of model-parallel shards, mapped into memory, running no code.

    Raises ValueError, naming file and tensors, where files are missing, cannot be read, or do not fit.
    """
    folder = Path(path)
    values = _read_json(folder / CONFIG).get("model")
    if not isinstance(values, dict):
        raise ValueError(f"{folder / CONFIG} has no 'model': expected the configuration that the original saves")
    count = _read_json(folder / CONSOLIDATED).get("model_parallel_size")
    if type(count) is not int or count < 1:
        raise ValueError(f"{folder / CONSOLIDATED} has model_parallel_size={count!r}: expected a number of shards")
    files = {name: named_tensors(folder / name, read_pickle(folder / name)) for name in _shard_files(folder, count)}
    shards = {name: _without_wrappers(name, state) for name, state in files.items()}
    first = next(iter(shards.values()))
    rows = len(first[_EMBEDDING]) if _EMBEDDING in first and first[_EMBEDDING].ndim else -1
    config = config_from_original(values, rows)
    tensors = original_to_megalodon(shards, config)
    rounded = frequencies_rounded(first[_FREQUENCIES], config)
    note = rounded and (
        f"its rotary frequencies are rounded to {rounded}: it was trained to turn by these, and with parameters of "
        f"averages and norms rounded alike; angles here differ by up to {_angle(first, config):.2g} rad from its own"
    )
    return Original(config, tensors, note)


def _angle(state: Mapping[str, Tensor], config: MegalodonConfig) -> float:
    """Largest difference, at the end of a chunk, of angles by a state's frequencies and by exact ones, in radians."""
    difference = state[_FREQUENCIES].float() - rotary_frequencies(config)
    return difference.abs().max().item() * (config.chunk_size - 1)


def _shard_files(folder: Path, count: int) -> list[str]:
    """Names of a folder's shards in order. Raises ValueError where they are not `count`, numbered from 0."""
    expected = shard_names(count)
    found = sorted(path.name for path in folder.iterdir() if _SHARD.fullmatch(path.name))
    if found != expected:
        raise ValueError(
            f"{folder} holds {', '.join(found) or 'no consolidated*.pth'}, but {CONSOLIDATED} has "
            f"model_parallel_size={count}: expected {', '.join(expected)}"
        )
    return expected


def shard_names(count: int) -> list[str]:
    """Names of the files of so many model-parallel ranks."""
    return ["consolidated.pth"] if count == 1 else [f"consolidated.{rank:02d}.pth" for rank in range(count)]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        what = f"holds no {path.name}" if path.parent.is_dir() else "is not a folder"
        raise ValueError(f"{path.parent} {what}: name a consolidated checkpoint of the original Megalodon")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, not named values")
    return content


def import_original(
    source: Path, out: Path, tokenizer: str | None = None, *, dtype: str = "fp32", overwrite: bool = False
) -> str | None:
    """Write an original checkpoint as a Hugging Face folder `out`; returns a note, see `Original`.

    `tokenizer` is a folder or name; without one, the folder that `write_original` puts beside the weights is read. For
    `dtype` see `write_export`. Raises ValueError where the checkpoint is refused, or the destination is taken.
    """
    check_destination(out, overwrite=overwrite)
    if out.resolve() == source.resolve():
        raise ValueError(f"{out} is the checkpoint that is read: choose another folder")
    words = _read_tokenizer(source, tokenizer)
    config, tensors, note = open_original(source)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, getattr(words, name))
    card = (
        f"# {out.resolve().name}\n\nA Megalodon model (arXiv 2404.08801), converted from the original code's files.\n"
    )
    card += f"\nNote: {note}.\n" if note else ""
    write_export(out, tensors, config, words, card, dtype=dtype, overwrite=overwrite)
    return note


def _read_tokenizer(source: Path, name: str | None) -> PreTrainedTokenizerBase:
    beside = source / TOKENIZER
    if name is None and not beside.is_dir():
        raise ValueError(f"{source} has no folder {TOKENIZER}: give --tokenizer, a Hugging Face folder or name")
    try:
        return AutoTokenizer.from_pretrained(beside if name is None else name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer can be loaded from {name or beside}: {reason(error)}") from None


def write_original(
    out: Path,
    tensors: Mapping[str, Tensor],
    config: MegalodonConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    shards: int = 1,
    dtype: str = "fp32",
    overwrite: bool = False,
) -> None:
    """Write a model as a folder of the original, which appears under its name only when it is complete.

    The tokenizer goes into a folder of its own, in Hugging Face's files; the original reads SentencePiece's only, by
    a path that it is given. Memory stays below one shard and one tensor. Raises ValueError where the destination is
    taken, the tensors do not fit, or ranks cannot share a width.
    """
    check_destination(out, overwrite=overwrite, kind="original checkpoint", holds=CONSOLIDATED)
    check_shards(config, shards)
    with write_folder(out) as folder:
        words = {"path": None, "additional_vocab_size": 0, "data_tokenized": False}
        model = config_to_original(config)
        write_json(folder / CONFIG, {"model": model, "tokenizer": words, "model_parallel_size": shards})
        write_json(folder / CONSOLIDATED, {"model_parallel_size": shards, "dtype": dtype})
        states = megalodon_to_original(tensors, config, shards=shards, dtype=dtype)
        for name, state in zip(shard_names(shards), states, strict=True):
            torch.save(state, folder / name)
        if tokenizer is not None:
            (folder / TOKENIZER).mkdir()
            write_tokenizer(folder / TOKENIZER, tokenizer)
