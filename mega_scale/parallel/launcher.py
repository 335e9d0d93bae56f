"""What launchers and job schedulers tell a process: its rank among how many, where ranks meet, options of training.

deepspeed, torchrun and accelerate set RANK and its like, which win wherever they are set. srun and the mpirun of Open
MPI, MVAPICH2, MPICH and Intel MPI number the processes that they start in variables of their own. Options of accelerate
launch that are about training arrive as variables too, and are held against the run.
"""

import os
import re
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from mega_scale.parallel.config import EngineConfig, ParallelConfig
from mega_scale.parallel.mesh import MeshShape

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
PORT_OPTIONS = (
    "deepspeed --master_port, torchrun --master-port, accelerate launch --main_process_port, else MASTER_PORT"
)

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
_SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
_SLURM_HOSTS = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
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
    """Read what a launcher or a job scheduler says about this process; without one, it is alone.

    Returns:
        Rank, number of ranks, rank on this machine, and number of ranks there; 0, 1, 0 and 1 of a process alone.

    Raises:
        ValueError: variables are missing, are no numbers, or contradict each other; names them, and the remedy.
    """
    place = _place()
    if place is None:
        _check_alone()
        return Placement(0, 1, 0, 1)
    said = os.environ.get("WORLD_SIZE", str(place.size))
    if "RANK" not in os.environ and said != str(place.size):
        raise ValueError(
            f"WORLD_SIZE={said!r} contradicts the {place.size} processes that srun or mpirun started: unset it, or "
            "start as many"
        )
    if place.size > 1:
        meeting_point(place)
    return place


def meeting_point(place: Placement) -> tuple[str, int]:
    """Host and port where the ranks of a run meet: MASTER_ADDR and MASTER_PORT, or what follows from the job.

    Raises:
        ValueError: a variable has no such value, or nothing says on which host rank 0 is.
    """
    env = os.environ
    host, port = env.get("MASTER_ADDR"), env.get("MASTER_PORT")
    if host is None:
        host = "127.0.0.1" if place.local_size == place.size else next(iter(_hosts()), None)
    if not (host or "").strip():
        raise ValueError(
            f"MASTER_ADDR={host!r} names no host, and {place.size} ranks have to know where rank 0 is: export "
            "MASTER_ADDR=HOST (mpirun of Open MPI: -x MASTER_ADDR=HOST; of MPICH and Intel MPI: -genv MASTER_ADDR HOST)"
        )
    if port is None:
        job = ".".join(env.get(name, "") for name in _JOBS)
        return str(host), _FIRST_PORT + zlib.crc32(job.encode()) % _PORTS
    return str(host), _number("MASTER_PORT", port, 1, 65_535, f"choose a free port ({PORT_OPTIONS})")


def check_single(command: str) -> None:
    """Refuse to run a script of one process, `command`, once a rank, all in one folder.

    Raises:
        ValueError: a launcher started several processes, of which this is one.
    """
    place = _place()
    if place is not None and place.size > 1:
        raise ValueError(
            f"{command} is one process, and this is rank {place.rank} of {place.size} that a launcher started: start "
            "it with plain python, under Slurm with srun --ntasks=1"
        )


def _place() -> Placement | None:
    """What a launcher, mpirun or srun say, in this order; None where none of them started this process."""
    env = os.environ
    if "RANK" in env:
        _require(VARIABLES)
        local_size = "LOCAL_WORLD_SIZE" if env.get("LOCAL_WORLD_SIZE") else "LOCAL_SIZE"  # torchrun; deepspeed
        return _read(*VARIABLES[:3], local_size)
    mpi = [names for names in _MPI if names[0] in env]
    complete = next((names for names in mpi if all(name in env for name in names)), None)
    if complete is not None:
        rank, size, local_rank, local_size = complete
        return _read(rank, size, local_rank, local_size)
    if _in_slurm_step():
        rank, size, local_rank = _SLURM
        size = size if size in env else "SLURM_NTASKS"
        _require((rank, size, local_rank))
        for other in {names[0] for names in mpi}:  # Slurm's own PMI numbers tasks as Slurm does
            if env[other] != env[rank]:
                raise ValueError(
                    f"{other}={env[other]!r} contradicts {rank}={env[rank]!r}: unset one of them, or {_START}"
                )
        return _read(rank, size, local_rank, None, _slurm_local_size(size))
    if mpi:
        _require(mpi[0])
    if "PMIX_RANK" in env:
        _require(("PMIX_RANK", *VARIABLES))
    return None


def _check_alone() -> None:
    env = os.environ
    if "WORLD_SIZE" in env:
        _require(VARIABLES)
    # accelerate says where ranks meet if it was asked for several, even when it starts one.
    if "ACCELERATE_USE_CPU" in env and "MASTER_ADDR" in env and "MASTER_PORT" in env:
        raise ValueError(
            "accelerate launch was asked for several processes and started one, as it does with --cpu, and without "
            "--multi_gpu where there are no GPUs: write accelerate launch --multi_gpu --num_processes N, which starts "
            "them on CPUs too, or --num_processes 1 with MASTER_ADDR and MASTER_PORT unset"
        )


