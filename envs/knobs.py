"""Knobs: what may be turned on a fine-tuning job, and how an action turns it."""

import math
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal, get_args

import gymnasium
import numpy as np

from envs.errors import BadInput, UnknownName

Optimizer = Literal["adamw", "sgd", "rmsprop"]
Shape = Literal["constant", "linear", "cosine"]
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
SHAPES: tuple[Shape, ...] = get_args(Shape)

RATE_FLOOR, RATE_CEILING = 1e-9, 10.0
ROLLBACK_FACTOR = 0.5  # the rate after a rollback, as a share of the rate before


@dataclass(frozen=True)
class Knobs:
    """The settings of a job: the rate at an update is ``rate`` times the schedule's shape.

    A static method sets them once; a tuner turns ``rate`` while the schedule's shape runs on,
    so that *keep* is the plain schedule.
    """

    rate: float = 1e-3
    shape: Shape = "linear"
    warmup: float = 0.0  # share of the steps
    optimizer: Optimizer = "adamw"
    weight_decay: float = 0.0
    clip: float = 1.0  # largest gradient norm; 0 turns clipping off

    def __post_init__(self) -> None:
        if not (_number(self.rate) and RATE_FLOOR <= self.rate <= RATE_CEILING):
            raise BadInput(
                f"knobs: rate: {self.rate!r} cannot train anything; "
                f"give a number from {RATE_FLOOR:g} to {RATE_CEILING:g}"
            )
        if self.shape not in SHAPES:
            raise UnknownName("schedule shape", self.shape, SHAPES)
        if self.optimizer not in OPTIMIZERS:
            raise UnknownName("optimizer", self.optimizer, OPTIMIZERS)
        for name, top in (("warmup", 0.99), ("weight_decay", 1.0), ("clip", 1e6)):
            value = getattr(self, name)
            if not (_number(value) and 0 <= value <= top):
                raise BadInput(f"knobs: {name}: {value!r} is out of range; give 0 to {top:g}")


