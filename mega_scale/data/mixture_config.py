"""The entries of `data.mixture`: every source's own keys, over those of the `data` section."""

from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mega_scale.data.config import DataConfig

# Keys that say where text comes from; the section's other keys hold for all sources.
SOURCE_KEYS = (
    "source", "path", "hub_name", "hub_config", "hub_split", "text_column", "validation_path", "validation_split",
    "validation_fraction", "max_documents", "streaming",
)  # fmt: skip
_SHARES = ("weight", "epochs")


@dataclass(frozen=True)
class MixtureEntry:
    """One source of a mixture.

    Args:
        config: The keys under `data:` as they hold for this source.
        weight: Share of the rows; None where `epochs` is given.
        epochs: How often it is read while a source of `epochs: 1` is read once; None where `weight` is given.
    """

    config: "DataConfig"
    weight: Fraction | None
    epochs: Fraction | None


def mixture_entries(config: "DataConfig") -> dict[str, MixtureEntry]:
    """Read `data.mixture`.

    Args:
        config: The keys under `data:`, with a mixture.

    Returns:
        The sources by name, in the order given.

    Raises:
        ValueError: An entry has an unknown key or an impossible share, or the section names a source too.
    """
    given = config.mixture or {}
    plain = {field.name: field.default for field in fields(config)}
    for key in SOURCE_KEYS:
        if key not in ("text_column", "validation_fraction", "streaming") and getattr(config, key) != plain[key]:
            value = getattr(config, key)
            raise ValueError(f"data.{key}={value!r}: data.mixture names the sources; give the key to one of them")
    if not given:
        raise ValueError("data.mixture={}: name sources, or set it to null")
    found = {name: _entry(config, name, entry) for name, entry in given.items()}
    if len({entry.weight is None for entry in found.values()}) > 1:
        raise ValueError("data.mixture: some sources have a weight and some have epochs; give all of them the same")
    return found


def _entry(config: "DataConfig", name: str, entry: Any) -> MixtureEntry:
    where = f"data.mixture.{name}"
    if not isinstance(entry, dict):
        raise ValueError(f"{where}={entry!r}: give the source's keys, such as source, path and weight")
    unknown = [key for key in entry if key not in (*SOURCE_KEYS, *_SHARES)]
    if unknown:
        raise ValueError(
            f"{where}.{unknown[0]} is not a key of a source: it can have {', '.join(SOURCE_KEYS + _SHARES)}"
        )
    if all(key in entry for key in _SHARES):
        raise ValueError(f"{where} has a weight and epochs: give one of them")
    shares: dict[str, Fraction | None] = dict.fromkeys(_SHARES)
    for key in _SHARES:
        if key in entry:
            shares[key] = _share(f"{where}.{key}", entry[key])
    if not any(key in entry for key in _SHARES):
        shares["epochs"] = Fraction(1)
    keys = {key: entry[key] for key in SOURCE_KEYS if key in entry}
    for key in ("path", "validation_path"):
        if isinstance(keys.get(key), str):
            keys[key] = [keys[key]]
    try:
        return MixtureEntry(replace(config, mixture=None, **keys), **shares)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _share(key: str, value: Any) -> Fraction:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{key}={value!r}: give a number above 0")
    return Fraction(str(value))