def _in_slurm_step() -> bool:
    """Whether srun started this process. Batch scripts and shells of salloc have the job's variables, and are alone."""
    env = os.environ
    if "SLURM_STEP_NUM_TASKS" in env:
        return True
    step = env.get("SLURM_STEP_ID", "")
    if step.isdecimal():
        return int(step) < _FIRST_SPECIAL_STEP
    return env.get("SLURM_PROCID", "0") != "0"


def _slurm_local_size(size: str) -> int | None:
    """Tasks of this step on this node; None where Slurm does not say."""
    env, name = os.environ, "SLURM_STEP_TASKS_PER_NODE"
    if name not in env:
        return None if len(_hosts()) < 2 or not env[size].isdecimal() else -(-int(env[size]) // len(_hosts()))
    counts: list[int] = []
    for part in env[name].split(","):
        form = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if form is None:
            raise ValueError(f"{name}={env[name]!r} is not a list of numbers such as 2(x3),1: {_START}")
        counts += [int(form[1])] * int(form[2] or 1)
    return counts[_number("SLURM_NODEID", env.get("SLURM_NODEID", "0"), 0, len(counts) - 1, f"{name}={env[name]!r}")]


def _hosts() -> list[str]:
    """The hosts of Slurm's step or job, in their order; none outside of one."""
    name = next((name for name in _SLURM_HOSTS if name in os.environ), None)
    return [] if name is None else expand_hosts(name, os.environ[name])


def expand_hosts(name: str, text: str) -> list[str]:
    """Write out Slurm's list of hosts in a variable: `gpu[001-004,7],login1` is gpu001, gpu002 and so on, in order.

    Raises:
        ValueError: it is not such a list.
    """
    bracket = r"\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\]"
    if not re.fullmatch(rf"(?:[^\[\],\s]|{bracket})+(?:,(?:[^\[\],\s]|{bracket})+)*", text):
        raise ValueError(
            f"{name}={text!r} is not a list of hosts such as gpu[001-004,7]: export MASTER_ADDR, or {_START}"
        )
    hosts: list[str] = []
    for entry in re.findall(rf"(?:[^\[\],]|{bracket})+", text):
        names = [""]
        for plain, ranges in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", entry):
            ends = [plain] if plain else [number for part in ranges.split(",") for number in _numbers(part)]
            names = [begin + end for begin in names for end in ends]
        hosts += names
    return hosts


def _numbers(part: str) -> list[str]:
    """001-003 written out, as wide as its first number."""
    first, _, last = part.partition("-")
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]


def _require(names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in os.environ]
    if missing:
        given = ", ".join(f"{name}={os.environ[name]!r}" for name in names if name in os.environ)
        raise ValueError(
            f"environment variables {', '.join(missing)} are missing while others of a launcher are set ({given}): "
            f"{_START}"
        )


def _read(rank: str, size: str, local_rank: str, local_size: str | None, local: int | None = None) -> Placement:
    """Numbers from the variables of these names, which have to fit each other."""
    env = os.environ
    ranks = _number(size, env[size], 1, None, _START)
    here = local or ranks
    if local_size is not None and env.get(local_size):
        here = _number(local_size, env[local_size], 1, ranks, f"{size}={ranks}; {_START}")
    number = _number(rank, env[rank], 0, ranks - 1, f"{size}={ranks}; {_START}")
    at = _number(local_rank, env[local_rank], 0, here - 1, f"{here} ranks are on this machine; {_START}")
    return Placement(number, ranks, at, here)


def _number(name: str, text: str, least: int, most: int | None, remedy: str) -> int:
    bounds = f"from {least} to {most}" if most is not None else f"of at least {least}"
    if not re.fullmatch(r"-?[0-9]+", text) or int(text) < least or (most is not None and int(text) > most):
        raise ValueError(f"{name}={text!r} is not possible, it has to be a whole number {bounds}: {remedy}")
    return int(text)


_UNSAID = ("", "none", "auto")


class _Option(NamedTuple):
    """One of accelerate's options."""

    variable: str
    name: str  # on accelerate's command line, and without dashes in its configuration file
    fits: tuple[Any, ...]  # values that agree with the run, or that it has when nobody sets it
    ours: str  # our key for it, with its value


