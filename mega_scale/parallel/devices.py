"""Devices and their links, as `devices.yaml` and a user's file of its form describe them: peaks, shares, latencies."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import yaml

_FILE = Path(__file__).with_name("devices.yaml")
_KINDS = ("cuda", "cpu")
_PARTS = ("devices", "common", "peaks")  # of a file; common: what all its devices have unless they say otherwise

Positive = Annotated[float, "above 0"]
NotNegative = Annotated[float, "of 0 or more"]


@dataclass(frozen=True, kw_only=True)
class Device:
    """All that a plan assumes of a device, its links and its host: what has no default is in `devices.yaml`.

    Peaks are of vendors' data sheets. Shares of them are attainable ones: measured on an H100 for products of a block's
    sizes, and guesses elsewhere, as all links' figures are.
    """

    name: str
    kind: Literal["cuda", "cpu"] = "cuda"
    capability: tuple[int, int]
    cores: Annotated[int, "of 0 or more"] = 0  # that ranks of a host share, one thread each; 0: each rank has a device
    multiprocessors: Annotated[int, "above 0"]
    lanes: Annotated[int, "above 0"] = 128  # threads whose instructions a multiprocessor issues in a cycle
    clock: Positive  # Hz, of its multiprocessors
    products: Positive  # FLOP/s, dense, bf16 and fp16
    products_fp8: NotNegative  # FLOP/s; 0: it has none
    products_fp32: Positive  # FLOP/s, without tf32
    memory: Positive  # bytes/s
    capacity: Positive  # bytes
    link: Positive  # bytes/s of one direction, to devices of its host
    network: Positive  # bytes/s of one direction, to other hosts
    products_share: Positive = 0.70  # of the peak of products, large ones in bf16
    products_fp8_share: Positive = 0.60  # of the peak in fp8, casts not counted
    products_fp32_share: Positive = 0.70
    memory_share: Positive = 0.85  # of the memory's rate, by kernels that do little else
    issue_share: Positive = 0.75  # of the instructions that multiprocessors can issue
    kernel: NotNegative = 2.5e-6  # seconds that the smallest kernel takes
    launch: NotNegative = 6.0e-6  # seconds of the host a launch, eager
    link_share: Positive = 0.80
    network_share: Positive = 0.75
    link_latency: NotNegative = 3.0e-6  # seconds from one device of a host to the next in a ring
    network_latency: NotNegative = 8.0e-6  # seconds from one host to the next
    # Instructions a thread issues for a token, channel and 16 columns of the average's state: 20 and 40 are counted, 25
    # and 48 where a document begins every 1,000 tokens (`ops/triton_loops.py`), and these are between them; backward
    # also waits for the chain of its segments, as long as 20 more would take.
    average_forward: Positive = 23.0
    average_backward: Positive = 65.0
    context: NotNegative = 0.5e9  # bytes that CUDA takes of a device before any tensor
    communicator: NotNegative = 0.6e9  # bytes of each of NCCL's communicators (NVIDIA/nccl issue 964: 544 to 688 MB)
    fragmentation: NotNegative = 0.05  # share of the peak that the allocator keeps beside it

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
        declared = {each.name: each for each in fields(cls)}
        defaults = {key: each.default for key, each in declared.items() if each.default is not MISSING}
        own = {**defaults, **figures["common"], **figures["devices"][name.lower()], **(overrides or {})}
        hints = get_type_hints(cls, include_extras=True)
        numbers = [key for key in declared if get_origin(hints[key]) is Annotated]
        if unknown := own.keys() - declared:
            raise ValueError(f"gpu.{min(unknown)} is unknown: choose one of {', '.join(numbers)}")
        if missing := [key for key in declared if key not in own]:
            raise ValueError(f"{name} of {file} has no {', '.join(missing)}: give them")
        for key in numbers:
            kind, bound = get_args(hints[key])
            own[key] = kind(_number(key, own[key], bound))
        if own["kind"] not in _KINDS:
            raise ValueError(f"gpu.kind={own['kind']!r} is not possible: choose one of {', '.join(_KINDS)}")
        return cls(**{**own, "capability": tuple(own["capability"])})

    def figures(self) -> dict[str, Any]:
        """All figures by name."""
        return asdict(self)


def _number(key: str, value: object, bound: str) -> float:
    least = math.ulp(0.0) if bound == "above 0" else 0.0
    try:
        found = float(str(value))  # YAML takes 1e12 for a word
    except ValueError:
        found = math.nan
    if not least <= found < math.inf:
        raise ValueError(f"gpu.{key}={value} is not possible: give a number {bound}")
    return found


def _figures(file: Path | None = None) -> dict[str, dict[str, Any]]:
    found: dict[str, Any] = {key: {} for key in _PARTS} | yaml.safe_load(_FILE.read_text(encoding="utf-8"))
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
