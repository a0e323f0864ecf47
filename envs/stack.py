"""Stacks: the trained weights of several runs, a row a lane, and the updates that move them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from envs import optim
from envs.errors import BadInput
from envs.head import further
from envs.knobs import Knobs
from envs.layout import Layout
from envs.snapshot import Snapshot


class Turn(NamedTuple):
    """One update of one lane: how its optimizer moves."""

    lane: int
    knobs: Knobs
    rate: float
    age: int  # updates since the moments were forgotten, this one included
    reach: int  # rows of the table that have a gradient or moments


class Part:
    """Weights, moments and slopes (gradients), (lanes, columns) each."""

    def __init__(self, lanes: int, columns: int, device: torch.device) -> None:
        self.weights, self.first, self.second, self.slope = torch.zeros(
            4, lanes, columns, device=device
        )
        self.whole = (self.weights, self.slope, self.first, self.second)
        self.lanes = list(zip(*(part.split(1) for part in self.whole), strict=True))


class Segment(NamedTuple):
    """Columns of a part that share a weight decay."""

    part: Part
    start: int
    stop: int
    decay: float

    def of(self, lanes: Tensor) -> list[Tensor]:
        """Weights, slopes and moments of some lanes, (lanes, columns) each, copied."""
        return [x[lanes, self.start : self.stop] for x in self.part.whole]

    def at(self, lane: int) -> list[Tensor]:
        """The same of one lane, (1, columns) each; views."""
        size, mine = self.stop - self.start, self.part.lanes[lane]
        if size == mine[0].shape[1]:
            return list(mine)
        return [x.narrow(1, self.start, size) for x in mine]


class Stack:
    """The weights of all lanes in two parts: rows as a `Layout` has them, and token tables.

    The first rows of a table are those that updates can touch. As long as there is no weight decay
    the others have neither gradient nor moments, and on a CPU nothing looks at them.
    """

    def __init__(
        self, layout: Layout, tokens: int, width: int, lanes: int, device: torch.device
    ) -> None:
        """tokens, width: of the table; no tokens where it is not trained."""
        self.layout, self.device, self.width = layout, device, width
        self.row = Part(lanes, layout.width, device)
        self.table = Part(lanes, tokens * width, device)
        self._used = [0] * lanes  # columns of the tables that may have moments
        self._moved = [0] * lanes  # rows of the tables that are not as they began
        self._tokens: list[Tensor | None] = [None] * lanes
        self._columns = torch.full((lanes, 0), 0, device=device)
        self._cells = torch.full((lanes, 0), 0, device=device)
        self._sampled: list[Tensor | None] = [None] * lanes  # what `_columns` was made of

    @property
    def nbytes(self) -> int:
        """Of all lanes: weights, slopes and moments, and where the probe looks."""
        parts = sum(4 * part.weights.nbytes for part in (self.row, self.table))
        return parts + self._columns.nbytes + self._cells.nbytes

    def begin(self, lane: int, row: Tensor, columns: Tensor, cells: Tensor) -> None:
        """New weights in a lane. columns, cells: what the probe samples of row and table."""
        self.row.weights[lane] = row
        self._forget(lane)
        zero = self.layout.zero
        if columns.numel() > self._columns.shape[1]:
            more = columns.numel() - self._columns.shape[1]
            offsets = torch.arange(len(self._columns), device=self.device)[:, None]
            padding = (offsets * self.layout.width + zero).expand(-1, more)
            self._columns = torch.cat([self._columns, padding], 1)
        if cells.numel() != self._cells.shape[1]:
            self._cells = self._cells.new_zeros(len(self._cells), cells.numel())
        if self._sampled[lane] is not columns:
            self._sampled[lane] = columns
            mine, count = self._columns[lane], columns.numel()
            mine[:count] = columns.to(self.device) + lane * self.layout.width
            mine[count:] = lane * self.layout.width + zero
        self._cells[lane] = cells.to(self.device) + lane * self.table.weights.shape[1]

    def begin_table(self, lane: int, table: Tensor, tokens: Tensor) -> None:
        """A new (tokens, width) table in a lane. tokens: the token of each row.

        Where the lane had the same rows before, those that did not move are still there.
        """
        rows = self._moved[lane] if self._tokens[lane] is tokens else len(tokens)
        self._tokens[lane], self._moved[lane] = tokens, 0
        mine = self.table.weights[lane].view_as(table)[:rows]
        torch.index_select(table, 0, tokens[:rows].to(self.device), out=mine)

    def snapshot(self, lane: int) -> Snapshot:
        """A lane's weights, copied."""
        return [self.row.weights[lane].clone(), self.table.weights[lane].clone()]

    def restore(self, lane: int, snapshot: Snapshot) -> None:
        """Put weights back and forget the moments."""
        for part, weights in zip((self.row, self.table), snapshot, strict=True):
            if weights.shape != part.weights[lane].shape:
                raise BadInput("snapshot: it belongs to another run; restore a run's own")
            part.weights[lane] = weights
        self._forget(lane)

    def _forget(self, lane: int) -> None:
        used, self._used[lane] = self._used[lane], 0
        for part, stop in ((self.row, self.layout.width), (self.table, used)):
            part.first[lane, :stop] = 0.0
            part.second[lane, :stop] = 0.0

    def hand_over(self, lane: int, old: Knobs, new: Knobs, age: int) -> bool:
        """Change the optimizer -> whether it inherits anything."""
        step, kept = torch.tensor(float(age), device=self.device), False
        for part in (self.row, self.table):
            has = optim.inherit(
                old.optimizer,
                new.optimizer,
                part.first[lane].clone() if optim.FIRST[old.optimizer] else None,
                part.second[lane].clone() if optim.SECOND[old.optimizer] else None,
                step,
            )
            for moments, value in zip((part.first, part.second), has, strict=True):
                moments[lane] = 0.0 if value is None else value
                kept = kept or value is not None
        return kept

    def finite(self) -> Tensor:
        """(lanes,) a number that is finite if all weights of the lane are."""
        return self.row.weights.sum(1) + self.table.weights.sum(1)

    def sample(self, lanes: Tensor, what: str) -> Tensor:
        """(runs, entries): the probe's sample of ``weights`` or ``slope``."""
        row, table = getattr(self.row, what), getattr(self.table, what)
        columns, cells = self._columns, self._cells
        if len(lanes) < len(columns):
            columns, cells = columns[lanes], cells[lanes]
        return torch.cat([torch.take(row, columns), torch.take(table, cells)], 1)

    def clip(self, turns: Sequence[Turn]) -> None:
        """Scale slopes down to each run's largest norm, as ``clip_grad_norm_`` does."""
        if self.device.type != "cpu":
            self._clip_together(turns)
            return
        for turn in turns:
            if not turn.knobs.clip:
                continue
            row = self.row.slope[turn.lane]
            table = self.table.slope[turn.lane, : turn.reach * self.width]
            norm = math.hypot(*(torch.linalg.vector_norm(part).item() for part in (row, table)))
            share = turn.knobs.clip / (norm + 1e-6)
            if not share >= 1:  # a norm of NaN spoils the row, as in a plain run
                row.mul_(share)
            if share < 1:
                table.mul_(share)

    def clear(self, cells: Tensor) -> None:
        """Set the slopes of the tables back to zero. cells: the rows that have one."""
        if self.device.type == "cpu":
            self.table.slope.view(-1, self.width).index_fill_(0, cells, 0.0)
        else:  # clipping by NaN may have left traces anywhere
            self.table.slope.zero_()

    def step(self, turns: Sequence[Turn]) -> None:
        """One optimizer update of each lane; slopes are used up."""
        lifted = [(turn.lane, place, self.row.weights[turn.lane, place].clone(), times)
                  for turn in turns if (times := turn.knobs.head_rate) not in (None, 1)
                  for place in self.layout.head]  # fmt: skip
        self._step(turns)
        for lane, place, before, times in lifted:
            mine = self.row.weights[lane, place]
            mine.copy_(further(before, mine, times))

    def _step(self, turns: Sequence[Turn]) -> None:
        on_cpu = self.device.type == "cpu"
        for turn in turns:
            columns = turn.reach * self.width if on_cpu else self.table.weights.shape[1]
            self._used[turn.lane] = max(self._used[turn.lane], columns)
            self._moved[turn.lane] = max(self._moved[turn.lane], columns // self.width)
        if not on_cpu:
            self._step_together(turns)
            return
        for turn in turns:
            segments = self._segments(turn.knobs.weight_decay, turn.reach * self.width)
            if turn.knobs.optimizer == "adamw":
                _fused_adamw(turn, segments)
                continue
            for segment in segments:
                weights, slope, first, second = segment.at(turn.lane)
                optim.update(
                    turn.knobs.optimizer, weights, slope, first, second,
                    step=torch.tensor([[float(turn.age)]]), rate=torch.tensor([[turn.rate]]),
                    decay=torch.tensor([[segment.decay]]),
                )  # fmt: skip

    def _segments(self, decay: float, reach: int) -> list[Segment]:
        edge, width = self.layout.undecayed, self.layout.width
        if not decay:
            return [Segment(self.row, 0, width, 0.0), Segment(self.table, 0, reach, 0.0)]
        return [
            Segment(self.row, 0, edge, 0.0),
            Segment(self.row, edge, width, decay),
            Segment(self.table, 0, reach, decay),
        ]

    def _clip_together(self, turns: Sequence[Turn]) -> None:
        """All lanes at once, with nothing read from the device."""
        lanes = torch.tensor([turn.lane for turn in turns], device=self.device)
        most = torch.tensor([turn.knobs.clip or float("inf") for turn in turns], device=self.device)
        norms = torch.hypot(self.row.slope[lanes].norm(dim=1), self.table.slope[lanes].norm(dim=1))
        share = (most / (norms + 1e-6)).clamp(max=1.0)[:, None]
        for part in (self.row, self.table):
            part.slope[lanes] = part.slope[lanes] * share

    def _step_together(self, turns: Sequence[Turn]) -> None:
        """All lanes of an optimizer at once: few launches for many runs."""
        for kind in sorted({turn.knobs.optimizer for turn in turns}):
            mine = [turn for turn in turns if turn.knobs.optimizer == kind]
            lanes = torch.tensor([turn.lane for turn in mine], device=self.device)
            columns = torch.tensor(
                [[t.age, t.rate, t.knobs.weight_decay] for t in mine],
                dtype=torch.float32, device=self.device,
            )  # fmt: skip
            step, rate, decay = columns.T[..., None]
            edge, width = self.layout.undecayed, self.layout.width
            for segment, own in (
                (Segment(self.row, 0, edge, 0.0), decay * 0),
                (Segment(self.row, edge, width, 0.0), decay),
                (Segment(self.table, 0, self.table.weights.shape[1], 0.0), decay),
            ):
                weights, slope, first, second = segment.of(lanes)
                optim.update(kind, weights, slope, first, second, step=step, rate=rate, decay=own)
                start, stop, part = segment.start, segment.stop, segment.part
                part.weights[lanes, start:stop] = weights
                part.first[lanes, start:stop] = first
                part.second[lanes, start:stop] = second


def _fused_adamw(turn: Turn, segments: Sequence[Segment]) -> None:
    """The kernel that ``torch.optim.AdamW(fused=True)`` calls, on whole segments."""
    step = torch.tensor(float(turn.age))
    for decay in sorted({segment.decay for segment in segments}):
        mine = [segment.at(turn.lane) for segment in segments
                if segment.decay == decay]  # fmt: skip
        weights, slope, first, second = (list(x) for x in zip(*mine, strict=True))
        torch._fused_adamw_(
            weights, slope, first, second, [], [step] * len(mine), lr=turn.rate,
            beta1=optim.BETA1, beta2=optim.BETA2, weight_decay=decay, eps=optim.EPSILON,
            amsgrad=False, maximize=False,
        )  # fmt: skip
