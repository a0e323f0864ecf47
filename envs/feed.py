"""Feeds: the token batches of packed runs, stacked."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from envs.job import epochs
from envs.workload import Tokens


class Rows(NamedTuple):
    """A split on the device: (rows, length) ids and mask, (rows,) labels and lengths.

    With a `Trunk` its (texts, length, width) states are in place of the ids; ``source`` says which
    of them are the rows'.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor
    lengths: NDArray[np.int64]
    source: Tensor | None = None


class Feed(NamedTuple):
    """Stacked batches: (steps, lanes, rows, length) ids and mask, (steps, lanes, rows) labels.

    With a trunk the ids are states, (steps, lanes, rows, length, width).
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor


class Order:
    """The row numbers of every update of a run: a `TorchJob`'s of the same seed."""

    def __init__(self, rows: int, batch: int, seed: int, steps: int) -> None:
        self._source, self._rows, self._steps = epochs(rows, batch, seed), rows, steps
        self._known = next(self._source)

    @property
    def nbytes(self) -> int:
        """Of the row numbers that are known."""
        return self._known.nbytes

    def take(self, start: int, count: int) -> Tensor:
        """(count, batch) row numbers of the updates from ``start`` on."""
        parts, have = [self._known], len(self._known)
        while have < start + count:
            parts.append(next(self._source))
            have += len(parts[-1])
        if len(parts) > 1:
            self._known = torch.cat(parts)
        return self._known[start : start + count]

    def first_use(
        self, ids: Tensor, vocabulary: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """`first_use` of the run's planned updates. ids: (rows, length) of the whole split.

        Only updates with a row that none before had can bring a new token. Two epochs nearly
        always have every row: the first drops less than a batch, the second those by chance.
        """
        planned, first = self._first(min(self._steps, 2 * len(self._known)))
        if len(planned) < self._steps and first.max() == len(planned):
            planned, first = self._first(self._steps)
        fresh = np.zeros(len(planned) + 1, dtype=bool)  # the last is of rows that have no turn
        fresh[first] = True
        ranks, reach = first_use(ids[planned[torch.from_numpy(fresh[:-1])]].numpy(), vocabulary)
        steps = np.minimum(np.arange(self._steps), len(planned) - 1)
        return ranks, reach[(fresh.cumsum() - 1)[steps]]

    def _first(self, steps: int) -> tuple[Tensor, NDArray[np.int64]]:
        """Row numbers of the first updates, and the first of them that has each row, or steps."""
        planned = self.take(0, steps)
        flat = planned.reshape(-1).numpy()
        first = np.full(self._rows, steps, dtype=np.int64)
        first[flat[::-1]] = np.arange(steps).repeat(planned.shape[1])[::-1]
        return planned, first


def first_use(
    ids: NDArray[np.int64], vocabulary: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens in the order of their first use -> their ranks, and how many are in use by step.

    ids: (steps, rows, length) -> (vocabulary,), those never used come last; (steps,).
    """
    steps, size = len(ids), ids[0].size
    flat = ids.reshape(-1)
    first = np.full(vocabulary, flat.size, dtype=np.int64)
    first[flat[::-1]] = np.arange(flat.size - 1, -1, -1)  # the earliest is written last
    opens = np.zeros(flat.size + 1, dtype=bool)  # the last is of the tokens never used
    opens[first] = True
    places = np.flatnonzero(opens[:-1])
    ranks = np.full(vocabulary, -1, dtype=np.int64)
    ranks[flat[places]] = np.arange(len(places))
    ranks[ranks < 0] = np.arange(len(places), vocabulary)
    return ranks, np.searchsorted(places, np.arange(1, steps + 1) * size)


def on_device(
    tokens: Tokens, place: Tensor | None, states: Tensor | None, device: torch.device
) -> Rows:
    """A split's rows. place: token -> row of the run's own table; states: of a trunk."""
    ids = tokens.ids if place is None else place[tokens.ids]
    source = None if states is None else torch.from_numpy(tokens.source).to(device)
    return Rows(
        ids.to(device) if states is None else states,
        tokens.mask.to(device, torch.float32),
        tokens.labels.to(device),
        tokens.lengths,
        source,
    )  # fmt: skip


def feed(lanes: Sequence[int], picks: Mapping[int, tuple[Rows, Tensor]], length: int) -> Feed:
    """Rows of several runs in one stack, cut to a length.

    picks: lane -> its split and (steps, rows) row numbers; lanes without get filler, as do the
    steps that others have more.
    """
    steps = max(len(index) for _, index in picks.values())
    some, index = next(iter(picks.values()))
    shape, device = (steps, len(lanes), index.shape[1]), some.ids.device
    ids = torch.zeros(*shape, length, *some.ids.shape[2:], dtype=some.ids.dtype, device=device)
    mask = torch.ones(*shape, length, device=device)
    labels = torch.zeros(shape, dtype=torch.int64, device=device)
    for number, lane in enumerate(lanes):
        if lane in picks:
            rows, index = picks[lane]
            where = index.to(device)
            entry = where if rows.source is None else rows.source[where]
            ids[: len(index), number] = rows.ids[entry, :length]
            mask[: len(index), number] = rows.mask[where, :length]
            labels[: len(index), number] = rows.labels[where]
    return Feed(ids, mask, labels)


def chunks(rows: int, size: int) -> Tensor:
    """Every row once, (chunks, size) row numbers; the last are filled up with the last row."""
    return torch.arange(-(-rows // size) * size).clamp(max=rows - 1).view(-1, size)
