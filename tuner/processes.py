"""Processes: rank 0 decides, and all carry it out."""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch

from envs.knobs import OPTIMIZERS, Knobs


class Order(NamedTuple):
    """What all processes carry out; numbers, so that it can be broadcast."""

    rate: float  # peak
    rollback: float
    off: float
    keep: float  # take a snapshot first
    optimizer: float  # place in `OPTIMIZERS`
    weight_decay: float
    clip: float
    depth: float  # NaN: the run has no such knob

    def knobs(self, now: Knobs) -> Knobs:
        """The settings to put in force."""
        return replace(
            now,
            rate=self.rate,
            optimizer=OPTIMIZERS[int(self.optimizer)],
            weight_decay=self.weight_decay,
            clip=self.clip,
            depth=None if math.isnan(self.depth) else int(self.depth),
        )


def order(knobs: Knobs, *, rollback: bool, off: bool, keep: bool) -> Order:
    """What is to be done, with the settings from then on."""
    depth = math.nan if knobs.depth is None else knobs.depth
    kind = OPTIMIZERS.index(knobs.optimizer)
    return Order(knobs.rate, rollback, off, keep, kind, knobs.weight_decay, knobs.clip, depth)


def rank() -> int:
    """This process's number; 0 decides."""
    return torch.distributed.get_rank() if _many() else 0


def processes() -> int:
    """How many there are."""
    return torch.distributed.get_world_size() if _many() else 1


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
