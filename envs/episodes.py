"""Episodes: what is drawn when a simulated run begins, each from its environment's generator."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from envs import curves, readings
from envs.curves import Law, Settings
from envs.env import LIKELY
from envs.errors import BadInput, UnknownName, lookup
from envs.knobs import (
    OPTIMIZERS,
    RATE_CEILING,
    RATE_FLOOR,
    SHAPES,
    Optimizer,
    Shape,
    reference_rate,
)

Array = NDArray[np.floating[Any]]
Index = NDArray[np.intp]

OTHERS = 1 + len(readings.FIGURES)  # normals of an interval beside those of its updates
BATCHES, ROWS, NOISES = (8, 16, 16, 32), (200, 500, 1000, 2000), (0.0, 0.0, 0.1, 0.2)
LENGTHS = (0.6, 1.0, 1.0, 1.5)  # of an interval; all four as `envs.task.vary` draws them
SUBSETS = 0.7  # share of runs on a subset of the classes
UNIFORMS = 10
FIRST = 0.01  # deviation of the log loss before training: heads differ
EXTREME = 2.5  # deviations; a run is never odder than that


class Draw(NamedTuple):
    """What was drawn for n running episodes: arrays (n,)."""

    given: Settings
    laws: Law
    updates: Array  # of an interval
    shape: Index  # place in `SHAPES`
    hidden: NDArray[np.bool_]  # validation losses are not observed
    first: Array  # validation loss before training
    rate: NDArray[np.float64]  # at the start
    optimizer: Index  # place in `OPTIMIZERS`, at the start
    normals: NDArray[np.float32]  # (n, decisions, OTHERS + longest interval)


class Recipe:
    """How episodes are drawn; checked when it is made."""

    def __init__(
        self,
        content: dict[str, Any],
        tasks: Sequence[str],
        *,
        decisions: int,
        interval: int,
        spread: float,
        vary: bool,
        optimizers: Sequence[Optimizer],
        shape: Shape | Literal["any"],
        blind: float,
        jitter: float,
    ) -> None:
        check(spread=spread, blind=blind, jitter=jitter)
        for name, count in (("decisions", decisions), ("interval", interval)):
            if count < 1:
                raise BadInput(f"surrogate: {name}: {count!r} is not a count; give at least 1")
        for optimizer in optimizers:
            if optimizer not in OPTIMIZERS:
                raise UnknownName("optimizer", optimizer, OPTIMIZERS)
        if not optimizers:
            raise BadInput("surrogate: optimizers: none given; name at least one")
        if shape not in (*SHAPES, "any"):
            raise UnknownName("schedule shape", shape, (*SHAPES, "any"))
        self.names = tuple(tasks) or tuple(content["tasks"])
        chosen = [lookup(content["tasks"], name, "fitted task") for name in self.names]
        self.constants = curves.constants_of({**content, "tasks": dict(enumerate(chosen))})
        self._decisions, self._spread, self._vary, self._blind = decisions, spread, vary, blind
        self._lengths = np.array([max(1, round(interval * share)) for share in LENGTHS])
        self._interval = interval
        self.longest = int(self._lengths.max()) if vary else interval
        self._deviations = jitter * np.array([content["jitter"][name] for name in curves.JITTER])
        self._shapes = np.array([SHAPES.index(s) for s in (LIKELY if shape == "any" else (shape,))])
        self._optimizers = np.array([OPTIMIZERS.index(name) for name in optimizers])
        self.parameters: int = content["parameters"]
        self.rulers = np.array(
            [reference_rate(self.parameters, name, "full") for name in OPTIMIZERS]
        )
        self._pairs = pairs([[task["whole"], *task["subsets"]] for task in chosen])

    def draw(self, generators: Sequence[np.random.Generator]) -> Draw:
        """An episode for each generator."""
        count, width = len(generators), OTHERS + self.longest
        uniforms = np.empty((count, UNIFORMS))
        normals = np.empty((count, self._decisions * width + len(curves.JITTER) + 1), np.float32)
        for generator, uniform, normal in zip(generators, uniforms, normals, strict=True):
            generator.random(out=uniform)
            generator.standard_normal(out=normal, dtype=np.float32)
        share = uniforms.T
        given, updates = self._settings(share)
        own = normals[:, self._decisions * width :].T.astype(np.float64)
        own = np.minimum(np.maximum(own, -EXTREME), EXTREME)
        laws = curves.law(self.constants, given, self._deviations[:, None] * own[1:])
        given, laws = Settings(given.task, *map(single, given[1:])), Law(*map(single, laws))
        optimizer = pick(self._optimizers, share[6])
        exponent = self._spread * (2.0 * share[7] - 1.0)
        rate: NDArray[np.float64] = np.clip(
            self.rulers[optimizer] * 10.0**exponent, RATE_FLOOR, RATE_CEILING
        )
        return Draw(
            given=given,
            laws=laws,
            updates=single(updates),
            shape=pick(self._shapes, share[8]),
            hidden=share[9] < self._blind,
            first=laws.start * np.exp(single(FIRST * own[0])),
            rate=rate,
            optimizer=optimizer,
            normals=normals[:, : self._decisions * width].reshape(count, self._decisions, width),
        )

    def _settings(self, share: Array) -> tuple[Settings, Array]:
        """Uniform numbers -> the runs' settings, and the updates of an interval."""
        task = pick(np.arange(len(self.names)), share[0])
        if not self._vary:
            classes, prior = self._pairs[task, 0].T
            same = np.ones_like(classes)
            return (
                Settings(task, classes, prior, 1000.0 * same, 16.0 * same, 0.0 * same),
                self._interval * same,
            )
        # one number says whether it is a subset, and which
        place = pick(np.arange(1, self._pairs.shape[1]), share[1] / SUBSETS % 1.0)
        classes, prior = self._pairs[task, np.where(share[1] < SUBSETS, place, 0)].T
        rows, batch, noise = (
            pick(np.array(values, dtype=np.float64), part)
            for values, part in zip((ROWS, BATCHES, NOISES), share[2:5], strict=True)
        )
        updates = pick(self._lengths, share[5]).astype(np.float64)
        return Settings(task, classes, prior, rows, batch, noise), updates


def check(**given: float) -> None:
    """Refuse what is out of range."""
    for name, value in given.items():
        top = 1 if name == "blind" else 3
        if not 0 <= value <= top:
            raise BadInput(f"surrogate: {name}: {value!r} is out of range; give 0 to {top}")


def pairs(subsets: list[list[list[float]]]) -> Array:
    """Classes and prior of each task's whole and subsets, repeated to one length: (tasks, k, 2)."""
    most = max(map(len, subsets))
    return np.array([[own[0], *(own[1:] * most)[: most - 1]] for own in subsets])


def pick(values: NDArray[Any], share: Array) -> NDArray[Any]:
    """One of the values for each uniform number in [0, 1)."""
    return np.asarray(values[(share * len(values)).astype(np.intp)])


def single(values: NDArray[Any]) -> NDArray[np.float32]:
    """Single precision: what a curve needs, at half the time."""
    return values.astype(np.float32)
