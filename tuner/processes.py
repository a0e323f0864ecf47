"""Orders: rank 0 decides, and all processes carry it out."""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from envs.processes import rank, total


class Order(NamedTuple):
    """What all processes carry out; numbers, so that it can be shared."""

    rate: float  # peak
    rollback: float
    off: float
    keep: float  # take a snapshot first


def share(
    numbers: Iterable[float], device: torch.device, failed: bool = False
) -> tuple[list[float], bool]:
    """Rank 0's numbers, and whether the tuner failed on any process: the same on all of them."""
    mine = [float(number) if rank() == 0 else 0.0 for number in numbers]
    tensor = torch.tensor([*mine, float(failed)], dtype=torch.float64, device=device)
    *shared, failures = total(tensor).tolist()
    return shared, failures > 0
