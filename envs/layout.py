"""Layout: where each trained weight of a run lies in its flat row."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from envs import probe
from envs.batched import BatchedModel

Indices = NDArray[np.int64]


class Place(NamedTuple):
    """Columns of a weight, and its shape there (a head has room for more classes)."""

    start: int
    stop: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """A run's weights in one row: those without weight decay, the others, and one zero.

    The token table, if it is trained, is kept apart: see `Pack`.
    """

    places: dict[str, Place]
    undecayed: int  # columns that take no weight decay, the first ones
    width: int  # columns, with the zero at the end
    table: str | None  # name of the token table, if it is trained
    sampled: tuple[tuple[str, tuple[int, ...]], ...]  # what the probe looks at, and its shape

    @property
    def zero(self) -> int:
        """A column that is always zero, for padding."""
        return self.width - 1

    @cached_property
    def head(self) -> list[slice]:
        """Columns of the head."""
        return [slice(place.start, place.stop) for name, place in self.places.items()
                if name.startswith("head.")]  # fmt: skip

    @property
    def alone(self) -> bool:
        """Whether the head is all that is trained."""
        return self.table is None and all(name.startswith("head.") for name in self.places)

    def views(self, rows: Tensor) -> dict[str, Tensor]:
        """(runs, width) -> the weights by name, (runs, *shape) each, sharing memory."""
        return {name: self.view(rows, name) for name in self.places}

    def view(self, rows: Tensor, name: str) -> Tensor:
        """(runs, width) -> one weight, (runs, *shape), sharing memory."""
        place = self.places[name]
        return rows[:, place.start : place.stop].view(-1, *place.shape)

    def flat(self, named: dict[str, Tensor], rows: int, out: Tensor | None = None) -> Tensor:
        """Weights by name, (runs, *shape) each -> (runs, width), in a new tensor or in ``out``."""
        parts = [named[name].reshape(rows, -1) for name in self.places]
        return torch.cat([*parts, parts[0].new_zeros(rows, 1)], 1, out=out)

    def sample(self, classes: int) -> tuple[Indices, Indices]:
        """Columns that the probe looks at in a row, and flat positions in the token table.

        The same weights as in a plain module with that many classes.
        """
        columns, cells = [], np.zeros(0, dtype=np.int64)
        for name, shape in self.sampled:
            shape = (classes, *shape[1:]) if name.startswith("head.") else shape
            count = int(np.prod(shape))
            found = np.arange(0, count, -(-count // probe.SAMPLE), dtype=np.int64)
            if name == self.table:
                cells = found
            else:
                columns.append(found + self.places[name].start)
        return np.concatenate(columns) if columns else np.zeros(0, dtype=np.int64), cells


def lay_out(model: BatchedModel, classes: int) -> Layout:
    """The layout of a family of runs with room for that many classes."""
    named = dict(model.module.named_parameters())
    trained = {name: p for name, p in named.items() if p.requires_grad}
    table = next((name for name, p in trained.items() if model.trains_table
                  and p.data_ptr() == model.table.data_ptr()), None)  # fmt: skip
    order = sorted((n for n in trained if n != table), key=lambda name: trained[name].ndim >= 2)
    places, start, undecayed = {}, 0, 0
    for name in order:
        shape = tuple(trained[name].shape)
        shape = (classes, *shape[1:]) if name.startswith("head.") else shape
        places[name] = Place(start, start + int(np.prod(shape)), shape)
        start = places[name].stop
        undecayed = start if trained[name].ndim < 2 else undecayed
    chosen = {id(p) for p in probe.sampled(list(trained.values()))}
    sampled = tuple((n, tuple(p.shape)) for n, p in trained.items() if id(p) in chosen)
    return Layout(places, undecayed, start + 1, table, sampled)
