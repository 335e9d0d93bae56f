"""How the model is spread over processes: the process group, and two engines behind one protocol."""

from mega_scale.parallel.communication import Sends, per_block
from mega_scale.parallel.config import ParallelConfig
from mega_scale.parallel.engine import BuildOptimizer, Engine
from mega_scale.parallel.layout import describe, difference
from mega_scale.parallel.materialize import Values, fill, seeded_values
from mega_scale.parallel.monitor import Standing
from mega_scale.parallel.parallelize import parallelize
from mega_scale.parallel.placement import Placement, check_single, placement
from mega_scale.parallel.self_test import SelfTest, self_test
from mega_scale.parallel.state import EngineState
from mega_scale.parallel.state_files import INDEX, StateReader, index_of, own_part
from mega_scale.parallel.stored_parts import Span, part_file
from mega_scale.parallel.tensor_file import as_bytes, write_tensors
from mega_scale.parallel.weights import LazyWeights, open_weights
from mega_scale.parallel.window import Place
from mega_scale.parallel.world import World

__all__ = [
    "INDEX",
    "BuildOptimizer",
    "Engine",
    "EngineState",
    "LazyWeights",
    "ParallelConfig",
    "Place",
    "Placement",
    "SelfTest",
    "Sends",
    "Span",
    "Standing",
    "StateReader",
    "Values",
    "World",
    "as_bytes",
    "check_single",
    "check_vocabulary",
    "describe",
    "difference",
    "fill",
    "index_of",
    "open_weights",
    "own_part",
    "parallelize",
    "part_file",
    "per_block",
    "placement",
    "seeded_values",
    "self_test",
    "write_tensors",
]
