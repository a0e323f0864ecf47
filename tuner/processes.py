"""Processes: rank 0 decides, and all carry it out."""

from collections.abc import Iterable
from typing import NamedTuple

import torch


class Order(NamedTuple):
    """What all processes carry out; numbers, so that it can be broadcast."""

    rate: float  # peak
    rollback: float
    off: float
    keep: float  # take a snapshot first


def rank() -> int:
    """This process's number; 0 decides."""
    return torch.distributed.get_rank() if _many() else 0


def share(numbers: Iterable[float], device: torch.device) -> list[float]:
    """Rank 0's numbers on every process."""
    values = [float(number) for number in numbers]
    if not _many():
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.broadcast(tensor, 0)
    return tensor.tolist()


def _many() -> bool:
    distributed = torch.distributed
    return bool(
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )
