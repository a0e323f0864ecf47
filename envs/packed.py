"""Packed runs: several fine-tuning runs of one family advance together in one batched model."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from envs import memory, probe, workload
from envs.batched import LOWEST, Batch, BatchedModel, fit
from envs.chance import RandomState
from envs.errors import BadInput
from envs.feed import Feed, Order, Rows, Texts, chunks, feed
from envs.job import Score, spread
from envs.knobs import Knobs, factor
from envs.layout import lay_out
from envs.progress import Context, Progress
from envs.snapshot import Snapshot
from envs.stack import Stack, Turn
from envs.task import Split, Task

CHUNK = 32  # rows judged together: 64 would be a tenth faster and take a third more memory
BUFFERS = 3 << 20  # bytes of code and room that libraries take when they are first used
HOLES = 1.35  # bytes that the allocator holds for a byte of work; measured, see `_bytes`
EDGE = 8  # lengths are multiples of it, so that many tasks are of one family


class Family(NamedTuple):
    """What runs must share to be packed: shapes, and what is trained."""

    model: str
    adapter: str
    trainable_layers: int | None
    batch: int
    dropout: float
    pooling: str
    interval: int  # so that no lane waits for another
    length: int  # of every batch, so that a run's numbers do not depend on its neighbours


@functools.lru_cache(maxsize=256)
def family(task: Task) -> Family:
    """The family of a task's runs."""
    longest = max(int(rows.lengths.max()) for rows in workload.load(task).rows.values())
    length = min(-(-longest // EDGE) * EDGE, task.max_length)
    return Family(
        task.model, task.adapter, task.trainable_layers, task.batch, task.dropout, task.pooling,
        task.interval, length,
    )  # fmt: skip


@dataclass
class _Run:
    """What a pack knows of one of its runs, apart from its weights."""

    task: Task
    load: workload.Workload
    knobs: Knobs
    start_rate: float
    order: Order
    texts: Texts
    step: int = 0  # updates done
    age: int = 0  # updates since the moments were last forgotten
    whole: bool = False  # weight decay has moved rows that no update touched


class Pack:
    """Room for ``lanes`` runs of one family.

    A run equals a `TorchJob`'s of the same task, seed and knobs up to rounding (dropout, if there
    is any, is drawn otherwise). What one run does never changes another's numbers. On a GPU
    nothing is read from the device before the last update of an interval.
    """

    def __init__(
        self, task: Task, lanes: int, classes: int, *, together: int | None = None,
        compiled: bool = False, bfloat16: bool = False, device: str | torch.device = "cpu",
    ) -> None:  # fmt: skip
        """classes: room in the heads. together: lanes computed at a time, by default all."""
        self.family, self.lanes, self.compiled = family(task), lanes, compiled
        self._device = torch.device(device)
        self._model = BatchedModel(
            task, fit(task), compiled=compiled, device=self._device, together=together or lanes,
            bfloat16=bfloat16,
        )  # fmt: skip
        self._layout = lay_out(self._model, classes)
        self._classes = torch.zeros(lanes, classes, device=self._device)
        named = dict(self._model.module.named_parameters())
        self._pretrained = torch.zeros(1, self._layout.width, device=self._device)
        for name, view in self._layout.views(self._pretrained).items():
            if not name.startswith("head."):
                view[0] = named[name].detach()
        tokens = self._model.table.shape[0] if self._layout.table else 0
        self._stack = Stack(self._layout, tokens, self._model.width, lanes, self._device)
        self._views = self._layout.views(self._stack.row.weights)
        self._runs: list[_Run | None] = [None] * lanes
        self._texts: WeakValueDictionary[Task, Texts] = WeakValueDictionary()
        self._samples: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._random = RandomState(0, [self._device])

    @property
    def lane_bytes(self) -> int:
        """Of a lane's weights, moments and slopes, and of its run's order."""
        runs = [run for run in self._runs if run is not None]
        orders = sum(run.order.nbytes for run in runs)
        return self._stack.nbytes // self.lanes + orders // max(1, len(runs))

    @property
    def shared_bytes(self) -> int:
        """Of what there is once for all lanes: encoder, pretrained weights, texts of each task."""
        module = self._model.module
        weights = sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])
        texts = sum(texts.nbytes for texts in self._texts.values())
        return weights + self._pretrained.nbytes + texts

    # -- opening and closing -----------------------------------------------------------------

    @property
    def free(self) -> int | None:
        """A lane without a run, or None."""
        return next((lane for lane, run in enumerate(self._runs) if run is None), None)

    def open(self, lane: int, task: Task, seed: int, knobs: Knobs) -> None:
        """Begin a run: pretrained weights, a new head, a new data order.

        Of the dials it has weight decay, clipping and the head's rate.
        """
        knobs = self._own(knobs)
        if family(task) != self.family:
            raise BadInput(f"pack: {family(task)} cannot share one with {self.family}")
        load = workload.load(task)
        if len(load.classes) > self._classes.shape[1]:
            raise BadInput(
                f"pack: {len(load.classes)} classes; it has room for {self._classes.shape[1]}"
            )
        order_seed, head, _ = spread(seed, 3)
        order = Order(len(load.rows["train"]), task.batch, order_seed)
        columns, tokens, cells = self._sample(len(load.classes))
        texts = self._texts.get(task)
        if texts is None:
            vocabulary = len(self._model.table) if self._layout.table else 0
            texts = self._texts[task] = Texts(load, vocabulary, self._device)
        if self._layout.table:
            self._stack.begin_table(lane, self._model.table, texts.tokens)
            cells = texts.place[tokens].mul_(self._model.width).add_(cells)
        self._stack.begin(lane, self._pretrained[0], columns, cells)
        row = self._stack.row.weights[lane : lane + 1]
        for name, drawn in load.drawn(head).items():
            view = self._layout.view(row, name)[0]
            view[tuple(slice(size) for size in drawn.shape)] = drawn.to(self._device)
        self._classes[lane] = LOWEST
        self._classes[lane, : len(load.classes)] = 0.0
        self._runs[lane] = _Run(task, load, knobs, knobs.rate, order, texts)

    def close(self, lane: int) -> None:
        """The run is over; its lane is free."""
        self._runs[lane] = None

    def step(self, lane: int) -> int:
        """Updates done by a run."""
        return self._run(lane).step

    def knobs(self, lane: int) -> Knobs:
        """The settings in force."""
        return self._run(lane).knobs

    def context(self, lane: int) -> Context:
        """What the observation needs to know of a run."""
        run = self._run(lane)
        classes = len(run.load.classes)
        return Context(
            total=run.task.steps,
            decisions=run.task.decisions,
            parameters=self._model.parameters + classes * (run.load.width + 1),
            rows=len(run.load.rows["train"]),
            classes=classes,
            adapter=run.task.adapter,
            optimizer=run.knobs.optimizer,
            start_rate=run.start_rate,
        )

    # -- a run's verbs -----------------------------------------------------------------------

    def advance(self, wanted: Mapping[int, int]) -> dict[int, Progress]:
        """Lane -> updates to make; reports as of `TorchJob.advance`."""
        longest, lanes = max(wanted.values()), self._computed(wanted)
        picks: dict[int, tuple[Split, Tensor]] = {
            lane: ("train", self._run(lane).order.take(self._run(lane).step, steps))
            for lane, steps in wanted.items()
        }
        fed, look = self._feed(lanes, picks), _Look()
        losses = torch.empty(longest, len(lanes), device=self._device)
        with self._random.lent():
            for number in range(longest):
                left = {lane: wanted[lane] - number for lane in sorted(wanted)
                        if wanted[lane] > number}  # fmt: skip
                losses[number] = self._update(lanes, self._batch(lanes, fed, number), left, look)
        table = torch.cat([losses.T, self._stack.finite()[lanes, None], look.figures(lanes)], 1)
        rows = dict(zip(lanes, table.tolist(), strict=True))
        return {lane: self._report(lane, steps, rows[lane], longest)
                for lane, steps in wanted.items()}  # fmt: skip

    def apply(self, lane: int, knobs: Knobs) -> None:
        """Put settings in force; a new optimizer inherits the old one's moments."""
        run, old = self._run(lane), self._run(lane).knobs
        knobs = self._own(knobs)
        if knobs.head_rate is None:
            knobs = knobs.having(head_rate=old.head_rate)
        changed = (knobs.optimizer, knobs.weight_decay) != (old.optimizer, old.weight_decay)
        if changed and run.age and not self._stack.hand_over(lane, old, knobs, run.age):
            run.age = 0
        run.knobs = knobs

    def evaluate(self, wanted: Mapping[int, Split]) -> dict[int, Score]:
        """Lane -> split; scores as of `TorchJob.evaluate`."""
        lanes = self._computed(wanted)
        sizes = {lane: len(self._run(lane).load.rows[split]) for lane, split in wanted.items()}
        parts = {lane: chunks(size, CHUNK) for lane, size in sizes.items()}
        sums = torch.zeros(2, len(lanes), device=self._device)
        weights = self._weights(lanes)
        for number in range(max(map(len, parts.values()))):
            picks = {lane: (wanted[lane], part[number : number + 1])
                     for lane, part in parts.items() if number < len(part)}  # fmt: skip
            batch, _ = self._batch(lanes, self._feed(lanes, picks), 0)
            real = [min(max(sizes.get(lane, 0) - number * CHUNK, 0), CHUNK) for lane in lanes]
            counted = torch.arange(CHUNK) < torch.tensor(real)[:, None]
            results = torch.stack(self._model.rows(weights, batch))
            sums += torch.where(counted.to(self._device), results, 0.0).sum(2)
        found = dict(zip(lanes, sums.T.tolist(), strict=True))
        return {lane: Score(*(total / sizes[lane] for total in found[lane])) for lane in wanted}

    def snapshot(self, lane: int) -> Snapshot:
        """A run's trained weights, copied; they fit this run alone."""
        return self._stack.snapshot(lane)

    def restore(self, lane: int, snapshot: Snapshot) -> None:
        """Put weights back and forget the optimizer's moments; the knobs stay."""
        self._stack.restore(lane, snapshot)
        self._run(lane).age = 0

    def named(self, lane: int) -> dict[str, Tensor]:
        """A run's trained weights by the names and in the shapes of the plain module."""
        run = self._run(lane)
        found = {
            name: view[0, : len(run.load.classes)] if name.startswith("head.") else view[0]
            for name, view in self._weights([lane]).items()
        }
        if self._layout.table:
            table = self._stack.table.weights[lane].view(self._model.table.shape)
            found[self._layout.table] = table[run.texts.place.to(self._device)]
        return found

    # -- behind them -------------------------------------------------------------------------

    def _own(self, knobs: Knobs) -> Knobs:
        """The knobs that a run in a pack has."""
        knobs = knobs.having(adapter_scale=None, beta=None, depth=None)
        alone = self._layout.alone  # there is no rate that the head's could be a multiple of
        return knobs.having(head_rate=None) if alone else knobs

    def _run(self, lane: int) -> _Run:
        run = self._runs[lane]
        assert run is not None, "the lane is free"
        return run

    def _sample(self, classes: int) -> tuple[Tensor, Tensor, Tensor]:
        """`Layout.sample`, made once for each number of classes.

        Columns of the row, then rows of the token table and the places in those.
        """
        if classes not in self._samples:
            columns, cells = (torch.from_numpy(x) for x in self._layout.sample(classes))
            width = self._model.width
            self._samples[classes] = columns, cells // width, cells % width
        return self._samples[classes]

    def _computed(self, wanted: Mapping[int, object]) -> list[int]:
        """The lanes that are computed: compiled code knows one number of them alone."""
        return list(range(self.lanes)) if self.compiled else sorted(wanted)

    def _weights(self, lanes: list[int]) -> dict[str, Tensor]:
        if len(lanes) == self.lanes:
            return self._views
        return self._layout.views(self._stack.row.weights[lanes])

    def _feed(self, lanes: list[int], picks: Mapping[int, tuple[Split, Tensor]]) -> Feed:
        found = {lane: (self._rows(lane, split), index) for lane, (split, index) in picks.items()}
        return feed(lanes, found, self.family.length)

    def _rows(self, lane: int, split: Split) -> Rows:
        return self._run(lane).texts.rows(split, self._model.fit.trunk)

    def _batch(self, lanes: list[int], fed: Feed, number: int) -> tuple[Batch, Tensor]:
        """The model's inputs at one step of a feed, and which rows of the tables are in them."""
        (ids, mask, labels), width = (part[number] for part in fed), self._model.width
        cells, states = ids.new_zeros(0), ids
        if not self._model.fit.trunk:
            cells, table = ids.reshape(-1), self._model.table
            if self._layout.table:
                offsets = torch.tensor(lanes, device=self._device) * len(table)
                cells = (ids + offsets[:, None, None]).view(-1)
                table = self._stack.table.weights.view(-1, width)
            states = table.index_select(0, cells).view(*ids.shape, width)
        return Batch(states, mask, labels, self._classes[lanes]), cells

    def _update(
        self, lanes: list[int], batch: tuple[Batch, Tensor], left: Mapping[int, int],
        look: "_Look",
    ) -> Tensor:  # fmt: skip
        """One update of the lanes in ``left`` (lane -> updates left) -> losses of all lanes."""
        stack, (inputs, cells) = self._stack, batch
        by_name, states, losses = self._model.gradients(self._weights(lanes), inputs)
        if len(lanes) == self.lanes:
            self._layout.flat(by_name, len(lanes), stack.row.slope)
        else:
            stack.row.slope[lanes] = self._layout.flat(by_name, len(lanes))
        if states is not None:
            slope = stack.table.slope.view(-1, self._model.width)
            slope.index_add_(0, cells, states.reshape(-1, self._model.width))
        turns = [self._turn(lane) for lane in left]
        near = [lane for lane, count in left.items() if count <= 2]
        last = [lane for lane, count in left.items() if count == 1]
        look.at("gradient", near, stack)
        stack.clip(turns)
        look.at("clipped", last, stack)
        look.at("weights", last, stack)
        stack.step(turns)
        look.at("moved", last, stack)
        if states is not None:
            stack.clear(cells)
        return losses

    def _turn(self, lane: int) -> Turn:
        """The next update of a lane, counted as done."""
        run = self._run(lane)
        rate = run.knobs.rate * factor(run.knobs, run.step, run.task.steps)
        run.whole = run.whole or run.knobs.weight_decay > 0
        run.step, run.age = run.step + 1, run.age + 1
        tokens = len(self._model.table) if self._layout.table else 0
        return Turn(lane, run.knobs, rate, run.age, tokens if run.whole else run.texts.used)

    def _report(self, lane: int, steps: int, row: list[float], longest: int) -> Progress:
        run = self._run(lane)
        gradient, clipped, update, cosine = probe.reading(row[longest + 1 :])
        return Progress(
            step=run.step,
            rate=run.knobs.rate,
            factor=factor(run.knobs, run.step, run.task.steps),
            losses=tuple(row[:steps]),
            gradient=gradient,
            clipped=clipped,
            update=update,
            cosine=cosine,
            finite=math.isfinite(row[longest]),
        )


class _Look:
    """The probe's samples around the last two updates of an interval, run by run."""

    def __init__(self) -> None:
        self._seen: dict[str, dict[int, list[Tensor]]] = {}

    def at(self, moment: str, lanes: list[int], stack: Stack) -> None:
        """Sample slopes (moments ``gradient`` and ``clipped``) or weights of these lanes."""
        if lanes:
            what = "slope" if moment in ("gradient", "clipped") else "weights"
            samples = stack.sample(torch.tensor(lanes, device=stack.device), what)
            for lane, sample in zip(lanes, samples, strict=True):
                self._seen.setdefault(moment, {}).setdefault(lane, []).append(sample)

    def figures(self, lanes: list[int]) -> Tensor:
        """(lanes, 6) as `probe.figures` has them; NaN for lanes that were not looked at."""
        seen = self._seen
        some = next(iter(seen["gradient"].values()))[0]
        none = [torch.full_like(some, math.nan)] * 2

        def every(moment: str, which: int) -> Tensor:
            return torch.stack([(none + seen[moment].get(lane, []))[which] for lane in lanes])

        weights = every("weights", -1)
        return probe.figures(
            every("gradient", -1), every("clipped", -1), every("moved", -1) - weights, weights,
            every("gradient", -2),
        )  # fmt: skip


