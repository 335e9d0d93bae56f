"""Eight layouts on 2 and 4 CPU ranks: planned step times, by this CPU's own figures, beside measured ones.

    PYTHONPATH=tests/support python tests/campaigns/planned_ranking.py --devices cpu.yaml

The CPU is measured first: products, elementwise operators, the average, what a launch costs the host, and gloo's
collectives between 2 and 4 ranks. Its entry, of the form of mega_scale/parallel/devices.yaml, is written to --devices.
Then each layout is planned, and run by its real launcher, in turns. A layout's measured time is the processor time of
all its ranks in a step, over the cores that they share: the median of a run, the lowest of runs. Beside it stands the
time by the clock, which any other job on the machine makes longer. Exit code 1 where planned and measured times
correlate (Spearman) by less than 0.8.
"""

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
import yaml
from launching import start, write_sources
from ranks import run_ranks

from mega_scale.config import parse
from mega_scale.model import MegaConfig, MegaForCausalLM
from mega_scale.ops.ema import EmaCoefficients, damped_ema
from mega_scale.ops.linear import times_transposed
from mega_scale.parallel import ParallelConfig, World
from mega_scale.parallel.devices import Device
from mega_scale.parallel.meter import Meter
from mega_scale.parallel.roofline import collective_seconds
from mega_scale.planner.search import calibrate, estimate
from mega_scale.planner.times import crowding, step_time
from mega_scale.planner.trace import Cluster, parameter_count, prepare, rehearse

BOUND = 0.8
SIZES = """model.hidden_size=256 model.num_hidden_layers=6 model.intermediate_size=512 model.nffn_hidden_size=512
    model.shared_representation_size=128 model.ema_projection_size=16 model.use_chunking=true model.chunk_size=128
    model.normalization_type=layernorm data.sequence_length=512 data.tokenizer=byte train.global_batch_size=8
    train.log_every=1 train.eval_every=0 train.sample_every=0 checkpoint.every=0 schedule.warmup_steps=1
    parallel.self_test=false"""
RECOMPUTED, SAVED = "parallel.activation_checkpoint=1", "parallel.activation_checkpoint_policy=save_matmuls"
LAYOUTS = {
    "dp2": (2, "fsdp", "train.micro_batch_size=4"),
    "dp2, ZeRO-3": (2, "deepspeed", "train.micro_batch_size=4"),
    "dp2, a row at a time, recomputed": (2, "fsdp", f"train.micro_batch_size=1 {RECOMPUTED}"),
    "sp2": (2, "fsdp", "train.micro_batch_size=8 parallel.sp=2"),
    "tp2, matmuls saved": (2, "fsdp", f"train.micro_batch_size=8 parallel.tp=2 {RECOMPUTED} {SAVED}"),
    "dp4 in segments": (
        4, "fsdp", f"train.micro_batch_size=2 parallel.activation_checkpoint_segment=128 {RECOMPUTED}"
    ),
    "2 copies x tp2": (4, "fsdp", "train.micro_batch_size=4 parallel.dp_replicate=2 parallel.tp=2"),
    "tp4, ZeRO-3, recomputed": (4, "deepspeed", f"train.micro_batch_size=8 parallel.tp=4 {RECOMPUTED}"),
}  # fmt: skip
# Figures of an entry that say nothing of a CPU, whose other figures are attained ones.
ATTAINED = {
    "capability": [0, 0], "multiprocessors": 1, "lanes": 1, "clock": 1.0e9, "issue_share": 1.0, "products_fp8": 0.0,
    "products_share": 1.0, "products_fp32_share": 1.0, "memory_share": 1.0, "kernel": 0.0, "link_share": 1.0,
    "network_share": 1.0, "communicator": 0.0,
}  # fmt: skip


# The CPU


def seconds_of(function, repeats=30):
    """Processor time of a call, at its fastest: other jobs do not count."""
    function()
    found = math.inf
    for _ in range(repeats):
        began = time.process_time()
        function()
        found = min(found, time.process_time() - began)
    return found


def measure_products(dtype):
    """FLOP/s of one thread in the three products of a layer, each of which takes as many operations."""
    tokens, inputs, outputs = 2048, 256, 512
    x, gradient = torch.randn(tokens, inputs, dtype=dtype), torch.randn(tokens, outputs, dtype=dtype)
    weight = torch.randn(outputs, inputs, dtype=dtype)
    calls = (
        lambda: times_transposed(x, weight), lambda: times_transposed(gradient, weight.t()), lambda: gradient.t() @ x
    )  # fmt: skip
    return 3 * 2 * tokens * inputs * outputs / sum(seconds_of(call) for call in calls)


