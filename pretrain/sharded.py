"""Tensors of which every process holds some rows (torch's DTensor, as FSDP2 makes them)."""

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(value: Tensor) -> Tensor:
    """All of a tensor, on every process; where it is sharded all have to call this."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(value: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, which every process has, placed and divided as another of its shape is."""
    value = value.to(other.device)
    if not isinstance(other, DTensor):
        return value
    # No process sends anything: each keeps its rows.
    return distribute_tensor(value, other.device_mesh, other.placements, src_data_rank=None)
