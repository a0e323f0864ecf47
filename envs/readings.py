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
WIDEST = 1.5  # largest deviation of anything
HOT = 0.3  # decades of the rate above which broken features make no more noise
LOWEST, HIGHEST = -6.0, 1.5  # decades of the rate, where the regressions hold
SAMPLED = 1.04  # whole gradient norm over the sampled one (see probe.py)


class Noise(NamedTuple):
    """Regressions of the readings."""

    train: Array  # (4,): log deviation of a log training loss: `predictors`
    validation: Array  # (2,): log deviation of a log validation loss: 1, log of the share held up
    metric: Array  # (3,): accuracy: 1, log share of start, 1 over the classes
    probe: Array  # (optimizers, len(FIGURES), len(PREDICTORS) + 2): last, a log deviation and
    # what a decade of the rate adds to it


def noise_of(fitted: dict[str, Any]) -> Noise:
    """The regressions of a fitted file."""
    readings = fitted["readings"]
    probe = [[readings["probe"][kind][figure] for figure in FIGURES] for kind in OPTIMIZERS]
    every = [*(readings[name] for name in Noise._fields[:-1]), probe]
    return Noise(*(np.array(values, dtype=np.float32) for values in every))


def train_losses(
    noise: Noise, begun: Array, ended: Array, seen: Array, count: Array, draws: Array
) -> Array:
    """Logs of the losses of ``count`` updates between two expected ones: (L, n).

    seen: `predictors`; draws: (L, n) standard normal. Behind the end of a shorter interval is NaN.
    """
    low, high = np.log(begun), np.log(ended)
    cool = np.array([*seen[:2], np.minimum(seen[2], HOT), seen[3]])
    wide = np.minimum(np.exp(weighted(noise.train[:, None], cool)), WIDEST)
    place = np.arange(0.5, len(draws), dtype=draws.dtype)[:, None] / count
    return np.asarray(np.where(place < 1.0, low + (high - low) * place + wide * draws, np.nan))


def validation_loss(noise: Noise, expected: Array, held: Array, draw: Array) -> Array:
    """The measured validation loss; held: share of the features' loss held up by noise."""
    wide = np.minimum(np.exp(noise.validation[0] + noise.validation[1] * np.log(held)), WIDEST)
    return np.asarray(expected * np.exp(wide * draw))


def accuracy(noise: Noise, validation: Array, start: Array, classes: Array) -> Array:
    """The metric that goes with a validation loss."""
    one, fall, chance = noise.metric
    share = np.log(np.minimum(np.maximum(validation / start, 0.02), 2.0))
    return np.asarray(np.minimum(np.maximum(one + fall * share + chance / classes, 0.0), 1.0))


def predictors(loss: Array, rate: Array, batch: Array) -> Array:
    """(4, n): 1, log of loss over start, decades of rate over the reference, log batch over 16."""
    held = np.minimum(np.maximum(rate, LOWEST), HIGHEST)
    return np.array([np.ones_like(loss), loss, held, np.log(batch / 16.0)])


def weighted(coefficients: Array, seen: Array) -> Array:
    """Sum of coefficients (..., 4, n) times predictors (4, n)."""
    return np.asarray(np.add.reduce(coefficients * seen, axis=-2))


def probe(coefficients: Array, seen: Array, draws: Array) -> tuple[Array, Array, Array, Array]:
    """(gradient norm, clipped share, update ratio, cosine), as `envs.probe` reads them.

    coefficients: (FIGURES, PREDICTORS + 2, n); seen: `predictors`; draws: (FIGURES, n).
    """
    wide = np.exp(coefficients[:, 5] + coefficients[:, 6] * seen[2])
    expected = weighted(coefficients[:, :4], seen) + np.minimum(wide, WIDEST) * draws
    gradient = np.exp(expected[0])
    pull = np.minimum(expected[0], 0.0)
    update = 10.0 ** (expected[1] + coefficients[1, 4] * pull)
    cosine = np.minimum(np.maximum(expected[2] + coefficients[2, 4] * pull, -1.0), 1.0)
    return gradient, np.minimum(1.0 / (SAMPLED * gradient), 1.0), update, cosine