def measure_memory():
    """Bytes/s of one thread over activations: copies, sums, products, SiLU and softmax, in the mean."""
    x, y = torch.randn(2048, 256), torch.randn(2048, 256)
    calls = (
        (2, lambda: y.copy_(x)), (3, lambda: x + y), (3, lambda: x * y), (2, lambda: torch.nn.functional.silu(x)),
        (2, lambda: x.softmax(-1)),
    )  # fmt: skip
    return statistics.geometric_mean(tensors * x.nbytes / seconds_of(call) for tensors, call in calls)


def measure_average():
    """Nanoseconds a token, channel and 16 columns of the average's state, forward and backward."""
    length, channels, columns = 512, 256, 16
    x = torch.randn(4, length, channels, requires_grad=True)
    gain, projection = (torch.randn(channels, columns, requires_grad=True) for _ in range(2))
    log_decay = torch.rand(channels, columns).sub(1.1).requires_grad_()
    unit = 4 * length * channels * columns / 16 / 1e9

    def forward():
        return damped_ema(x, EmaCoefficients(log_decay, gain, projection))[0]

    y = forward()
    gradient = torch.randn_like(y)
    back = seconds_of(lambda: y.backward(gradient, retain_graph=True))
    return seconds_of(forward) / unit, back / unit


def measure_launch():
    """Seconds of the host a launch, in a step of a model that is too small for anything else to take time."""
    config = MegaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, intermediate_size=16, nffn_hidden_size=16,
        shared_representation_size=16, ema_projection_size=2, use_chunking=True, chunk_size=16, is_decoder=True,
        bidirectional=False,
    )  # fmt: skip
    model, tokens = MegaForCausalLM(config), torch.randint(3, 64, (1, 16))

    def step():
        model(input_ids=tokens, labels=tokens).loss.backward()

    with Meter(model) as meter:
        step()
    return seconds_of(step) / sum(event.kernels for event in meter.events)


SENT = {
    "allgather": dist.all_gather_single,
    "reduce_scatter": lambda whole, part: dist.reduce_scatter_single(part, whole),
    "allreduce": lambda whole, part: dist.all_reduce(whole),
}
WHOLE = {"small": 1024, "large": 2**20}  # numbers of the tensor that all ranks have together: 4 MiB


