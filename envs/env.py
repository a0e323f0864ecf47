"""FineTuneEnv: the Gymnasium view of one fine-tuning job."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import gymnasium
import numpy as np

from envs import workload
from envs.errors import BadInput, UnknownName
from envs.job import Job, report_start, with_validation
from envs.knobs import (
    OPTIMIZERS,
    RATE_CEILING,
    RATE_FLOOR,
    SHAPES,
    Actions,
    Knobs,
    Optimizer,
    Shape,
    decode,
    exchange,
    opened,
    reference_rate,
    turn,
)
from envs.observe import mean_loss, observe, space
from envs.progress import Context, Progress
from envs.reward import CEILING, crash, gain
from envs.start import data_of, open_job
from envs.task import Task, find, vary

MakeJob = Callable[[Task, int, Knobs], Job]

EXPLORE = 10**1.5  # a tuner may move the rate by 1.5 decades either way of the start
LIKELY: tuple[Shape, ...] = ("linear", "linear", "cosine", "constant")
OPTIONS = ("rate", "task")  # of `reset`
BLOWN = math.exp(CEILING)  # a validation loss so many times the first one is a divergence


class FineTuneEnv(gymnasium.Env[np.ndarray, Any]):
    """Fine-tune a model; each action adjusts the run, and better validation loss is paid.

    Observation: ``Box(-5, 5, (30,), float32)``, listed with units in ``envs.observe.FEATURES``:
        progress and schedule, rate against the start and against a rule of thumb, training and
        validation loss as log-ratios and slopes, noise, gradient and update statistics, the last
        decision, and the size of the job. Nothing in it ties it to one job; never NaN.

    Action: discrete by default (``envs.knobs.Actions``): multiply the rate by 0.1, 0.3, 0.6, 1
        (keep), 1.6, 3 or 10; or roll back to the weights with the best validation loss seen and
        halve the rate. ``Actions(optimizers=...)`` adds a switch to each, ``Actions(turns=...)``
        steps of further knobs, which do nothing on a job without them. The continuous view is
        ``Box(-1, 1, (2,))``: decades to move the rate by, and rollback if above 0.5. The rate
        stays within 1.5 decades of the start; the schedule's shape multiplies it. The first
        action is taken before the first update.

    Reward: the rise, in the interval, of the signed square root of log(first / present validation
        loss). It telescopes, so with a discount of 1 the return is the final quality alone.
        Divergence ends the episode at the lower bound of -1 and costs 1 more.

    Start: pretrained weights, a new head, a new data order, and a rate drawn within ``spread``
        decades of ``reference_rate``; with ``vary`` also a random relative of the task (classes,
        rows, label noise, batch, horizon). ``reset(options={"rate": 1e-3})`` fixes the rate.

    End: ``terminated`` when the budget of updates is spent (the remaining budget is observed) or
        when the run diverges (``info["reason"]``: "loss not finite", "weights not finite" or
        "validation loss blew up"); never ``truncated`` by the environment itself.

    Info: ``step``, ``rate``, ``optimizer``, ``validation``, ``metric``, ``reason``, ``task``, and
        the value of each further knob that the actions turn; NaN if the job has it not.

    Arguments:
        task: a name of ``envs.task.TASKS``, a `Task`, or several of them to draw from.
        actions: the action view.
        spread: half-width, in decades, of the starting rate around the reference.
        vary: draw a random relative of the task at each reset.
        optimizers: the starting optimizer is drawn from these.
        shape: the base schedule's shape; "any" draws it.
        blind: probability that an episode runs without validation losses in its observation.
        center: the rate that starting rates are drawn around, instead of the reference.
        make_job: opens a job; tests pass a scripted one.

    References: Daniel et al. 2016; Xu et al. 2019; Wu et al. 2018 (why no discount); Eimer et
        al. 2021 (DACBench).

    Version history: v0, the first.
    """

    metadata = {"render_modes": []}  # noqa: RUF012  (gymnasium's own form)

    def __init__(
        self,
        task: str | Task | Sequence[str | Task] = "trec6",
        *,
        actions: Actions | None = None,
        spread: float = 1.5,
        vary: bool = False,
        optimizers: Sequence[Optimizer] = ("adamw",),
        shape: Shape | Literal["any"] = "linear",
        blind: float = 0.0,
        center: float | None = None,
        make_job: MakeJob = open_job,
    ) -> None:
        names = [task] if isinstance(task, str | Task) else list(task)
        if not names:
            raise BadInput("environment: task: none given; name at least one")
        if not 0 <= spread <= 3:
            raise BadInput(f"environment: spread: {spread!r} is out of range; give 0 to 3 decades")
        if not 0 <= blind <= 1:
            raise BadInput(f"environment: blind: {blind!r} is no probability; give 0 to 1")
        if not optimizers:
            raise BadInput("environment: optimizers: none given; name at least one")
        for optimizer in optimizers:
            if optimizer not in OPTIMIZERS:
                raise UnknownName("optimizer", optimizer, OPTIMIZERS)
        if shape not in (*SHAPES, "any"):
            raise UnknownName("schedule shape", shape, (*SHAPES, "any"))
        if center is not None:
            Knobs(rate=center)  # refuses what cannot train
        self.tasks = [find(name) for name in names]
        self.actions = actions or Actions()
        self.observation_space = space()
        self.action_space = self.actions.space()
        self._spread, self._vary, self._blind = spread, vary, blind
        self._optimizers, self._shape, self._make_job = tuple(optimizers), shape, make_job
        self._center = center
        self._job: Job | None = None
        self._over = True

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode. options: ``rate`` (a starting rate), ``task`` (a name or `Task`)."""
        for name in options or {}:
            if name not in OPTIONS:
                raise UnknownName("option of reset", name, OPTIONS)
        super().reset(seed=seed)
        task, knobs, job_seed = self._draw(options or {})
        self.close()
        self._job = self._make_job(task, job_seed, knobs)
        self._start, self._over = knobs.rate, False
        self._hidden = bool(self.np_random.random() < self._blind)
        score = self._job.evaluate("validation")
        self._first = self._loss = score.loss
        self._best = math.inf if self._hidden else score.loss
        self._snapshot = self._job.snapshot()
        shown = math.nan if self._hidden else score.loss
        self._history = [report_start(self._job, shown)]
        return self._observe(), self._info(score.metric, None)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Apply an action and run one interval. Raises `BadInput` on an invalid action."""
        if self._job is None or self._over:
            raise gymnasium.error.ResetNeeded("the episode is over; call reset()")
        job, decision = self._job, decode(action, self.actions)
        if decision.rollback:
            job.restore(self._snapshot)
        knobs, size, adapter = job.knobs, job.context.parameters, job.task.adapter
        low, high = self._start / EXPLORE, self._start * EXPLORE
        job.apply(turn(knobs, decision, low=low, high=high, parameters=size, adapter=adapter))
        self._start *= exchange(knobs.optimizer, job.knobs.optimizer, size, adapter)
        progress = job.advance(min(job.task.interval, job.task.steps - job.step))
        score = job.evaluate("validation")
        shown = None if self._hidden else score.loss
        self._history.append(with_validation(progress, self._history[-1], shown, decision))
        reason = divergence(progress, score.loss, self._first)
        before = self._loss
        if reason is None:
            reward = gain(before, score.loss, self._first)
            self._loss = score.loss
            seen = mean_loss(progress) if self._hidden else score.loss
            if seen < self._best:
                self._best, self._snapshot = seen, job.snapshot()
        else:
            reward = crash(before, self._first)
        self._over = reason is not None or job.step >= job.task.steps
        return self._observe(), reward, self._over, False, self._info(score.metric, reason)

    def close(self) -> None:
        """End the episode and its job: a Trainer's loop is left, a place in a pack is free."""
        job, self._job = self._job, None
        getattr(job, "close", lambda: None)()

    @property
    def history(self) -> tuple[Progress, ...]:
        """The reports of this episode so far, oldest first."""
        return tuple(self._history)

    @property
    def context(self) -> Context:
        """The context of this episode's job."""
        if self._job is None:
            raise gymnasium.error.ResetNeeded("no episode yet; call reset()")
        return self._job.context

    def _draw(self, options: dict[str, Any]) -> tuple[Task, Knobs, int]:
        rng = self.np_random
        task = self.tasks[int(rng.integers(len(self.tasks)))]
        if "task" in options:
            task = find(options["task"])
        if self._vary:
            task = self._relative(task)
        optimizer = self._optimizers[int(rng.integers(len(self._optimizers)))]
        shape = self._shape
        if shape == "any":
            shape = LIKELY[int(rng.integers(len(LIKELY)))]
        exponent = rng.uniform(-self._spread, self._spread)
        ruler = self._center
        if ruler is None:
            size = workload.parameters(task.model)
            ruler = reference_rate(size, optimizer, task.adapter, task.objective)
        drawn = min(max(ruler * 10**exponent, RATE_FLOOR), RATE_CEILING)
        rate = options.get("rate", drawn)
        knobs = opened(Knobs(rate=rate, optimizer=optimizer, shape=shape), self.actions)
        return task, knobs, int(rng.integers(2**31))

    def _relative(self, task: Task) -> Task:
        """A random relative that the data can serve: few rows of a class rule some out."""
        classes = data_of(task).classes
        for _ in range(20):
            relative = vary(task, classes, self.np_random)
            try:
                data_of(relative)
            except BadInput:
                continue
            return relative
        return task

    def _observe(self) -> np.ndarray:
        assert self._job is not None
        return observe(self._history, self._job.context)

    def _info(self, metric: float, reason: str | None) -> dict[str, Any]:
        assert self._job is not None
        knobs = self._job.knobs
        values = {name: getattr(knobs, name) for name, _ in self.actions.turns}
        return {
            "step": self._job.step,
            "rate": knobs.rate,
            "optimizer": knobs.optimizer,
            "validation": self._loss,
            "metric": metric,
            "reason": reason,
            "task": self._job.task.name,
        } | {name: math.nan if value is None else float(value) for name, value in values.items()}


def divergence(progress: Progress, validation: float, first: float) -> str | None:
    """Why a run counts as diverged, or None."""
    if not all(math.isfinite(loss) for loss in progress.losses):
        return "loss not finite"
    if not progress.finite:
        return "weights not finite"
    if not math.isfinite(validation) or validation > BLOWN * first:
        return "validation loss blew up"
    return None
