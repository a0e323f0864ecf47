"""Processes: how many train together, and sums over all of them."""

import torch
from torch import Tensor


def world() -> int:
    """How many processes train together."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


def rank() -> int:
    """This process's number; 0 decides."""
    return torch.distributed.get_rank() if world() > 1 else 0


def total(tensor: Tensor) -> Tensor:
    """The sum over all processes, in a new tensor; every process has to ask for it."""
    tensor = tensor.detach().clone()
    if world() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor
