"""Observations: what the policy sees of a job."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import gymnasium
import numpy as np
from numpy.typing import NDArray

from envs.knobs import ROLLBACK_FACTOR, reference_rate
from envs.progress import Context, Progress

VERSION = 1
LIMIT = 5.0


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


def log_ratio(above: float, below: float) -> float:
    """log(above / below) in nats; NaN unless both are finite and positive."""
    if not (0 < above < math.inf and 0 < below < math.inf):
        return math.nan
    return math.log(above) - math.log(below)


def slope(values: Sequence[float]) -> tuple[float, float]:
    """Least-squares slope per item of the logs, and the deviation around the line.

    An item that has no log leaves a gap.
    """
    logs = [(i, math.log(value)) for i, value in enumerate(values) if 0 < value < math.inf]
    count = len(logs)
    if count < 2:
        return math.nan, math.nan
    middle, mean = (sum(column) / count for column in zip(*logs, strict=True))
    spread = sum((i - middle) ** 2 for i, _ in logs)
    tilt = sum((i - middle) * (log - mean) for i, log in logs) / spread
    rest = sum((log - mean - tilt * (i - middle)) ** 2 for i, log in logs)
    return tilt, math.sqrt(rest / count)


def mean_loss(progress: Progress) -> float:
    """Mean training loss of an interval; NaN if there was none or it was not finite."""
    if not progress.losses:
        return math.nan
    mean = sum(progress.losses) / len(progress.losses)
    return mean if math.isfinite(mean) else math.nan


def observe(history: Sequence[Progress], context: Context) -> NDArray[np.float32]:
    """history: reports, oldest first, at least one -> (SIZE,) float32 in [-5, 5], NaN-free.

    What is not known is 0 (``has_validation`` tells for the validation loss). Pure: the same
    history and context give the same numbers, in training and on a user's job.
    """
    now, first = history[-1], history[0]
    train = [mean_loss(report) for report in history if report.losses]
    known = [loss for loss in train if loss == loss]
    last, previous = (train[-1] if train else math.nan), (train[-2] if len(train) > 1 else math.nan)
    tilt, noise = slope(now.losses)

    validations = [report.validation for report in history if report.age == 0]
    seen = [loss for loss in validations if math.isfinite(loss)]
    value = seen[-1] if seen else math.nan
    best = min(seen) if seen else math.nan
    best_at = max((r.step for r in history if r.age == 0 and r.validation == best), default=0)

    gradients = sorted(r.gradient for r in history if 0 < r.gradient < math.inf)
    median = gradients[len(gradients) // 2] if gradients else math.nan
    change = now.decision.multiplier if not now.decision.rollback else ROLLBACK_FACTOR
    ruler = reference_rate(context.parameters, context.optimizer, context.adapter)
    decade = math.log(10)
    values = (
        now.step / context.total,
        now.factor,
        log_ratio(now.rate, context.start_rate) / decade,
        log_ratio(now.rate, ruler) / decade,
        log_ratio(now.update, 1e-3) / decade,
        log_ratio(last, known[0] if known else math.nan),
        log_ratio(last, min(known, default=math.nan)),
        log_ratio(last, previous),
        tilt * len(now.losses),
        slope(train[-3:])[0],
        noise,
        log_ratio(value, first.validation),
        log_ratio(value, best),
        log_ratio(value, seen[-2] if len(seen) > 1 else math.nan),
        slope(seen[-3:])[0],
        log_ratio(value, last),
        (now.step - best_at) / context.total if seen else 0.0,
        now.age / context.decisions,
        float(bool(seen)),
        log_ratio(now.gradient, median) / decade,
        log_ratio(now.clipped, 1.0) / decade,
        now.cosine,
        log_ratio(change, 1.0) / decade,
        float(now.decision.rollback),
        math.log10(max(context.parameters, 1) / 1e6) / 2,
        math.log10(max(context.rows, 1) / 1e3),
        math.log(max(context.classes, 1) / 2),
        float(context.adapter == "lora"),
        float(context.optimizer == "sgd"),
        float(context.optimizer == "rmsprop"),
    )
    array = np.array(values, dtype=np.float64)
    array = np.where(np.isnan(array), 0.0, np.clip(array, -LIMIT, LIMIT))
    return array.astype(np.float32)
