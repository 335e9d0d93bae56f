"""Peak memory of one forward and backward pass of our moving average, in a process of its own.

Started by benchmark.py as `PYTHON launch/ema_memory.py IMPLEMENTATION PROBLEM.safetensors THREADS`; prints how far the
process grew, in sizes of its input.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch.benchmark import OurEma
from launch.machine import PeakMemory, return_freed_memory


def main() -> None:
    """Measure, print."""
    implementation, file, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    return_freed_memory()
    # Copied, as the pages of a mapped file would count when they are first read.
    problem = {name: tensor.clone() for name, tensor in load_file(file).items()}
    short = {name: tensor[:, :64].contiguous() if tensor.dim() == 3 and name in ("x", "dy") else tensor
             for name, tensor in problem.items()}  # fmt: skip
    OurEma(implementation, short).run()  # loads what is loaded at a first call
    ema = OurEma(implementation, problem)
    peak = PeakMemory()
    ema.run()
    print(peak.growth() / problem["x"].nbytes)


if __name__ == "__main__":
    main()
