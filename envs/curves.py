"""Learning curves: what a simulated fine-tuning run does in one interval, for n runs at once.

A noisy quadratic (Schaul et al. 2013; Zhang et al. 2019) in closed form. The loss falls from
that of a new head, the log of the number of classes, to that of the class frequencies, and from
there by a sum of modes with power-law curvatures to a floor. Gradient noise holds every mode at
a share of its height that grows with the rate; a rate that is much too high breaks the features
for good and, when it comes as a shock, throws the loss up; small training sets are memorised,
which raises the validation loss. The constants are fitted to recorded runs
(``scripts/fit_surrogate.py``) and shipped as ``surrogate.json``.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
Index = NDArray[np.intp]

MODES = 8
FITTED = Path(__file__).parent / "surrogate.json"
TASK = ("floor", "speed", "memory", "overfit")  # constants of a task
OPTIMIZER = ("scale", "noise", "crack", "shock", "power", "calm")  # of an optimizer
SHARED = (
    "spectrum", "share", "head", "batch_noise", "rows_memory", "batch_memory", "rows_floor",
    "classes_floor", "label_floor", "label_train", "label_overfit", "crack_power",
)  # fmt: skip
JITTER = ("floor", "speed", "noise", "shock", "overfit")  # what differs between runs alike
MEMORY = 7.0  # nats of training loss that memorising takes off at most
EDGE = 30.0  # largest exponent


class Constants(NamedTuple):
    """The fitted constants, most of them logs: `law` gives each its meaning."""

    task: Array  # (tasks, len(TASK))
    optimizer: Array  # (optimizers, len(OPTIMIZER))
    shared: Array  # (len(SHARED),)


class Settings(NamedTuple):
    """What is known of n runs before they start: arrays (n,)."""

    task: Index  # places in the fitted tasks
    classes: Array
    prior: Array  # nats: validation loss of the class frequencies
    rows: Array
    batch: Array
    noise: Array  # share of wrong labels


class Law(NamedTuple):
    """The laws of n runs: arrays (n,), modes (MODES, n)."""

    start: Array  # nats: loss before training
    prior: Array  # nats: of the class frequencies
    floor: Array  # nats: when all is learned
    curvature: Array  # (MODES, 1) of a mode, the first 1
    share: Array  # (MODES, 1) of the features' loss, adding up to 1
    speed: Array  # of the first mode, an update at the reference rate
    head: Array  # the same, of the class frequencies
    noise: Array  # factor of the gradient noise
    memory: Array  # nats memorised an update at the reference rate
    overfit: Array  # nats of validation loss for a nat memorised
    label: Array  # nats of training loss for wrong labels
    shock: Array  # factor of the rate at which the loss is thrown up
    crack_power: Array


class Weights(NamedTuple):
    """The state of n runs: arrays (n,). It is what a rollback brings back."""

    modes: Array  # (MODES, n) share of the features' loss still there
    head: Array  # share of the way to the class frequencies still to go
    shock: Array  # loss thrown up, in units of the start
    crack: Array  # broken features: slows all down by 1 + crack
    memory: Array  # nats of training loss memorised


def law(constants: Constants, given: Settings, jitter: Array) -> Law:
    """jitter: (len(JITTER), n) standard deviations from the typical run -> the laws."""
    task = constants.task[given.task].T
    value = dict(zip(SHARED, constants.shared, strict=True))
    rows, batch = np.log(given.rows / 1000.0), np.log(given.batch / 16.0)
    start = np.log(given.classes)
    place = (
        task[0] + value["rows_floor"] * rows + value["label_floor"] * given.noise
        + value["classes_floor"] * (start - np.log(3.0)) + jitter[0]
    )  # fmt: skip
    curvature = np.arange(1.0, MODES + 1) ** -np.exp(value["spectrum"])
    share = np.arange(1.0, MODES + 1) ** -value["share"]
    return Law(
        start=start,
        prior=given.prior,
        floor=given.prior / (1.0 + np.exp(-place)),
        curvature=curvature[:, None],
        share=(share / share.sum())[:, None],
        speed=np.exp(task[1] + jitter[1]),
        head=np.exp(value["head"] + jitter[1]),
        noise=np.exp(jitter[2] - value["batch_noise"] * batch),
        memory=np.exp(task[2] + value["batch_memory"] * batch - value["rows_memory"] * rows),
        overfit=np.exp(task[3] + value["label_overfit"] * given.noise + jitter[4]),
        label=value["label_train"] * given.noise,
        shock=np.exp(jitter[3]),
        crack_power=np.full_like(start, np.exp(value["crack_power"])),
    )


def fresh(laws: Law) -> Weights:
    """The state before training."""
    nought = np.zeros_like(laws.start)
    return Weights(
        np.repeat(laws.share, len(nought), axis=1),
        nought + 1.0,
        nought,
        nought.copy(),
        nought.copy(),
    )  # fmt: skip


def interval(
    weights: Weights, laws: Law, rate: Array, before: Array, updates: Array, optimizer: Array
) -> Weights:
    """The expected state after some updates at a steady rate.

    rate: mean over the interval, as a multiple of the reference rate; before: the interval
    before's, 0 at the start; optimizer: (len(OPTIMIZER), n) its constants.
    """
    scale, _, crack, shock, power, calm = optimizer
    pace = rate * np.exp(scale)
    cracked = weights.crack + updates * np.exp(
        np.minimum(laws.crack_power * (np.log(pace) - crack), EDGE)
    )
    slow = pace / (1.0 + cracked)
    floor = laws.share * held(laws, rate, optimizer)
    kept = np.exp(-np.minimum(laws.curvature * (updates * laws.speed * slow), EDGE))
    modes = floor + (weights.modes - floor) * kept
    head = weights.head * np.exp(-np.minimum(updates * laws.head * slow, EDGE))
    rise = np.maximum(1.0 - before / rate, 0.0)
    thrown = np.exp(np.minimum(np.exp(power) * (np.log(pace * laws.shock) - shock), EDGE))
    calmed = np.exp(-updates * np.exp(calm))
    learned = 1.0 - 0.5 * np.add.reduce(modes + weights.modes, axis=0)
    gained = updates * laws.memory * slow * np.maximum(learned, 0.0)
    return Weights(
        modes,
        head,
        (weights.shock + rise * thrown) * calmed,
        cracked,
        np.minimum(weights.memory + gained, MEMORY),
    )


def held(laws: Law, rate: Array, optimizer: Array) -> Array:
    """The share of the features' loss at which gradient noise holds the modes."""
    warmth = laws.noise * np.exp(optimizer[0] + optimizer[1]) * rate
    return np.asarray(warmth / (1.0 + warmth))


def losses(weights: Weights, laws: Law) -> tuple[Array, Array]:
    """The expected training and validation loss."""
    left = np.add.reduce(weights.modes, axis=0)
    base = laws.floor + (laws.prior - laws.floor) * left + (laws.start - laws.prior) * weights.head
    thrown = laws.start * weights.shock
    train = (base + laws.label) * np.exp(-weights.memory) + thrown
    return train, base + laws.overfit * weights.memory + thrown


def load(path: Path = FITTED) -> dict[str, Any]:
    """The fitted file."""
    fitted: dict[str, Any] = json.loads(path.read_text())
    return fitted


def constants_of(fitted: dict[str, Any]) -> Constants:
    """The constants of a fitted file, as arrays."""
    return Constants(
        np.array([[task[name] for name in TASK] for task in fitted["tasks"].values()]),
        np.array([[kind[name] for name in OPTIMIZER] for kind in fitted["optimizers"].values()]),
        np.array([fitted["shared"][name] for name in SHARED]),
    )