def _number(value: object) -> bool:
    """Whether it is a number at all: text from a configuration file is not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def factor(knobs: Knobs, step: int, total: int) -> float:
    """The schedule's shape at update ``step`` (0-based) of ``total``, in [0, 1].

    The same values as transformers' ``get_scheduler`` for the same name and warm-up steps.
    """
    warmup = round(knobs.warmup * total)
    if step < warmup:
        return step / max(1, warmup)
    if knobs.shape == "constant":
        return 1.0
    if knobs.shape == "linear":
        return max(0.0, (total - step) / max(1, total - warmup))
    done = (step - warmup) / max(1, total - warmup)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))


def reference_rate(parameters: int, optimizer: str, adapter: str) -> float:
    """A plausible peak rate for a model of that size; only a ruler for the observation.

    AdamW's falls as the model grows: 7e-3 at 200 thousand parameters, 2e-3 at a million (the
    best of half-decade sweeps on this project's tasks), about 8e-6 at 7 billion.
    """
    rate = 7e-3 * (max(parameters, 1) / 2e5) ** -0.65
    if adapter == "lora":
        rate *= 5.0
    return rate * {"adamw": 1.0, "rmsprop": 0.5, "sgd": 50.0}.get(optimizer, 1.0)


def exchange(old: str, new: str, parameters: int, adapter: str) -> float:
    """What a rate of the old optimizer is multiplied by for a comparable step of the new one."""
    return reference_rate(parameters, new, adapter) / reference_rate(parameters, old, adapter)


@dataclass(frozen=True)
class Decision:
    """What one action asks for, before any guard: multiply the rate, roll back, switch."""

    multiplier: float = 1.0
    rollback: bool = False
    optimizer: Optimizer | None = None


KEEP = Decision()


@dataclass(frozen=True)
class Actions:
    """The actions of a tuner, in a discrete or a continuous view.

    Discrete: one action per multiplier, then rollback, then one per optimizer to switch to.
    Continuous, in [-1, 1] each: log10 of the multiplier over ``span``; rollback if above 0.5.
    """

    view: Literal["discrete", "continuous"] = "discrete"
    multipliers: tuple[float, ...] = (0.1, 0.3, 0.6, 1.0, 1.6, 3.0, 10.0)
    rollback: bool = True
    optimizers: tuple[Optimizer, ...] = ()
    span: float = 1.0  # decades

    def __post_init__(self) -> None:
        if self.view not in ("discrete", "continuous"):
            raise UnknownName("action view", self.view, ("discrete", "continuous"))
        if not all(_number(m) and 1e-3 <= m <= 1e3 for m in self.multipliers):
            raise BadInput(
                f"actions: multipliers: {self.multipliers} are not all from 0.001 to 1000; "
                "give factors of the rate"
            )
        if 1.0 not in self.multipliers:
            raise BadInput(
                f"actions: multipliers: {self.multipliers} lack 1, which keeps the rate; add it"
            )
        if not (_number(self.span) and 0 < self.span <= 3):
            raise BadInput(
                f"actions: span: {self.span!r} is out of range; give decades above 0, at most 3"
            )
        for optimizer in self.optimizers:
            if optimizer not in OPTIMIZERS:
                raise UnknownName("optimizer", optimizer, OPTIMIZERS)
        if self.view == "continuous" and self.optimizers:
            raise BadInput("actions: optimizers: only the discrete view can switch; drop them")

    @property
    def size(self) -> int:
        """Number of discrete actions, or length of a continuous one."""
        if self.view == "continuous":
            return 1 + self.rollback
        return len(self.multipliers) + self.rollback + len(self.optimizers)

    @property
    def keep(self) -> int:
        """The discrete action that changes nothing."""
        return self.multipliers.index(1.0)

    def space(self) -> "gymnasium.spaces.Discrete | gymnasium.spaces.Box":
        """The gymnasium space of these actions."""
        if self.view == "continuous":
            return gymnasium.spaces.Box(-1.0, 1.0, (self.size,), np.float32)
        return gymnasium.spaces.Discrete(self.size)

    def label(self, action: int) -> str:
        """A discrete action in words, for a table or a plot."""
        decision = decode(action, self)
        if decision.rollback:
            return "rollback"
        if decision.optimizer:
            return decision.optimizer
        return "keep" if decision.multiplier == 1 else f"x{decision.multiplier:g}"


def decode(action: object, actions: Actions) -> Decision:
    """An action -> what it asks for. Raises `BadInput` on one outside the space, NaN included."""
    if actions.view == "continuous":
        values = _array(action)
        if (
            values.shape != (actions.size,)
            or values.dtype.kind not in "fiu"
            or not np.all(np.abs(values) <= 1.0)
        ):
            raise BadInput(
                f"action: {_brief(action)} is not a vector of numbers in [-1, 1]; "
                f"give {actions.size}"
            )
        rollback = actions.rollback and bool(values[1] > 0.5)
        return Decision(1.0 if rollback else 10.0 ** (actions.span * float(values[0])), rollback)
    number = _array(action)
    if number.size != 1 or number.dtype.kind not in "iu":
        raise BadInput(
            f"action: {_brief(action)} is not one whole number; give 0 to {actions.size - 1}"
        )
    index = int(number.item())
    if not 0 <= index < actions.size:
        raise BadInput(f"action: {index} is out of range; give 0 to {actions.size - 1}")
    if index < len(actions.multipliers):
        return Decision(multiplier=actions.multipliers[index])
    index -= len(actions.multipliers)
    if actions.rollback and index == 0:
        return Decision(rollback=True)
    return Decision(optimizer=actions.optimizers[index - actions.rollback])


def _array(action: object) -> np.ndarray[Any, np.dtype[Any]]:
    try:
        return np.asarray(action)
    except ValueError:  # ragged
        return np.array(None)


def _brief(value: object) -> str:
    return " ".join(repr(value).split())[:80]


def turn(
    knobs: Knobs,
    decision: Decision,
    *,
    low: float,
    high: float,
    parameters: int = 1,
    adapter: str = "full",
) -> Knobs:
    """The knobs after a decision, with the rate kept in [low, high].

    A rollback halves the rate; a switch of optimizer moves it along `reference_rate`, so that
    the new optimizer starts at a comparable step size.
    """
    rate = knobs.rate * (ROLLBACK_FACTOR if decision.rollback else decision.multiplier)
    optimizer = decision.optimizer or knobs.optimizer
    if optimizer != knobs.optimizer:
        share = exchange(knobs.optimizer, optimizer, parameters, adapter)
        rate, low, high = rate * share, low * share, high * share
    rate = min(max(rate, low, RATE_FLOOR), high, RATE_CEILING)
    return replace(knobs, rate=rate, optimizer=optimizer)