def check_accelerate(config: EngineConfig, world_size: int) -> None:
    """Refuse a run that does something else than accelerate launch, or its configuration file, was told.

    Raises:
        ValueError: names the variable, the option, our key and its value.
    """
    import torch  # noqa: PLC0415  so that whoever only asks for the rank need not wait for it

    parallel, dtype, accumulation = config.parallel, config.dtype, config.accumulation
    cpu = parallel.device == "cpu" or not torch.cuda.is_available()
    options = [
        _Option("ACCELERATE_USE_CPU", "--cpu", ("false", str(cpu)), f"parallel.device={parallel.device}"),
        _Option("ACCELERATE_MIXED_PRECISION", "--mixed_precision", ("no", dtype), f"train.dtype={dtype}"),
        _Option(
            "ACCELERATE_DYNAMO_BACKEND", "--dynamo_backend", ("no", "inductor" if config.compile else "no"),
            f"train.compile={config.compile}",
        ),
        _Option("ACCELERATE_USE_MEGATRON_LM", "--use_megatron_lm", ("false",), _engine(parallel)),
        _Option(
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "--gradient_accumulation_steps", (accumulation,),
            f"train.global_batch_size and train.micro_batch_size, which make {accumulation}",
        ),
        _Option(
            "ACCELERATE_GRADIENT_CLIPPING", "--gradient_clipping", (config.max_grad_norm,),
            f"optimizer.max_grad_norm={config.max_grad_norm:g}",
        ),
        *_deepspeed(parallel),
        *(_fsdp(parallel) if _is_set("ACCELERATE_USE_FSDP") else ()),
        *(_mesh(parallel.mesh(world_size)) if _is_set("ACCELERATE_USE_PARALLELISM_CONFIG") else ()),
    ]  # fmt: skip
    for variable, name, fits, ours in options:
        value = os.environ.get(variable, "").strip().lower()
        if value not in _UNSAID and not any(_same(value, good) for good in fits):
            raise ValueError(
                f"accelerate launch {name} ({variable}={value}) contradicts {ours}: say there what you want, and take "
                f"{name} out of accelerate's command, or {name.lstrip('-')} out of its configuration file"
            )


def _deepspeed(parallel: ParallelConfig) -> Iterator[_Option]:
    ours = str(parallel.engine == "deepspeed")
    yield _Option("ACCELERATE_USE_DEEPSPEED", "--use_deepspeed", ("false", ours), _engine(parallel))
    file = "parallel.ds_config, where its keys belong"
    yield _Option("ACCELERATE_DEEPSPEED_CONFIG_FILE", "--deepspeed_config_file", (), file)
    stage = parallel.zero_stage
    yield _Option("ACCELERATE_DEEPSPEED_ZERO_STAGE", "--zero_stage", (stage,), f"parallel.zero_stage={stage}")
    zero = parallel.ds_config.get("zero_optimization")
    for what in ("optimizer", "param"):
        section = zero.get(f"offload_{what}") if isinstance(zero, dict) else None
        device = section.get("device", "none") if isinstance(section, dict) else "none"
        yield _Option(
            f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE", f"--offload_{what}_device", (str(device),),
            f"parallel.ds_config.zero_optimization.offload_{what}.device={device}",
        )  # fmt: skip


def _fsdp(parallel: ParallelConfig) -> Iterator[_Option]:
    """FULL_SHARD, false and the like are accelerate's own defaults, so they may not be what anybody said."""
    stage, copies, every = parallel.zero_stage, parallel.dp_replicate, parallel.activation_checkpoint
    yield _Option("ACCELERATE_USE_FSDP", "--use_fsdp", (str(parallel.engine == "fsdp"),), _engine(parallel))
    hybrid = ("hybrid_shard", "4") if copies > 1 else ()
    strategies = ("full_shard", "1", *(("shard_grad_op", "2") if stage < 3 else ()), *hybrid)
    layout = f"parallel.zero_stage={stage} with parallel.dp_replicate={copies}"
    yield _Option("FSDP_SHARDING_STRATEGY", "--fsdp_sharding_strategy", strategies, layout)
    again = ("true", *strategies, *(("false",) if stage < 3 else ()))
    yield _Option("FSDP_RESHARD_AFTER_FORWARD", "--fsdp_reshard_after_forward", again, f"parallel.zero_stage={stage}")
    yield _Option("FSDP_OFFLOAD_PARAMS", "--fsdp_offload_params", ("false",), _engine(parallel))
    recompute = f"parallel.activation_checkpoint={every}"
    name = "--fsdp_activation_checkpointing"
    yield _Option("FSDP_ACTIVATION_CHECKPOINTING", name, ("false", str(every > 0)), recompute)
    yield _Option("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", f"{name}_offload", ("false",), recompute)
    yield _Option("FSDP_IGNORED_MODULES", "--fsdp_ignored_modules", (), f"{_engine(parallel)}, which shards all")


def _mesh(mesh: MeshShape) -> Iterator[_Option]:
    for axis in ("dp_replicate", "dp_shard", "tp", "sp"):
        ranks = getattr(mesh, axis)
        name = f"--parallelism_config_{axis}_size"
        yield _Option(f"PARALLELISM_CONFIG_{axis.upper()}_SIZE", name, (ranks,), f"parallel.{axis}={ranks}")
    ours = f"parallel.sp={mesh.sp}, which shares sequences here"
    yield _Option("PARALLELISM_CONFIG_CP_SIZE", "--parallelism_config_cp_size", (1,), ours)


def _engine(parallel: ParallelConfig) -> str:
    return f"parallel.engine={parallel.engine}"


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("true", "1", "yes", "on")


def _same(said: str, ours: Any) -> bool:
    if isinstance(ours, str):
        return said == ours.lower()
    try:
        return float(said) == float(ours)
    except ValueError:
        return False
