"""Devices and their links, as `devices.yaml` and a user's file of its form describe them: peaks, shares, latencies."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import yaml

_FILE = Path(__file__).with_name("devices.yaml")
_KINDS = ("cuda", "cpu")
_TEXTS = ("name", "kind", "capability")  # that are no numbers
# All others are above 0.
_MAY_BE_ZERO = (
    "cores", "products_fp8", "kernel", "launch", "link_latency", "network_latency", "context", "communicator",
    "fragmentation",
)  # fmt: skip


@dataclass(frozen=True)
class Device:
    """All that a plan assumes of a device, its links and its host, in the units of `devices.yaml`."""

    name: str
    kind: Literal["cuda", "cpu"]
    capability: tuple[int, int]
    cores: int
    multiprocessors: int
    lanes: int
    clock: float
    products: float
    products_fp8: float
    products_fp32: float
    memory: float
    capacity: float
    link: float
    network: float
    products_share: float
    products_fp8_share: float
    products_fp32_share: float
    memory_share: float
    issue_share: float
    kernel: float
    launch: float
    link_share: float
    network_share: float
    link_latency: float
    network_latency: float
    average_forward: float
    average_backward: float
    context: float
    communicator: float
    fragmentation: float

    @classmethod
    def known(cls, file: Path | None = None) -> list[str]:
        """Names that `named` takes."""
        return list(_figures(file)["devices"])

    @classmethod
    def named(cls, name: str, overrides: Mapping[str, float] | None = None, file: Path | None = None) -> "Device":
        """A device of `devices.yaml`, or of a file of its form, with other figures in place of its own.

        Raises ValueError for unknown names and figures that cannot be, OSError where the file cannot be read.
        """
        figures = _figures(file)
        if name.lower() not in figures["devices"]:
            raise ValueError(f"gpu={name!r} is unknown: choose one of {', '.join(figures['devices'])}")
        own = {**figures["common"], **figures["devices"][name.lower()], **(overrides or {})}
        names = [each.name for each in fields(cls)]
        if unknown := own.keys() - names:
            changeable = ", ".join(each for each in names if each not in _TEXTS)
            raise ValueError(f"gpu.{min(unknown)} is unknown: choose one of {changeable}")
        if missing := [each for each in names if each not in own]:
            raise ValueError(f"{name} of {file} has no {', '.join(missing)}: give them")
        for key, value in own.items():
            if key not in _TEXTS:
                own[key] = cls.__annotations__[key](_number(key, value))
        if own["kind"] not in _KINDS:
            raise ValueError(f"gpu.kind={own['kind']!r} is not possible: choose one of {', '.join(_KINDS)}")
        return cls(**{**own, "capability": tuple(own["capability"])})

    def figures(self) -> dict[str, Any]:
        """All figures by name."""
        return asdict(self)


def _number(key: str, value: object) -> float:
    low, remedy = (0.0, "of 0 or more") if key in _MAY_BE_ZERO else (math.ulp(0.0), "above 0")
    try:
        found = float(str(value))  # YAML takes 1e12 for a word
    except ValueError:
        found = math.nan
    if not low <= found < math.inf:
        raise ValueError(f"gpu.{key}={value} is not possible: give a number {remedy}")
    return found


def _figures(file: Path | None = None) -> dict[str, dict[str, Any]]:
    found: dict[str, Any] = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    if file is None:
        return found
    try:
        own = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML: {error}") from None
    if not isinstance(own, dict) or own.keys() - found or not all(isinstance(each, dict) for each in own.values()):
        raise ValueError(
            f"{file} is not possible: give {', '.join(found)}, as mega_scale/parallel/devices.yaml has them"
        )
    return {key: {**found[key], **own.get(key, {})} for key in found}


def peak_products(name: str) -> float | None:
    """FLOP/s of dense bf16 products of a GPU by PyTorch's name of it; None where it is not known."""
    figures = _figures()
    known = {key.upper(): own["products"] for key, own in figures["devices"].items()} | figures["peaks"]
    return max(((len(key), peak) for key, peak in known.items() if key in name), default=(0, None))[1]
