"""Parameters of which a rank holds one part along a dimension, or all, while activations are cut over channels.

The residual stream, the moving average, gates, values and hidden units are cut over the ranks of `tp`; queries and keys
are computed by every rank, but each sees only what its own values made of them. So the gradient of a parameter that
every rank holds is a sum over ranks of parts, and it is summed where the parameter is read.
"""

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mega_scale.parallel.collectives import Axis, sum_gradient


class TensorParallel(nn.Module):
    """A module whose parameters are this rank's parts; reading one gives what the module's arithmetic needs.

    Mixed into a module of the model, it leaves that module's forward as it is.

    Attributes:
        shards: dimension along which a parameter is cut, by its name; a parameter that is not named is whole.
        length: of that dimension in the whole, where ranks need not divide it; none where they do.
        axis: the ranks that share the layer.
    """

    shards: ClassVar[dict[str, int]] = {}
    length: int | None = None
    axis: Axis

    def __getattr__(self, name: str) -> Any:
        value: Any = super().__getattr__(name)
        if name not in self.__dict__["_parameters"] or value is None:
            return value
        if isinstance(value, DTensor) and value.device_mesh.ndim > 1:
            return value  # sharded by FSDP, which reads it in this way too; nobody computes with it
        local: Tensor = value.to_local() if isinstance(value, DTensor) else value
        return local if name in self.shards else sum_gradient(local, self.axis)


def share(length: int, ranks: int) -> int:
    """What each rank has of a length: the same, so that the last ranks' parts end in what is not used."""
    return -(-length // ranks)


def shard_dimension(owner: nn.Module, name: str) -> int | None:
    """The dimension along which a parameter is cut over `tp`; none where every rank holds it whole."""
    return owner.shards.get(name) if isinstance(owner, TensorParallel) else None
