"""The model on a mesh of processes: groups and collectives, model parallelism, and two engines behind one interface.

Its modules are imported when a name is asked for: PyTorch's and the model's cost seconds, which a command that prints
its help or refuses its arguments need not pay.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mega_scale.parallel.config import EngineConfig, ParallelConfig, layout_changes
    from mega_scale.parallel.engine import BuildOptimizer, Engine
    from mega_scale.parallel.mesh import Placement, check_single, placement
    from mega_scale.parallel.model_parallel import parallelize, run_self_test
    from mega_scale.parallel.shard import EngineState, Place, Values, fill, seeded_values
    from mega_scale.parallel.world import World


def __getattr__(name: str) -> Any:
    modules = ("mesh", "config", "world", "shard", "engine", "model_parallel")  # each imports those before
    for module in modules if name in __all__ else ():
        found = importlib.import_module(f"{__name__}.{module}")
        if hasattr(found, name):
            return getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "BuildOptimizer", "Engine", "EngineConfig", "EngineState", "ParallelConfig", "Place", "Placement", "Values",
    "World", "check_single", "fill", "layout_changes", "parallelize", "placement",
    "run_self_test", "seeded_values",
]  # fmt: skip
