"""Ranks before any process group: what launchers tell a process, the mesh as arithmetic, which models fit it.

deepspeed, torchrun and accelerate set RANK and its like, which win wherever they are set. srun and the mpirun of Open
MPI, MVAPICH2, MPICH and Intel MPI number the processes that they start in variables of their own.
"""

import argparse
import os
import re
import zlib
from collections.abc import Iterable
from math import gcd, lcm, prod
from typing import Any, NamedTuple, Self

from mega_scale.settings import local_paths, require

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
PORT_OPTIONS = "deepspeed --master_port, torchrun --master-port, accelerate launch --main_process_port, MASTER_PORT"

_START = "start the script with deepspeed, torchrun, accelerate launch, srun, mpirun or plain python"
# Variables for the rank, the number of ranks, and the same two on one machine. What mpirun starts may itself run in a
# Slurm step, so mpirun's are looked at first.
_MPI = (
    tuple(f"OMPI_COMM_WORLD_{fact}" for fact in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    tuple(f"MV2_COMM_WORLD_{fact}" for fact in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),  # Cray's
    ("PMI_RANK", "PMI_SIZE", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE"),
)
_SLURM_HOSTS = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
_SLURM_NODES = ("SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES", "SLURM_NNODES")
_FIRST_SPECIAL_STEP = 2**32 - 16  # Slurm's numbers for batch scripts, interactive shells and the like
_JOBS = ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PALS_APID")
_FIRST_PORT, _PORTS = 20_000, 10_000  # below those that Linux gives to connections


class Placement(NamedTuple):
    """Where a process stands among those that a launcher started."""

    rank: int
    size: int
    local_rank: int
    local_size: int  # processes on this machine; all, where the launcher does not say


def placement() -> Placement:
    """Read what a launcher or a job scheduler says about this process; without one, it is alone: 0, 1, 0, 1.

    Raises ValueError where variables are missing, are no numbers, or contradict each other.
    """
    env, place = os.environ, _place()
    if place is None:
        if "WORLD_SIZE" in env:
            _require(VARIABLES)
        # accelerate says where ranks meet if it was asked for several, even when it starts one.
        if "ACCELERATE_USE_CPU" in env and "MASTER_ADDR" in env and "MASTER_PORT" in env:
            raise ValueError(
                "accelerate launch was asked for several processes and started one, as it does with --cpu, and without "
                "--multi_gpu where there are no GPUs: write accelerate launch --multi_gpu --num_processes N, which "
                "starts them on CPUs too, or --num_processes 1 with MASTER_ADDR and MASTER_PORT unset"
            )
        return Placement(0, 1, 0, 1)
    said = env.get("WORLD_SIZE", str(place.size))
    if "RANK" not in env and said != str(place.size):
        raise ValueError(
            f"WORLD_SIZE={said!r} contradicts the {place.size} processes that srun or mpirun started: unset it"
        )
    if place.size > 1:
        meeting_point(place)
    return place


def meeting_point(place: Placement) -> tuple[str, int]:
    """Host and port where the ranks of a run meet: MASTER_ADDR and MASTER_PORT, or what follows from the job."""
    env = os.environ
    host = env.get("MASTER_ADDR")
    if host is None and place.local_size == place.size:
        host = "127.0.0.1"
    elif host is None and (name := next((name for name in _SLURM_HOSTS if name in env), None)):
        host = first_host(name, env[name])
    remedy = (
        f"it is no host, and {place.size} ranks have to know where rank 0 is, export MASTER_ADDR=HOST (mpirun of Open "
        "MPI: -x MASTER_ADDR=HOST; of MPICH and Intel MPI: -genv MASTER_ADDR HOST)"
    )
    require(bool((host or "").strip()), "MASTER_ADDR", host, remedy)
    if "MASTER_PORT" not in env:
        job = ".".join(env.get(name, "") for name in _JOBS)
        return str(host), _FIRST_PORT + zlib.crc32(job.encode()) % _PORTS
    return str(host), _number("MASTER_PORT", 1, 65_535, f"choose a free port ({PORT_OPTIONS})")


def check_single(command: str, args: argparse.Namespace) -> None:
    """Begin a script of one process, `command`: refuse (ValueError) to run it once a rank; see `local_paths`."""
    place = _place()
    if place is not None and place.size > 1:
        raise ValueError(
            f"{command} is one process, and this is rank {place.rank} of {place.size}: start it with plain python, or "
            "with srun --ntasks=1"
        )
    local_paths(args)


def _place() -> Placement | None:
    """What a launcher, mpirun or srun say, in this order; None where none of them started this process."""
    env, here = os.environ, 0
    mpi = [names for names in _MPI if names[0] in env]
    complete = next((names for names in mpi if all(name in env for name in names)), None)
    # Batch scripts and shells of salloc have the job's variables too, and are alone.
    step = env.get("SLURM_STEP_ID", "")
    in_step = int(step) < _FIRST_SPECIAL_STEP if step.isdecimal() else env.get("SLURM_PROCID", "0") != "0"
    if "RANK" in env:
        _require(VARIABLES)
        rank, size, local_rank = VARIABLES[:3]
        local_size = "LOCAL_WORLD_SIZE" if env.get("LOCAL_WORLD_SIZE") else "LOCAL_SIZE"  # torchrun; deepspeed
    elif complete is not None:
        rank, size, local_rank, local_size = complete
    elif "SLURM_STEP_NUM_TASKS" in env or in_step:
        rank, local_rank, local_size = "SLURM_PROCID", "SLURM_LOCALID", ""
        size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
        _require((rank, size, local_rank))
        # Slurm's own PMI numbers tasks as Slurm does.
        if other := next((names[0] for names in mpi if env[names[0]] != env[rank]), None):
            raise ValueError(f"{other}={env[other]!r} contradicts {rank}={env[rank]!r}: unset one of them, or {_START}")
        here = _slurm_local_size(size)
    else:
        if mpi:
            _require(mpi[0])
        if "PMIX_RANK" in env:
            _require(("PMIX_RANK", *VARIABLES))
        return None
    ranks = _number(size, 1, None, _START)
    of_all = f"{size}={ranks}; {_START}"
    if env.get(local_size):
        here = _number(local_size, 1, ranks, of_all)
    here = here or ranks
    at = _number(local_rank, 0, here - 1, f"{here} ranks are on this machine; {_START}")
    return Placement(_number(rank, 0, ranks - 1, of_all), ranks, at, here)


def _slurm_local_size(size: str) -> int:
    env, name = os.environ, "SLURM_STEP_TASKS_PER_NODE"
    if name not in env:
        nodes = next((_number(name, 1, None, _START) for name in _SLURM_NODES if name in env), 1)
        return -(-_number(size, 1, None, _START) // nodes)
    # For example 2(x3),1.
    each = re.sub(r"(\d+)\(x(\d+)\)", lambda many: ",".join([many[1]] * int(many[2])), env[name]).split(",")
    require(all(map(str.isdecimal, each)), name, env[name], f"it is no list of numbers such as 2(x3),1, {_START}")
    node = _number("SLURM_NODEID", 0, len(each) - 1, f"{name}={env[name]!r}") if "SLURM_NODEID" in env else 0
    return int(each[node])


def first_host(name: str, text: str) -> str:
    """The first one in Slurm's list of hosts, a variable: gpu001 of `gpu[001-004,7],login1`."""
    bracket = r"\[(\d+)(?:-\d+)?(?:,\d+(?:-\d+)?)*\]"
    entry = rf"(?:[^\[\],\s]|{bracket})+"
    remedy = f"it is no list of hosts such as gpu[001-004,7], export MASTER_ADDR, or {_START}"
    require(re.fullmatch(rf"{entry}(?:,{entry})*", text) is not None, name, text, remedy)
    return re.sub(rf"{bracket}|,.*", r"\1", text)


def _require(names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in os.environ]
    if missing:
        given = ", ".join(f"{name}={os.environ[name]!r}" for name in names if name in os.environ)
        raise ValueError(
            f"environment variables {', '.join(missing)} are missing while others of a launcher are set ({given}): "
            f"{_START}"
        )


def _number(name: str, least: int, most: int | None, remedy: str) -> int:
    text, bounds = os.environ[name], f"from {least} to {most}" if most is not None else f"of at least {least}"
    number = int(text) if re.fullmatch(r"-?[0-9]+", text) else least - 1
    good = least <= number and (most is None or number <= most)
    require(good, name, text, f"it has to be a whole number {bounds}: {remedy}")
    return number


class MeshShape(NamedTuple):
    """The number of ranks along each dimension; ranks are numbered row-major, tp fastest so that they share a host."""

    dp_replicate: int  # copies of the sharded model
    dp_shard: int  # ranks of a copy that read different rows
    sp: int  # ranks that share one sequence
    tp: int  # ranks that share the channels of every layer

    @classmethod
    def resolve(cls, world_size: int, dp_replicate: int = 1, dp_shard: int = -1, sp: int = 1, tp: int = 1) -> Self:
        """Lay all ranks of a run out on the mesh; dp_shard=-1 takes what the other dimensions leave.

        Raises ValueError where a size is impossible, or the mesh does not hold all ranks.
        """
        asked = {"dp_replicate": dp_replicate, "dp_shard": dp_shard, "sp": sp, "tp": tp}
        for axis, size in asked.items():
            rest = ", or parallel.dp_shard=-1 for what the other axes leave" if axis == "dp_shard" else ""
            remedy = f"use parallel.{axis}=1 or more{rest}"
            require(size > 0 or (axis, size) == ("dp_shard", -1), f"parallel.{axis}", size, remedy)
        inner = dp_replicate * sp * tp
        found = cls(dp_replicate, world_size // inner if dp_shard == -1 else dp_shard, sp, tp)
        if found.size != world_size:
            raise ValueError(_misfit({axis: size for axis, size in asked.items() if size != -1}, world_size))
        return found

    @property
    def size(self) -> int:
        return prod(self)

    @property
    def dp(self) -> int:
        """Ranks that read different rows."""
        return self.dp_replicate * self.dp_shard

    @property
    def fsdp(self) -> int:
        """Ranks over which the parameters of one copy are sharded."""
        return self.dp_shard * self.sp

    def dp_rank(self, rank: int) -> int:
        """The number of a rank among those that read different rows, 0 to dp - 1."""
        return rank // (self.sp * self.tp)


def divisors(number: int) -> list[int]:
    """The divisors of a number of at least 1, ascending."""
    return [value for value in range(1, number + 1) if number % value == 0]


def nearest(values: Iterable[int], wanted: int, count: int = 2) -> str:
    """Name the `count` possible values closest to an impossible one, ascending, as in "2 or 4", for a remedy."""
    closest = sorted(set(values), key=lambda value: abs(value - wanted))[:count]
    return " or ".join(str(value) for value in sorted(closest))


def multiples(unit: int, wanted: int) -> str:
    """Name the multiples of `unit` just below and above an impossible value, as in "16 or 32", for a remedy."""
    return nearest([max(wanted // unit, 1) * unit, -(-wanted // unit) * unit], wanted)


def _misfit(fixed: dict[str, int], world_size: int) -> str:
    """Say which of the axes that have a size could have another, or how many processes would fill them."""
    names = " x ".join(f"parallel.{axis}={size}" for axis, size in fixed.items())
    taken = prod(fixed.values())
    others = {axis: size for axis, size in fixed.items() if axis != "dp_shard"}
    inner = prod(others.values())
    remedies = []
    if world_size % inner == 0:
        remedies.append(f"use parallel.dp_shard={world_size // inner}, or parallel.dp_shard=-1")
    else:
        also = "parallel.dp_shard=-1 with " if "dp_shard" in fixed else ""
        for axis, size in others.items():
            beside = inner // size
            if size > 1 and world_size % beside == 0:
                remedies.append(f"use {also}parallel.{axis}={nearest(divisors(world_size // beside), size)}")
    if "dp_shard" in fixed:
        relation, processes = "is not the number of processes", str(taken)
    else:
        relation, processes = "does not divide the number of processes", multiples(taken, world_size)
    remedies.append(f"start {processes} processes")
    return f"{names} = {taken} {relation}, {world_size}: {', or '.join(remedies)}"


def check_tensor_parallel(model: Any, tp: int) -> None:
    """Refuse a model, a configuration or the `model` section of a run, whose channels `tp` ranks cannot share."""
    if tp == 1:
        return
    _check_model(model, f"parallel.tp={tp}", both_ways="only causal models share their channels")
    heads, groups = getattr(model, "num_attention_heads", 1), getattr(model, "timestep_norm_groups", None) or 1
    # What ranks divide, and what else has to divide it.
    shared = {"hidden_size": groups, "intermediate_size": heads, "timestep_norm_groups": 1}
    shared |= {"nffn_hidden_size": 1} if getattr(model, "use_normalized_ffn", True) else {}
    widths = {key: width for key in shared if (width := getattr(model, key, None)) is not None}

    def fits(heads: int, ranks: int) -> bool:
        """Whether ranks have whole heads, or heads whole ranks."""
        return heads % ranks == 0 or ranks % heads == 0

    fewer = f"parallel.tp={max(ranks for ranks in divisors(gcd(tp, *widths.values())) if fits(heads, ranks))}"
    for key, width in widths.items():
        possible = multiples(lcm(tp, shared[key]), width)
        if key == "timestep_norm_groups":
            channels = widths["hidden_size"]
            possible = nearest([n for n in divisors(channels) if n % tp == 0 and n < channels], width)
        remedy = f"use model.{key}={possible}, or {fewer}" if possible else f"use {fewer}"
        require(width % tp == 0, "parallel.tp", tp, f"it does not divide model.{key}={width}, {remedy}")
    if not fits(heads, tp):
        both = gcd(model.shared_representation_size // 2, model.intermediate_size)
        possible = nearest([count for count in divisors(both) if fits(count, tp)], heads)
        why = f"neither of it and model.num_attention_heads={heads} divides the other"
        require(False, "parallel.tp", tp, f"{why}, use model.num_attention_heads={possible}, or {fewer}")


def check_sequence_parallel(model: Any, length: int, sp: int) -> None:
    """Refuse a model, or a length in tokens, of which not every one of `sp` ranks can have some whole chunks.

    A length that does not fill the ranks is no obstacle: its end is padded.
    """
    if sp == 1:
        return

    def share(chunk: int) -> int:
        """Tokens of a rank: the fewest whole chunks with which all ranks hold the sequence."""
        return -(-length // (sp * chunk)) * chunk

    def chunk_that_fits(at_most: int) -> int:
        """The longest chunk of which every rank has some tokens; 1 where no chunk is that short."""
        lengths = range(min(at_most, -(-length // sp)), 0, -1)
        return next((chunk for chunk in lengths if length > (sp - 1) * share(chunk)), 1)

    chunk = f" with model.chunk_size={chunk_that_fits(getattr(model, 'max_positions', length))}"
    _check_model(model, f"parallel.sp={sp}", part="rank", chunk=chunk)
    if length <= (sp - 1) * share(model.chunk_size):
        raise ValueError(
            f"data.sequence_length={length} is too short for parallel.sp={sp} with model.chunk_size="
            f"{model.chunk_size}: the last rank's whole chunks would hold only padding; use data.sequence_length="
            f"{share(model.chunk_size) * sp}, or model.chunk_size={chunk_that_fits(model.chunk_size)}"
        )


def check_segments(model: Any, segment: int, every: int, sp: int) -> None:
    """Refuse a model whose recomputed blocks (0: none) cannot be computed `segment` tokens (0: a row) at a time."""
    key, chunk = "parallel.activation_checkpoint_segment", model.chunk_size
    require(segment >= 0, key, segment, "choose 0 for whole rows, or a multiple of model.chunk_size")
    if segment == 0:
        return
    off = f"or {key}=0"
    why = "only blocks that parallel.activation_checkpoint=0 would recompute are computed in segments"
    require(every > 0, key, segment, f"{why}, use parallel.activation_checkpoint=1, {off}")
    both_ways = "states would cross segments in both directions"
    _check_model(model, f"{key}={segment}", off=0, part="segment", both_ways=both_ways)
    why = f"ranks pass one state for their whole part of a row with parallel.sp={sp}"
    require(sp == 1, key, segment, f"{why}, use parallel.sp=1, {off}")
    remedy = f"it is not a multiple of model.chunk_size={chunk}, use {multiples(chunk, segment)}"
    require(segment % chunk == 0, key, segment, remedy)


def _check_model(
    model: Any, setting: str, *, off: int = 1, part: str = "", both_ways: str = "", chunk: str = ""
) -> None:
    """Refuse a model that cannot be computed in parts; of another family than Mega, none of this is a choice.

    `part` names those of a row; `both_ways` says why it has to be causal; `chunk` is a remedy beside chunking.
    """
    norm, truncation = getattr(model, "normalization_type", None), getattr(model, "truncation", None)
    for broken, key, value, why, remedy in (
        (norm in ("batchnorm", "syncbatchnorm"), "normalization_type", norm,
         "its statistics run over tokens of a batch, which differ between ranks", "scalenorm, layernorm or rmsnorm"),
        (getattr(model, "add_cross_attention", False), "add_cross_attention", True,
         "what attends to an encoder is not shared by ranks", "false"),
        (getattr(model, "bidirectional", False) and both_ways, "bidirectional", True, both_ways, "false"),
        (truncation is not None and part, "truncation", truncation,
         f"a truncated moving average has no state to pass from {part} to {part}", "null"),
        (not getattr(model, "use_chunking", True) and part, "use_chunking", False,
         f"attention would reach over all {part}s", f"true{chunk}"),
    ):  # fmt: skip
        if broken:
            raise ValueError(
                f"{setting} with model.{key}={value!r}: {why}; use model.{key}={remedy}, or "
                f"{setting.partition('=')[0]}={off}"
            )
