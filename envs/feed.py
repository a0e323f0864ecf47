"""Feeds: the texts of packed runs, and their batches in one stack."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from envs.job import epochs
from envs.task import Split
from envs.trunk import trunk_of
from envs.workload import Tokens, Workload


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

    def __init__(self, rows: int, batch: int, seed: int) -> None:
        self._source = epochs(rows, batch, seed)
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


class Texts:
    """A workload's rows as a pack takes them, shared by all of its runs."""

    def __init__(self, load: Workload, vocabulary: int, device: torch.device) -> None:
        """vocabulary: tokens of the table if it is trained, or 0.

        The words of the training rows get the first rows of the runs' tables: an update moves
        those alone.
        """
        self._load, self._device = load, device
        self._rows: dict[Split, Rows] = {}
        used = (
            torch.bincount(load.rows["train"].ids.view(-1), minlength=vocabulary)[:vocabulary] > 0
        )
        self.used = int(used.sum())
        self.tokens = torch.cat([torch.nonzero(part).view(-1) for part in (used, ~used)])
        self.place = torch.argsort(self.tokens)  # the row of each token

    @property
    def nbytes(self) -> int:
        """Of the splits in use, without a trunk's states."""
        own = [rows for rows in self._rows.values() if rows.source is None]
        texts = sum(rows.ids.nbytes + rows.mask.nbytes + rows.labels.nbytes for rows in own)
        return texts + self.place.nbytes + self.tokens.nbytes

    def rows(self, split: Split, trunk: bool) -> Rows:
        """A split on the device; made when it is first asked for."""
        if split not in self._rows:
            tokens, states = self._load.rows[split], None
            if trunk:
                states = trunk_of(self._load.task, self._device).states(tokens, split)
            place = self.place if len(self.place) else None
            self._rows[split] = on_device(tokens, place, states, self._device)
        return self._rows[split]


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
