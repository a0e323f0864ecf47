"""Crew: rank 0 decides, and all processes carry it out."""

from dataclasses import replace
from typing import Any

from envs.handles import Handles
from envs.instruments import Rates
from envs.knobs import Knobs
from envs.processes import rank, world
from envs.progress import Context, Progress
from envs.snapshot import Snapshot, recall, remember
from tuner import processes
from tuner.guard import alarm
from tuner.logbook import Logbook
from tuner.processes import Order
from tuner.sight import Sight
from tuner.steer import Helm

RENEW = (
    10  # updates at least between two copies of the best weights, when only the guard needs them
)


class Crew:
    """A steered run on one process: the helm, what it is shown, and what it turns."""

    def __init__(
        self, helm: Helm, sight: Sight, rates: Rates, handles: Handles, context: Context,
        optimizer: Any, *, interval: int, step: int,
    ) -> None:  # fmt: skip
        """interval: updates between two decisions. step: where the run begins."""
        self.helm, self.sight, self.rates, self.handles = helm, sight, rates, handles
        self.context, self.knobs = context, handles.given
        self.book = Logbook(next=step)
        self.snapshot: Snapshot | None = None  # the best weights
        self.scale: float | None = None  # that the adapter had with them
        self.failure: Exception | None = None  # of this process; all leave at the next decision
        self.done = False  # nothing is decided any more
        self.run = 0  # a number of chance: which run a checkpoint is of
        self.rank, self.many = rank(), world() > 1
        self._optimizer, self._interval = optimizer, interval

    @property
    def end(self) -> int:
        """Step at which the interval ends."""
        return min(self.book.next, self.context.total)

    def close(self, step: int) -> None:
        """The interval is full: its report is made."""
        self.book.report = self.sight.report(step, self.knobs.rate, self.rates.factor)

    def watch(self, step: int) -> None:
        """Decide at once if the run diverged: before a checkpoint, an evaluation, or the end."""
        if self.helm.advise or self.book.last in (-1, step):
            return
        report = self.book.report or self._glance(step)
        trouble = False
        if self.rank == 0:
            trouble = bool(self._alarm([*self.book.history, self.book.shown(report, None)]))
        (found,), failed = processes.share([trouble], self.sight.eyes.device, self._failing)
        if found or failed:
            if self.book.report is None:
                self.close(step)
            self.decide(step, fresh=False)

    def decide(self, step: int, fresh: bool = True) -> None:
        """One decision. fresh: look at the validation loss."""
        eyes, book = self.sight.eyes, self.book
        knobs = self.handles.given
        order = stop = Order(knobs.rate, rollback=False, off=True, keep=False)
        try:
            book.report = book.report or self._glance(step)
            value = self._validation() if fresh else None
            if self.rank == 0:
                order, knobs = self._think(step, value)
        except Exception as error:
            self.failure = self.failure or error
        numbers, failed = processes.share(
            (*order, *self.handles.numbers(knobs)), eyes.device, self._failing
        )
        order, knobs = Order(*numbers[:4]), self.handles.knobs(numbers[0], *numbers[4:])
        if failed:
            mine = self.failure or eyes.error
            self.helm.fail(mine or RuntimeError("another process failed"), step)
            order, knobs = stop, self.handles.given
        eyes.losses, book.report = [], None
        book.last, book.next = step, (step // self._interval + 1) * self._interval
        if not self.helm.advise:
            scale = self.knobs.adapter_scale
            if order.keep:
                self.snapshot = remember(eyes.parameters, into=self.snapshot)
                self.scale = scale
            if order.rollback and self.snapshot is not None:
                recall(self.snapshot, eyes.parameters, self._optimizer)
                eyes.reshard()
                scale = self.scale
            if order.off:
                self.handles.settle(scale)
            if knobs != self.knobs:
                self.turn(knobs)
        if order.off:
            self.leave()

    def turn(self, knobs: Knobs, *, anew: bool = False) -> None:
        """Put settings in force. anew: whatever is in force now, as after an interrupted run."""
        self.handles.put(knobs, None if anew else self.knobs)
        self.rates.put(knobs.rate)
        self.knobs = knobs
        self.context = replace(self.context, optimizer=knobs.optimizer)

    def give_up(self, error: Exception, step: int) -> None:
        """The tuner failed, on this process alone: the user's settings again."""
        self.done = True
        try:
            self.helm.fail(error, step)
            if not self.helm.advise:
                self.handles.settle(self.knobs.adapter_scale)
                self.turn(self.handles.given)
        finally:
            self.leave()

    def give_back(self, *, loaded: bool) -> None:
        """The run is over: the user's settings again. loaded: as of `Handles.leave`."""
        self.handles.leave(self.knobs, loaded=loaded)
        self.rates.leave(loaded=loaded)
        self.knobs = self.handles.given

    def leave(self) -> None:
        """Decide nothing any more, and keep neither hooks nor weights."""
        self.done, self.snapshot = True, None
        self.sight.close()

    @property
    def _failing(self) -> bool:
        return self.failure is not None or self.sight.eyes.error is not None

    def _glance(self, step: int) -> Progress:
        return self.sight.glance(step, self.knobs.rate, self.rates.factor)

    def _alarm(self, history: list[Progress]) -> str:
        return alarm(history, self.helm.limits, self.knobs.rate / self.helm.start_now)

    def _validation(self) -> float | None:
        """The latest validation loss, if it is a new one."""
        return self.sight.validation() if self.sight.validates else self.book.news()

    def _think(self, step: int, value: float | None) -> tuple[Order, Knobs]:
        """Observe, ask, and say what is to be done. value: a new validation loss."""
        book = self.book
        book.add(book.shown(book.report or self._glance(step), value))
        # A policy rolls back to the very best, as in its training; the guard to a little before.
        after = 0 if self.helm.limits.rollback else RENEW
        keep = not self._alarm(book.history) and book.is_best(after)
        warming = self.rates.warming
        ruling = self.helm.decide(book.history, self.context, self.knobs, warming=warming)
        book.applied = ruling.decision
        now = self.knobs
        if ruling.decision.rollback and self.snapshot is not None and not keep:
            now = now.having(adapter_scale=self.scale)  # weights come back with theirs
        knobs = self.handles.fit(ruling.turn(now, self.context))
        return Order(knobs.rate, ruling.decision.rollback, ruling.off, keep), knobs
