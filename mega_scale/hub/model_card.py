"""The model card of an export: what was trained, on what, how far, and how to load it."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from mega_scale.hub.export import tokenizer_beyond_transformers_4
from mega_scale.hub.folder import state_dict_spec
from mega_scale.model import MegaConfig

_HOW_TO_LOAD = """\
```python
import mega_scale  # registers the Mega classes with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
prompt = tokenizer("def ", return_tensors="pt", add_special_tokens=False)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0]))
```
"""
_WITH_CODE = """\
The folder holds the model's own Python files. Without mega_scale, in an environment with only torch and transformers 5,
leave out its import and allow them to run:

```python
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
```
"""
# Absolute, of a home or variable, above a folder, on a Windows drive or host, or a file URL.
_OF_A_MACHINE = re.compile(r"[/~$\\]|\.\.[/\\]|[A-Za-z]:[/\\]|file:")
_TEXTS = ("sample_prompt",)  # are no paths, whatever they begin with
_NOT_IN_HF = {
    "scale_embeddings": (False, "it does not scale embeddings by sqrt(hidden_size)"),
    "final_norm": (False, "it has no norm after the last block"),
    "embedding_dropout_prob": (0.0, "it has no embedding dropout; this matters in training only"),
    "lm_head_bias": (True, "its head always has a bias, which it would initialise to zero"),
}


@dataclass(frozen=True)
class TrainingFacts:
    """What a card reports about a run.

    Args:
        name: title of the model.
        step: optimizer steps taken.
        tokens: training tokens seen.
        validation_loss: of the last evaluation, nats/token; none when there was none.
        bits_per_byte: of the same evaluation, bits per byte of its text.
        data: what the model was trained on, in words.
        layout: engine and number of ranks, in words.
        run_config: the run's resolved configuration, YAML.
        versions: package to version.
    """

    name: str
    step: int
    tokens: int
    validation_loss: float | None = None
    bits_per_byte: float | None = None
    data: str = "not recorded"
    layout: str = "not recorded"
    run_config: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)


def model_card(
    facts: TrainingFacts,
    config: MegaConfig,
    *,
    dtype: str = "fp32",
    with_code: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> str:
    """Markdown text of an export's README.md, with the metadata block that model hubs read; arguments as in
    `write_export`. Of paths on this machine it tells only the last part."""
    sections = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- mega\n- mega_scale\n---",
        f"# {_inline(facts.name)}",
        f"A Mega causal language model (arXiv 2209.10655), pretrained with mega_scale. {_attention(config)}",
        "\n\n".join(
            part.strip()
            for part in (
                "## Load",
                _HOW_TO_LOAD,
                _WITH_CODE if with_code else "",
                _in_transformers_4(config, tokenizer),
            )
            if part
        ),
        f"## Model\n\n{_table(_model_rows(config, dtype))}",
        f"## Training\n\n{_table(_training_rows(facts))}",
    ]
    if facts.run_config.strip():
        sections.append(f"The run's configuration:\n\n{_fenced(_without_paths(facts.run_config).strip())}")
    if facts.versions:
        sections.append(f"## Versions\n\n{_table(list(facts.versions.items()))}")
    return "\n\n".join(section.strip() for section in sections) + "\n"


def beyond_transformers_4(config: MegaConfig) -> list[str]:
    """What of a configuration transformers 4.37.2 does not compute: lines that name key, value and effect."""
    lines = [
        f"`{key}={getattr(config, key)!r}`: {effect}"
        for key, (default, effect) in _NOT_IN_HF.items()
        if getattr(config, key) != default
    ]
    if config.normalization_type == "rmsnorm":
        lines.append("`normalization_type='rmsnorm'`: its RMSNorm returns the scaled input without normalising it")
    return lines


def _in_transformers_4(config: MegaConfig, tokenizer: PreTrainedTokenizerBase | None) -> str:
    beyond = beyond_transformers_4(config)
    if tokenizer is not None:
        beyond += tokenizer_beyond_transformers_4(tokenizer)
    if not beyond:
        spelt = " Its tokenizer reads a special token that a text spells out as that token, here as characters."
        note = spelt if getattr(tokenizer, "split_special_tokens", False) else ""
        return f"The folder also loads in transformers 4.37.2, with its own `MegaForCausalLM`.{note}"
    lines = "\n".join(f"* {line}" for line in beyond)
    return f"transformers 4.37.2 has a `MegaForCausalLM` too, but lacks part of this model:\n\n{lines}"


def _attention(config: MegaConfig) -> str:
    if config.use_chunking:
        return (
            f"Attention stays inside chunks of {config.chunk_size} tokens; the moving average carries information "
            "across them, so the cost is linear in the length."
        )
    return "Attention spans the whole sequence."


def _model_rows(config: MegaConfig, dtype: str) -> list[tuple[str, str]]:
    spec = state_dict_spec(config)
    parameters = sum(spec.tensors[name].numel() for name in spec.stored() if name not in spec.buffers)
    stored = "fp32" if dtype == "fp32" else f"{dtype}; the moving average's parameters in fp32"
    return [
        ("parameters", f"{parameters:,}"),
        ("blocks", str(config.num_hidden_layers)),
        ("hidden size", str(config.hidden_size)),
        ("vocabulary", f"{config.vocab_size:,} tokens"),
        ("weights stored in", stored),
    ]


def _training_rows(facts: TrainingFacts) -> list[tuple[str, str]]:
    rows = [("steps", f"{facts.step:,}"), ("tokens seen", f"{facts.tokens:,}")]
    if facts.validation_loss is not None:
        loss = facts.validation_loss
        rows.append(("validation loss", f"{loss:.4f} nats/token (perplexity {_perplexity(loss)})"))
    if facts.bits_per_byte is not None:
        rows.append(("validation text", f"{facts.bits_per_byte:.4f} bits/byte"))
    return [*rows, ("data", facts.data), ("layout", facts.layout)]


def _perplexity(loss: float) -> str:
    # Beyond e^100 the figure says nothing, and exp overflows at 710.
    return f"{math.exp(loss):.2f}" if loss < 100 else "beyond measure"


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_inline(value)} |" for name, value in rows)])


def _inline(text: str) -> str:
    """A text as one line of Markdown that shows it as it is, in a table's cell too."""
    return re.sub(r"([\\`*|<>\[\]])", r"\\\1", " ".join(text.split()))


def _fenced(yaml_text: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", yaml_text)), default=0))
    return f"{fence}yaml\n{yaml_text}\n{fence}"


def without_folder(text: str) -> str:
    """The last part of a path that names places of one machine (absolute, of a home, above a folder), else the text."""
    return re.split(r"[/\\]", text.rstrip("/\\"))[-1] if _OF_A_MACHINE.match(text) else text


def _without_paths(run_config: str) -> str:
    values = yaml.safe_load(run_config)
    cleaned = _cleaned(values)
    return run_config if cleaned == values else yaml.safe_dump(cleaned, sort_keys=False, allow_unicode=True)


def _cleaned(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {_cleaned(name): _cleaned(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, list):
        return [_cleaned(inner) for inner in value]
    return without_folder(value) if isinstance(value, str) and key not in _TEXTS else value
