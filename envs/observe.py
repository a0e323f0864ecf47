"""Observations: what the policy sees of a job."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from numpy.typing import NDArray

from envs.knobs import OPTIMIZERS, ROLLBACK_FACTOR, reference_rate
from envs.progress import Context, Progress

Array = NDArray[np.floating[Any]]

VERSION = 1
LIMIT = 5.0
DECADE = math.log(10)  # nats


class Feature(NamedTuple):
    """A number of the observation: its name and its unit."""

    name: str
    unit: str


FEATURES = tuple(
    Feature(*pair)
    for pair in (
        ("progress", "share of the updates done"),
        ("schedule", "schedule's shape at the next update"),
        ("rate_vs_start", "decades above the starting rate"),
        ("rate_vs_reference", "decades above the rule of thumb for this size"),
        ("update_ratio", "decades of update over weights above 0.001"),
        ("train_vs_initial", "nats: log of loss over first interval's"),
        ("train_vs_best", "nats: log of loss over best interval's"),
        ("train_vs_previous", "nats: log of loss over previous interval's"),
        ("train_slope", "nats an interval, within the last interval"),
        ("train_trend", "nats an interval, over the last three"),
        ("train_noise", "standard deviation of log loss around its line"),
        ("validation_vs_initial", "nats: log of loss over the one before training"),
        ("validation_vs_best", "nats: log of loss over the best"),
        ("validation_vs_previous", "nats: log of loss over the previous"),
        ("validation_trend", "nats an interval, over the last three"),
        ("gap", "nats: log of validation over training loss"),
        ("since_best", "share of the run since the best validation loss"),
        ("age", "share of the run since the last evaluation"),
        ("has_validation", "1 if a validation loss is known"),
        ("gradient_vs_median", "decades above the run's median gradient norm"),
        ("clipped", "decades the clip took off the gradient"),
        ("gradient_cosine", "cosine of two successive gradients"),
        ("last_change", "decades the last decision moved the rate"),
        ("rolled_back", "1 if the last decision was a rollback"),
        ("parameters", "decades above a million, halved"),
        ("rows", "decades of training rows above a thousand"),
        ("classes", "nats above two classes"),
        ("adapter", "1 with an adapter"),
        ("sgd", "1 with SGD"),
        ("rmsprop", "1 with RMSprop"),
    )
)
SIZE = len(FEATURES)


def space() -> gymnasium.spaces.Box:
    """The observation space: (SIZE,) float32 in [-LIMIT, LIMIT]."""
    return gymnasium.spaces.Box(-LIMIT, LIMIT, (SIZE,), np.float32)


class Reports(NamedTuple):
    """What the formulas need to know of n runs, at the latest report of each.

    Arrays are (n,); tracks are (T, n) with T at least 3, oldest first, newest last, and what is
    missing, NaN, in front. NaN stands for "not known" everywhere.
    """

    step: Array
    rate: Array
    factor: Array
    updates: Array  # of the last interval
    age: Array  # of the validation loss, in intervals
    gradient: Array
    clipped: Array
    update: Array
    cosine: Array
    change: Array  # what the last decision multiplied the rate by
    rolled_back: Array  # 1 if it was a rollback
    first: Array  # validation loss before training
    losses: Array  # (L, n): of the updates of the last interval; behind its end NaN
    train: Array  # track of mean training losses, an item for each interval that had losses
    validation: Array  # track of finite validation losses, an item for each evaluation
    validated: Array  # track of the updates done at those evaluations
    gradients: Array  # track of gradient norms, finite and above 0


class Contexts(NamedTuple):
    """What does not change during n runs: arrays (n,), and ``fixed`` the last features (6, n)."""

    total: Array
    decisions: Array
    start_rate: Array
    ruler: Array  # reference rate
    fixed: Array


def fixed(parameters: Any, rows: Any, classes: Any, adapter: Any, optimizer: Any) -> Array:
    """The features that describe the job itself: (6, n).

    parameters, rows, classes: (n,) counts; adapter: (n,) whether there is one; optimizer: (n,)
    places in `OPTIMIZERS`.
    """
    return np.array(
        [
            np.log10(np.maximum(parameters, 1) / 1e6) / 2,
            np.log10(np.maximum(rows, 1) / 1e3),
            np.log(np.maximum(classes, 1) / 2),
            adapter,
            np.equal(optimizer, OPTIMIZERS.index("sgd")),
            np.equal(optimizer, OPTIMIZERS.index("rmsprop")),
        ],
        dtype=np.float64,
    )


def logs(values: Array) -> Array:
    """Natural logs, NaN where a value is not finite and positive."""
    return np.asarray(np.log(np.where((values > 0) & (values < math.inf), values, math.nan)))


def line(values: Array) -> tuple[Array, Array]:
    """Least-squares slope per item along the first axis, and the deviation around the line.

    NaN leaves a gap; both are NaN with less than two items.
    """
    known = ~np.isnan(values)
    filled = np.where(known, values, 0.0)
    index = np.arange(len(values), dtype=values.dtype).reshape(-1, *[1] * (values.ndim - 1))
    count = np.add.reduce(known, axis=0, dtype=values.dtype)
    some = np.maximum(count, 1.0)
    off = (index - np.add.reduce(index * known, axis=0) / some) * known
    centred = (filled - np.add.reduce(filled, axis=0) / some) * known
    spread = np.add.reduce(off * off, axis=0)
    enough = count >= 2
    tilt = np.add.reduce(off * centred, axis=0) / np.where(enough, spread, math.nan)
    rest = centred - tilt * off
    return tilt, np.sqrt(np.add.reduce(rest * rest, axis=0) / np.where(enough, count, math.nan))


def slope(values: Sequence[float]) -> tuple[float, float]:
    """`line` through the logs of some numbers; one that has no log leaves a gap."""
    tilt, noise = line(logs(np.array(values, dtype=np.float64)[:, None]))
    return float(tilt[0]), float(noise[0])


def mean_loss(progress: Progress) -> float:
    """Mean training loss of an interval; NaN if there was none or it was not finite."""
    if not progress.losses:
        return math.nan
    mean = sum(progress.losses) / len(progress.losses)
    return mean if math.isfinite(mean) else math.nan


def features(now: Reports, jobs: Contexts) -> NDArray[np.float32]:
    """Reports of n runs -> (n, SIZE) float32 in [-5, 5], NaN-free. The one place of every formula.

    What is not known is 0 (``has_validation`` tells for the validation loss).
    """
    count = now.train.shape[1]
    columns = np.arange(count)
    started = (~np.isnan(now.train)).argmax(0)
    best = np.fmin.reduce(now.validation, axis=0)
    best_at = np.maximum.reduce(np.where(now.validation == best, now.validated, 0.0), axis=0)
    seen = ~np.isnan(now.validation[-1])
    measured = np.add.reduce(~np.isnan(now.gradients), axis=0)
    median = np.sort(now.gradients, axis=0)[measured // 2, columns]
    (
        rate, start_rate, ruler, update, gradient, middle, clipped, change,
        last, previous, earlier, first_train, best_train,
        value, value_before, value_earlier, first_value, best_value,
    ) = logs(
        np.array(
            [
                now.rate, jobs.start_rate, jobs.ruler, now.update, now.gradient, median,
                now.clipped, now.change, now.train[-1], now.train[-2], now.train[-3],
                now.train[started, columns], np.fmin.reduce(now.train, axis=0),
                now.validation[-1], now.validation[-2], now.validation[-3], now.first, best,
            ]
        )
    )  # fmt: skip
    tilt, noise = line(logs(now.losses))
    trends = np.array([[earlier, value_earlier], [previous, value_before], [last, value]])
    train_trend, value_trend = line(trends)[0]
    out = np.empty((SIZE, count), dtype=now.train.dtype)
    out[0] = now.step / jobs.total
    out[1] = now.factor
    out[2] = (rate - start_rate) / DECADE
    out[3] = (rate - ruler) / DECADE
    out[4] = (update - math.log(1e-3)) / DECADE
    out[5] = last - first_train
    out[6] = last - best_train
    out[7] = last - previous
    out[8] = tilt * now.updates
    out[9] = train_trend
    out[10] = noise
    out[11] = value - first_value
    out[12] = value - best_value
    out[13] = value - value_before
    out[14] = value_trend
    out[15] = value - last
    out[16] = np.where(seen, (now.step - best_at) / jobs.total, 0.0)
    out[17] = now.age / jobs.decisions
    out[18] = seen
    out[19] = (gradient - middle) / DECADE
    out[20] = clipped / DECADE
    out[21] = now.cosine
    out[22] = change / DECADE
    out[23] = now.rolled_back
    out[24:] = jobs.fixed
    np.minimum(np.maximum(out, -LIMIT, out=out), LIMIT, out=out)
    out[np.isnan(out)] = 0.0
    return np.ascontiguousarray(out.T, dtype=np.float32)


def observe(history: Sequence[Progress], context: Context) -> NDArray[np.float32]:
    """history: reports, oldest first, at least one -> (SIZE,) float32 in [-5, 5], NaN-free.

    Pure: the same history and context give the same numbers, in training and on a user's job.
    """
    return features(look(history), frame(context))[0]


def look(history: Sequence[Progress]) -> Reports:
    """The reports of one run, n = 1, as `features` reads them."""
    now = history[-1]
    change = ROLLBACK_FACTOR if now.decision.rollback else now.decision.multiplier
    latest = (
        now.step, now.rate, now.factor, len(now.losses), now.age, now.gradient, now.clipped,
        now.update, now.cosine, change, now.decision.rollback, history[0].validation,
    )  # fmt: skip
    seen = [report for report in history if report.age == 0 and math.isfinite(report.validation)]
    tracks = [
        _track([mean_loss(report) for report in history if report.losses]),
        _track([report.validation for report in seen]),
        _track([report.step for report in seen]),
        _track([report.gradient for report in history if 0 < report.gradient < math.inf]),
    ]
    losses = np.array(now.losses, dtype=np.float64)[:, None]
    return Reports._make([*np.array(latest, dtype=np.float64)[:, None], losses, *tracks])


def frame(context: Context) -> Contexts:
    """The context of one run, n = 1, as `features` reads it."""
    ruler = reference_rate(
        context.parameters, context.optimizer, context.adapter, context.objective
    )
    given = (context.total, context.decisions, context.start_rate, ruler)
    kind = OPTIMIZERS.index(context.optimizer) if context.optimizer in OPTIMIZERS else -1
    job = fixed(
        [context.parameters], [context.rows], [context.classes], [context.adapter == "lora"], [kind]
    )
    return Contexts._make([*np.array(given, dtype=np.float64)[:, None], job])


def _track(values: Sequence[float]) -> Array:
    """One run's track, with at least three items."""
    padding = [math.nan] * max(0, 3 - len(values))
    return np.array([*padding, *values], dtype=np.float64)[:, None]
