"""Lockstep: code written for one `Job` drives many, and their updates are computed together.

Each caller runs in a greenlet. When its job is asked for something slow it is put to sleep, until
every caller waits; then what they wait for is computed pack by pack. Environments, schedules and
searches need not know of it: `Lockstep.open` is one more way to make a job.
"""

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import greenlet

from envs import workload
from envs.batched import can_compile, fit
from envs.hardware import Plan
from envs.job import Job, Score
from envs.knobs import Knobs
from envs.packed import Family, Pack, family
from envs.progress import Context, Progress
from envs.snapshot import Snapshot
from envs.start import open_job
from envs.task import Split, Task

logger = logging.getLogger(__name__)
T = TypeVar("T")


class _Ask(NamedTuple):
    """What a sleeping caller waits for: updates or a split's score of one lane."""

    pack: Pack
    lane: int
    steps: int
    split: Split | None


class PackedJob:
    """A lane of a pack as a `Job`. The lane is free again when nothing refers to the job."""

    def __init__(self, lockstep: "Lockstep", pack: Pack, lane: int, task: Task) -> None:
        self.task = task
        self._lockstep, self._pack, self._lane = lockstep, pack, lane
        weakref.finalize(self, pack.close, lane)

    @property
    def step(self) -> int:
        """Updates done."""
        return self._pack.step(self._lane)

    @property
    def knobs(self) -> Knobs:
        """The settings in force."""
        return self._pack.knobs(self._lane)

    @property
    def context(self) -> Context:
        """What the observation needs to know of the run as a whole."""
        return self._pack.context(self._lane)

    def advance(self, steps: int) -> Progress:
        """Make ``steps`` updates, together with whoever else waits for some."""
        return self._lockstep.ask(_Ask(self._pack, self._lane, steps, None))

    def apply(self, knobs: Knobs) -> None:
        """Put the settings in force from the next update on."""
        self._pack.apply(self._lane, knobs)

    def evaluate(self, split: Split) -> Score:
        """Judge the weights on a split, together with whoever else waits for that."""
        return self._lockstep.ask(_Ask(self._pack, self._lane, 0, split))

    def snapshot(self) -> Snapshot:
        """The trained weights, copied."""
        return self._pack.snapshot(self._lane)

    def restore(self, snapshot: Snapshot) -> None:
        """Put weights back and forget the optimizer's moments."""
        self._pack.restore(self._lane, snapshot)


class Lockstep:
    """Packs as a plan has them, and the callers that drive them.

    Tasks of one family (see `Family`) share packs; heads have room for ``classes`` classes. A
    model that cannot be batched runs alone, with a notice, and so does a run whose depth or
    adapter may be turned.
    """

    def __init__(self, plan: Plan, *, classes: int = 8) -> None:
        self._plan, self._classes = plan, classes
        self._compiled = plan.compiled and can_compile(plan.device)
        self._packs: dict[tuple[Family, int], list[Pack]] = {}
        self._hub: greenlet.greenlet | None = None
        self._told: set[str] = set()

    def warm(self, task: Task) -> None:
        """Compile what a task's packs need; processes forked later find the code on disk."""
        if self._compiled and task.objective == "classification" and not fit(task).reason:
            job = self.open(task, 0)
            job.advance(1)
            job.evaluate("validation")

    def open(self, task: Task, seed: int, knobs: Knobs | None = None) -> Job:
        """A new run in a free lane, or in a new pack if there is none; a Trainer's runs alone."""
        if task.objective != "classification":
            return open_job(task, seed, knobs)
        reason = fit(task).reason or _alone(task, knobs or Knobs())
        if reason:
            if reason not in self._told:
                self._told.add(reason)
                logger.warning("%s; its runs are computed one by one", reason)
            return open_job(task, seed, knobs, self._plan.device)
        classes = len(workload.load(task).classes)
        room = self._classes
        while room < classes:
            room *= 2
        packs = self._packs.setdefault((family(task), room), [])
        pack = next((pack for pack in packs if pack.free is not None), None)
        if pack is None:
            plan = self._plan
            pack = Pack(
                task, plan.pack, room, compiled=self._compiled, bfloat16=plan.bfloat16,
                device=plan.device,
            )  # fmt: skip
            packs.append(pack)
        lane = pack.free
        assert lane is not None
        pack.open(lane, task, seed, knobs or Knobs())
        return PackedJob(self, pack, lane, task)

    def run(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Each call in a greenlet of its own -> their results; the first exception is raised.

        Whatever jobs of this lockstep the calls use is computed together.
        """
        if self._hub is not None:
            raise RuntimeError("lockstep: run() inside of run(); give all calls to the outer one")
        callers = [greenlet.greenlet(call) for call in calls]
        results: list[Any] = [None] * len(callers)
        asks: dict[int, _Ask] = {}

        def resume(number: int, *answer: Any) -> None:
            result = callers[number].switch(*answer)
            if callers[number].dead:
                results[number] = result
            else:
                asks[number] = result

        self._hub = greenlet.getcurrent()
        try:
            for number in range(len(callers)):
                resume(number)
            while asks:
                # Scores first: who waits for updates is then joined by those who got a score.
                judged = [number for number, ask in asks.items() if ask.split is not None]
                chosen = {number: asks.pop(number) for number in judged or list(asks)}
                for number, answer in self._serve(chosen).items():
                    resume(number, answer)
        finally:
            self._hub = None
        return results

    def ask(self, ask: _Ask) -> Any:
        """Sleep until it is computed; outside of `run` it is computed at once."""
        if self._hub is None:
            return self._serve({0: ask})[0]
        return self._hub.switch(ask)

    def _serve(self, asks: dict[int, _Ask]) -> dict[int, Any]:
        """Number -> what was asked for, all of one kind; a computation a pack."""
        answers: dict[int, Any] = {}
        for pack in {id(ask.pack): ask.pack for ask in asks.values()}.values():
            mine = {ask.lane: (n, ask) for n, ask in asks.items() if ask.pack is pack}
            splits = {lane: ask.split for lane, (_, ask) in mine.items() if ask.split is not None}
            found: dict[int, Any] = (
                dict(pack.evaluate(splits)) if splits
                else dict(pack.advance({lane: ask.steps for lane, (_, ask) in mine.items()}))
            )  # fmt: skip
            answers |= {mine[lane][0]: answer for lane, answer in found.items()}
        return {number: answers[number] for number in asks}


def _alone(task: Task, knobs: Knobs) -> str:
    """Why a run with these knobs cannot share a pack; empty if it can."""
    if knobs.depth is not None:
        return f"{task.name}: depth: cannot be turned in a pack"
    if knobs.adapter_scale is not None and task.adapter == "lora":
        return f"{task.name}: adapter_scale: cannot be turned in a pack"
    return ""
