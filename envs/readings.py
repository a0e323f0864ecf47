"""Readings: what a simulated run reports of itself, noise included, for n runs at once.

The expected losses come from `envs.curves`; noise and probe figures are regressions that
``scripts/fit_surrogate.py`` makes from recorded runs.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from envs.knobs import OPTIMIZERS

Array = NDArray[np.floating[Any]]

FIGURES = ("gradient", "update", "cosine")  # natural log, log10, plain
PREDICTORS = ("one", "loss", "rate", "batch", "pull")  # see `predictors`
WIDEST = 1.5  # largest deviation of a log loss
SAMPLED = 1.04  # whole gradient norm over the sampled one (see probe.py)


class Noise(NamedTuple):
    """Regressions of the readings."""

    train: Array  # (3,): log deviation of a log training loss: 1, log share of start, log batch
    validation: Array  # (2,): deviation of a log validation loss: 1, share held up by noise
    metric: Array  # (3,): accuracy: 1, log share of start, 1 over the classes
    probe: Array  # (optimizers, len(FIGURES), len(PREDICTORS) + 1), the last the deviation


def noise_of(fitted: dict[str, Any]) -> Noise:
    """The regressions of a fitted file."""
    readings = fitted["readings"]
    probe = [[readings["probe"][kind][figure] for figure in FIGURES] for kind in OPTIMIZERS]
    every = [*(readings[name] for name in Noise._fields[:-1]), probe]
    return Noise(*(np.array(values, dtype=np.float32) for values in every))


def train_losses(
    noise: Noise, begun: Array, ended: Array, start: Array, batch: Array, count: Array, draws: Array
) -> Array:
    """Logs of the losses of ``count`` updates between two expected ones: (L, n).

    draws: (L, n) standard normal. Behind the end of a shorter interval is NaN.
    """
    low, high = np.log(begun), np.log(ended)
    base, fall, crowd = noise.train
    wide = base + fall * (0.5 * (low + high) - np.log(start)) + crowd * np.log(batch / 16.0)
    place = np.arange(0.5, len(draws), dtype=draws.dtype)[:, None] / count
    logs = low + (high - low) * place + np.minimum(np.exp(wide), WIDEST) * draws
    return np.asarray(np.where(place < 1.0, logs, np.nan))


def validation_loss(noise: Noise, expected: Array, held: Array, draw: Array) -> Array:
    """The measured validation loss; held: share of the features' loss held up by noise."""
    return np.asarray(expected * np.exp((noise.validation[0] + noise.validation[1] * held) * draw))


def accuracy(noise: Noise, validation: Array, start: Array, classes: Array) -> Array:
    """The metric that goes with a validation loss."""
    one, fall, chance = noise.metric
    share = np.log(np.minimum(np.maximum(validation / start, 0.02), 2.0))
    return np.asarray(np.minimum(np.maximum(one + fall * share + chance / classes, 0.0), 1.0))


def predictors(loss: Array, rate: Array, batch: Array) -> Array:
    """(4, n): 1, log of loss over start, decades of rate over the reference, log batch over 16."""
    return np.array([np.ones_like(loss), loss, rate, np.log(batch / 16.0)])


def probe(coefficients: Array, seen: Array, draws: Array) -> tuple[Array, Array, Array, Array]:
    """(gradient norm, clipped share, update ratio, cosine), as `envs.probe` reads them.

    coefficients: (FIGURES, PREDICTORS + 1, n); seen: `predictors`; draws: (FIGURES, n).
    """
    expected = np.add.reduce(coefficients[:, :4] * seen, axis=1) + coefficients[:, 5] * draws
    gradient = np.exp(expected[0])
    pull = np.minimum(expected[0], 0.0)
    update = 10.0 ** (expected[1] + coefficients[1, 4] * pull)
    cosine = np.minimum(np.maximum(expected[2] + coefficients[2, 4] * pull, -1.0), 1.0)
    return gradient, np.minimum(1.0 / (SAMPLED * gradient), 1.0), update, cosine