def measure_collectives():
    """By operation and size, seconds of the slowest rank, at its fastest of many, and the bytes that a rank puts in."""
    found = {}
    with World.start(ParallelConfig(device="cpu")) as world:
        for size, numbers in WHOLE.items():
            whole, part = torch.zeros(numbers), torch.zeros(numbers // world.size)
            for operation, send in SENT.items():
                best = math.inf
                for _ in range(60):
                    world.barrier()
                    began = time.perf_counter()
                    send(whole, part)
                    best = min(best, time.perf_counter() - began)
                given = part if operation == "allgather" else whole
                found[operation, size] = (float(world.all_gather(torch.tensor(best)).max()), given.nbytes)
    return found


def measure(folder, file):
    """Write this CPU's entry into a file of devices, print how near its links come to gloo, and return it."""
    torch.set_num_threads(1)
    forward, backward = measure_average()
    cores = len(os.sched_getaffinity(0))
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    entry = {
        "name": f"{name}, {cores} cores", "kind": "cpu", "cores": cores, **ATTAINED,
        "products": measure_products(torch.bfloat16), "products_fp32": measure_products(torch.float32),
        "memory": measure_memory(), "capacity": float(psutil.virtual_memory().total), "launch": measure_launch(),
        "average_forward": forward, "average_backward": backward, "context": float(psutil.Process().memory_info().rss),
        **dict.fromkeys(("link", "network"), 1.0), **dict.fromkeys(("link_latency", "network_latency"), 0.0),
    }  # fmt: skip

    def write():
        file.write_text(yaml.safe_dump({"devices": {"measured": entry}}, sort_keys=False))
        return Device.named("measured", file=file)

    device = write()
    sent = {ranks: run_ranks(measure_collectives, ranks, folder / str(ranks))[0] for ranks in (2, 4)}
    rates, latencies = [], []
    for ranks, operation in product(sent, SENT):
        (short, few), (long, many) = (sent[ranks][operation, size] for size in WHOLE)
        turns = crowding(Cluster(1, ranks, device))
        # A plan's seconds are linear in bytes over a link, and in rounds of a ring.
        moved = link_seconds(operation, ranks, many - few, device)
        rounds = link_seconds(operation, ranks, 0, replace(device, link_latency=1.0))
        rates.append(moved / max(long - short, 1e-9) * turns)
        latencies.append(short / turns / rounds)
    link, latency = statistics.geometric_mean(rates), statistics.geometric_mean(latencies)
    entry |= {"link": link, "network": link, "link_latency": latency, "network_latency": latency}
    device = write()
    for ranks, operation in product(sent, SENT):
        turns = crowding(Cluster(1, ranks, device))
        for size in WHOLE:
            seconds, given = sent[ranks][operation, size]
            planned = turns * link_seconds(operation, ranks, given, device)
            took = f"{1e3 * seconds:7.2f} ms, planned {1e3 * planned:7.2f}"
            print(f"{operation:<15}{ranks} ranks {given:>9,} bytes | {took}")
    return device


def link_seconds(operation, ranks, size, device):
    return collective_seconds(operation, ranks, 1, size, device)


# The layouts


def plan(device):
    """Planned seconds of a step by layout: of its trace, and on paper, as the search prunes by."""
    traced, paper, calibrated = {}, {}, {}
    for name, (ranks, engine, words) in LAYOUTS.items():
        cluster = Cluster(1, ranks, device)
        config, model = prepare(parse([*SIZES.split(), f"parallel.engine={engine}", *words.split()]), cluster)
        traced[name] = step_time(rehearse(config, model, cluster, 0), config, model, cluster)
        if (ranks, engine) not in calibrated:
            calibrated[ranks, engine] = calibrate(config, model, cluster)
        paper[name] = estimate(config, model, cluster, calibrated[ranks, engine], parameter_count(model))[1]
    return traced, paper


def run(name, steps, text, folder):
    """Median seconds of a step of one run, by the clock; and the processor's of all ranks."""
    ranks, engine, words = LAYOUTS[name]
    launcher = {
        "fsdp": ["torchrun", "--nproc-per-node", str(ranks), "--master-port", "PORT"],
        "deepspeed": ["deepspeed", "--quiet", "--num_accelerators", str(ranks), "--master_port", "PORT"],
    }[engine]
    callback = f"{Path(__file__).with_name('step_times.py')}:StepTimes"
    run_dir = Path(tempfile.mkdtemp(dir=folder))
    arguments = [
        *SIZES.split(), *words.split(), f"parallel.engine={engine}", f"run_dir={run_dir}", f"train.steps={steps}",
        "data.source=json", f"data.path={text}", "data.validation_fraction=0", f"train.callbacks={callback}",
    ]  # fmt: skip
    code, output = start([*launcher, "launch/pretrain.py"], arguments, timeout=900)
    if code:
        raise RuntimeError(f"{name} ended with {code}:\n{output[-4000:]}")
    ends = torch.tensor([json.loads((run_dir / f"times-{rank}.json").read_text()) for rank in range(ranks)])
    # The first steps make what is made once.
    taken = ends.diff(dim=1)[:, 1:]
    return float(taken[0, :, 0].median()), float(taken[:, :, 1].sum(0).median())


def spearman(first, second):
    """The correlation of two orders of the same names, without ties."""
    places = [sorted(values, key=values.get) for values in (first, second)]
    n = len(first)
    return 1 - 6 * sum((places[0].index(name) - places[1].index(name)) ** 2 for name in first) / (n**3 - n)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=Path, metavar="FILE", help="where this CPU's entry goes")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each layout")
    parser.add_argument("--steps", type=int, default=8, help="of each run")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = write_sources(folder / "text.jsonl", 20)
        device = measure(folder, args.devices or folder / "cpu.yaml")
        print(", ".join(f"{key} {value:.4g}" for key, value in device.figures().items() if isinstance(value, float)))
        traced, paper = plan(device)
        found = {name: [] for name in LAYOUTS}
        for number, layout in product(range(args.rounds), LAYOUTS):
            by_clock, spent = run(layout, args.steps, text, folder)
            found[layout].append((by_clock, spent))
            print(f"round {number} {layout}: {by_clock:.3f} s, processors {spent:.3f} s", flush=True)
    measured = {name: min(spent for _, spent in runs) / device.cores for name, runs in found.items()}
    clock = {name: min(by_clock for by_clock, _ in runs) for name, runs in found.items()}
    planned = {name: time.seconds for name, time in traced.items()}
    print("seconds of a step | measured | by the clock | planned: kernels, collectives, host | on paper")
    for layout in sorted(LAYOUTS, key=measured.get):
        of = traced[layout]
        parts = f"{of.kernels:.3f}, {of.exposed + of.network:.3f}, {of.host:.3f}"
        row = f"{measured[layout]:.3f} | {clock[layout]:.3f} | {planned[layout]:.3f}: {parts} | {paper[layout]:.3f}"
        print(f"{layout:<33} | {row}")
    for what, first, second in (
        ("planned and measured", planned, measured), ("on paper and measured", paper, measured),
        ("planned and by the clock", planned, clock),
    ):  # fmt: skip
        print(f"Spearman of {what}: {spearman(first, second):.3f}")
    raise SystemExit(spearman(planned, measured) < BOUND)


if __name__ == "__main__":
    main()
