"""How the model is spread over processes: the process group, and two engines behind one protocol."""

from mega_scale.parallel.communication import Sends, per_block
from mega_scale.parallel.config import ParallelConfig
from mega_scale.parallel.engine import BuildOptimizer, Engine
from mega_scale.parallel.layout import check_layout, describe
from mega_scale.parallel.materialize import Values, fill, seeded_values
from mega_scale.parallel.model_checks import check_vocabulary
from mega_scale.parallel.monitor import Standing
from mega_scale.parallel.parallelize import parallelize
from mega_scale.parallel.self_test import SelfTest, self_test
from mega_scale.parallel.weights import LazyWeights, open_weights
from mega_scale.parallel.window import Place
from mega_scale.parallel.world import Placement, World, placement

__all__ = [
    "BuildOptimizer",
    "Engine",
    "LazyWeights",
    "ParallelConfig",
    "Place",
    "Placement",
    "SelfTest",
    "Sends",
    "Standing",
    "Values",
    "World",
    "check_layout",
    "check_vocabulary",
    "describe",
    "fill",
    "open_weights",
    "parallelize",
    "per_block",
    "placement",
    "seeded_values",
    "self_test",
]
