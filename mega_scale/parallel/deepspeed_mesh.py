"""The mesh as DeepSpeed asks for it: its `mpu`."""

import torch.distributed as dist

from mega_scale.parallel.collectives import Axis


class MeshUnit:
    """Ranks along dp_shard and sp as data-parallel ranks, ranks along tp as model-parallel ones.

    DeepSpeed knows sequence parallelism too, but divides gradients by its size in some ZeRO stages and not in others.
    To it, ranks that share a row are ranks that have different tokens, which they are.

    Args:
        partitions: the ranks over which ZeRO partitions one copy of the model.
        tp: the ranks that share every layer.
    """

    def __init__(self, partitions: Axis, tp: Axis) -> None:
        self._partitions, self._tp = partitions, tp

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        """The ranks over which gradients are averaged, and states partitioned."""
        return self._partitions.group

    def get_data_parallel_rank(self) -> int:
        """This rank among them."""
        return self._partitions.rank

    def get_data_parallel_world_size(self) -> int:
        """Their number."""
        return self._partitions.size

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Their numbers among all ranks."""
        return dist.get_process_group_ranks(self._partitions.group)

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        """The ranks that share every layer."""
        return self._tp.group

    def get_model_parallel_rank(self) -> int:
        """This rank among them."""
        return self._tp.rank

    def get_model_parallel_world_size(self) -> int:
        """Their number."""
        return self._tp.size

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