def predict(task: Task, lanes: int, classes: int = 8) -> int:
    """Bytes that a pack of a task's runs will take at its peak, computed together.

    Linear in the lanes: what each needs, and what is there once for all of them.
    """
    each, once = _bytes(task, classes)
    return lanes * each + once + BUFFERS


@functools.lru_cache(maxsize=64)
def _bytes(task: Task, classes: int) -> tuple[int, int]:
    """Bytes of one lane and of what all lanes share, from a pack of two.

    Updates and scores ask for blocks of other sizes: what one has freed is of little use to the
    other, so that their peaks add up. What is freed the allocator keeps, in pieces between blocks
    in use, but for blocks of 32 MiB and more, which large packs have: packs of 1 to 256 runs of
    the shipped encoders hold 1.1 to 1.7 bytes for each of work.
    """
    small = Pack(task, 2, classes)
    for lane in range(2):
        small.open(lane, task, lane, Knobs())
    working = 0
    for call in (
        functools.partial(small.advance, dict.fromkeys(range(2), task.interval)),
        functools.partial(small.evaluate, dict.fromkeys(range(2), "validation")),
    ):
        call()  # what is made once, as the texts of a split, is not of its work
        working += memory.peak(call)
    return small.lane_bytes + round(HOLES * working / 2), small.shared_bytes
