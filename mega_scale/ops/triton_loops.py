"""What the inner loops of a compiled Triton kernel issue, and what share of a GPU's bandwidth they can reach.

The average's kernels go over tiles of a row: a first loop over a tile's steps, which reads tokens from memory, a join,
and a second loop, which reads them again from a cache. A share is a model's and no measurement: the fewest bytes at the
speed of a device copy, over the longest of

    memory     those bytes, by the multiprocessors that have a program
    issue      each warp instruction takes a slot of one of four schedulers, on the multiprocessor with most programs
    chain      a program's tiles follow each other: its own instructions, and the first loop's waits for memory, over
               the steps for which tokens are asked for ahead, be it into buffers or into the L2 cache

and programs run in waves of as many as registers, shared memory and threads let a multiprocessor hold. A warp issues
once in three cycles at best, so few warps leave slots empty; bank conflicts, barriers and the pipes of single kinds of
instructions are left out.
"""

import math
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton

_PRODUCTS = ("HMMA", "QGMMA", "HGMMA", "DMMA")
_WARP_ISSUES_EVERY = 3  # cycles, with arithmetic of four cycles' latency that is half independent


class Multiprocessors(NamedTuple):
    """What the model knows of a GPU."""

    units: int = 132
    hertz: float = 1.755e9
    copied: float = 2.96e12  # bytes/s, read and written, of a device copy
    latency: float = 0.7e-6  # seconds from a load to its data, from memory under load
    registers: int = 65536
    shared_bytes: int = 227 * 1024
    warps: int = 64


H100 = Multiprocessors()
"""H100 SXM; the copy is as measured."""


class Loop(NamedTuple):
    """Instructions from `first` to before `stop`, of which `own` are in no inner loop."""

    first: int
    stop: int
    own: int
    products: bool
    inner: "tuple[Loop, ...]"


def disassemble(binary: bytes) -> str:
    """SASS of a cubin, by Triton's own nvdisasm."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(binary)
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def find_loops(sass: str) -> list[Loop]:
    """Outermost loops of a kernel, each from the target of a branch back to the last such branch."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+([^;]+);", line):
            code.append(instruction[1])
    ends: dict[int, int] = {}
    for at, text in enumerate(code):
        target = re.search(r"\bBRA\b.*?(\.L_\w+)", text)
        # A branch to itself follows the end of a kernel.
        if target and labels.get(target[1], len(code)) < at:
            ends[labels[target[1]]] = at + 1
    return _nested(code, sorted(ends.items()))


def _nested(code: list[str], spans: list[tuple[int, int]]) -> list[Loop]:
    loops: list[Loop] = []
    for first, stop in spans:
        if loops and first < loops[-1].stop:
            continue  # inside the last one
        within = _nested(code, [span for span in spans if first < span[0] and span[1] <= stop])
        products = any(name in text for text in code[first:stop] for name in _PRODUCTS)
        own = stop - first - sum(loop.stop - loop.first for loop in within)
        loops.append(Loop(first, stop, own, products, tuple(within)))
    return loops


def tile_instructions(sass: str, steps: int) -> int:
    """Instructions of a thread over a tile, whose inner loops run `steps` times, and what is in those once. Raises
    ValueError where no loop holds inner ones that multiply."""
    tiles = [loop for loop in find_loops(sass) if any(inner.products for inner in loop.inner)]
    if not tiles:
        raise ValueError("no loop over tiles is in this kernel: the compiler has changed its shape")
    tile = max(tiles, key=lambda loop: loop.stop - loop.first)
    return tile.own + steps * sum(loop.stop - loop.first for loop in tile.inner)


class Average(NamedTuple):
    """A kernel of the average as compiled."""

    instructions: int  # of a thread, a tile
    registers: int  # of a thread
    shared_bytes: int  # of a program
    warps: int
    ahead: int  # steps for which tokens are asked for before they are read
    channels: int  # of a program
    steps: int  # of a tile
    tile_tokens: int
    more: float = 0.0  # segments of the documents that begin, for each of a row's own

    @property
    def per_element(self) -> float:
        """Thread instructions an element."""
        return self.instructions * 32 * self.warps / (self.tile_tokens * self.channels)

    def residents(self, gpu: Multiprocessors = H100) -> int:
        """Programs that a multiprocessor holds."""
        registers = -(-self.registers // 8) * 8 * 32 * self.warps
        shared = gpu.shared_bytes // (self.shared_bytes + 1024)
        return min(gpu.registers // registers, shared, gpu.warps // self.warps)

    def copy_share(
        self, passed: int, size: tuple[int, int, int] = (1, 32768, 4096), gpu: Multiprocessors = H100
    ) -> dict[str, Any]:
        """Seconds of each part of the model, and the `share` of copy speed, for B, L, D = `size` and `passed` bytes an
        element at least: x and y, or x and two gradients."""
        batch, length, width = size
        programs, per_tile = batch * -(-width // self.channels), self.instructions * self.warps / 4
        tiles = -(-length // self.tile_tokens) * (1 + self.more)
        waves = -(-programs // (gpu.units * self.residents(gpu)))
        least = math.prod(size) * passed / gpu.copied
        memory = least * max(1, gpu.units / programs)
        issue = -(-programs // gpu.units) * tiles * per_tile / gpu.hertz
        stalled = max(1, _WARP_ISSUES_EVERY * 4 / self.warps)
        chain = waves * tiles * (per_tile * stalled / gpu.hertz + gpu.latency * self.steps / max(1, self.ahead))
        share = least / max(memory, issue, chain)
        return {"memory": memory, "issue": issue, "chain": chain, "waves": waves, "share": share}
