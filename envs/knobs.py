"""Knobs: what may be turned on a fine-tuning job, and how an action turns it."""

import math
from dataclasses import asdict, dataclass, replace
from numbers import Real
from typing import Any, Literal, get_args

import gymnasium
import numpy as np

from envs import dials
from envs.dials import DIALS, Turn
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
    # None: a knob that the run has not, or that is not to be touched
    adapter_scale: float | None = None  # times LoRA's own scaling
    beta: float | None = None  # weight of the KL term or of the preference
    depth: int | None = None  # uppermost layers in training; what is below them counts as one
    head_rate: float | None = None  # times the rate, for a head that came without pretraining

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
        further = (("adapter_scale", 8.0), ("beta", 1e6), ("depth", 1000), ("head_rate", 100.0))
        for name, top in further:
            value = getattr(self, name)
            whole = name != "depth" or isinstance(value, int)
            if value is not None and not (_number(value) and whole and 0 <= value <= top):
                raise BadInput(
                    f"knobs: {name}: {value!r} is out of range; give 0 to {top:g}, or None"
                )

    def having(self, **values: float | None) -> "Knobs":
        """The same settings with the values of some dials; ``depth`` made a whole number."""
        if values.get("depth") is not None:
            values["depth"] = int(values["depth"])  # type: ignore[arg-type]
        return replace(self, **values) if values else self  # type: ignore[arg-type]


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


LORA = 5.0  # times the rate that all weights take: an adapter's
PREFERENCES = ("reward", "dpo", "kto")  # objectives that learn from pairs or from verdicts
SCALES = {"sgd": 12.0, "rmsprop": 0.25}  # times AdamW's rate; of what is not known, 1


def reference_rate(
    parameters: int, optimizer: str, adapter: str, objective: str = "classification"
) -> float:
    """A plausible peak rate for a model of that size; only a ruler for the observation.

    AdamW's falls as the model grows: 7e-3 at 200 thousand parameters, 2e-3 at a million (the
    best of half-decade sweeps on this project's tasks), about 8e-6 at 7 billion. Preferences
    over-fit sooner: 0.3 of it was best on models of width 64, of 0.03, 0.1, 0.3 and 1 (two seeds).
    SGD's and RMSprop's lie just below where training tasks break down (`benchmarks/headroom.py`).
    """
    rate = 7e-3 * (max(parameters, 1) / 2e5) ** -0.65
    if adapter == "lora":
        rate *= LORA
    if objective in PREFERENCES:
        rate *= 0.3
    return rate * SCALES.get(optimizer, 1.0)


def exchange(old: str, new: str, parameters: int, adapter: str) -> float:
    """What a rate of the old optimizer is multiplied by for a comparable step of the new one."""
    return reference_rate(parameters, new, adapter) / reference_rate(parameters, old, adapter)


@dataclass(frozen=True)
class Decision:
    """What one action asks for, before any guard: multiply the rate, roll back, switch, turn."""

    multiplier: float = 1.0
    rollback: bool = False
    optimizer: Optimizer | None = None
    turns: tuple[Turn, ...] = ()  # of `envs.dials.DIALS`


KEEP = Decision()


@dataclass(frozen=True)
class Actions:
    """The actions of a tuner, in a discrete, a continuous or a joint view.

    Discrete: one action per multiplier, then rollback, then one per optimizer to switch to, then
    one per turn of a further knob: ``("weight_decay", 3.0)`` multiplies it, ``("depth", -1)``
    freezes one layer more. What no action names is left alone.
    A run is opened with ``opens``, turns from where a run without a tuner stands.
    Joint: the same steps, but one choice for each knob at once; see `seats`.
    Continuous, in [-1, 1] each: log10 of the multiplier over ``span``; rollback if above 0.5.
    """

    view: Literal["discrete", "continuous", "joint"] = "discrete"
    multipliers: tuple[float, ...] = (0.1, 0.3, 0.6, 1.0, 1.6, 3.0, 10.0)
    rollback: bool = True
    optimizers: tuple[Optimizer, ...] = ()
    span: float = 1.0  # decades
    turns: tuple[Turn, ...] = ()
    opens: tuple[Turn, ...] = ()

    def __post_init__(self) -> None:
        if self.view not in ("discrete", "continuous", "joint"):
            raise UnknownName("action view", self.view, ("discrete", "continuous", "joint"))
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
        for each in self.turns:
            dials.check(each)
        if self.view == "continuous" and self.turns:
            raise BadInput("actions: turns: only the discrete view has them; drop them")
        for each in self.opens:
            dials.check(each, "opens")
        if len(self.opens) > 1 or any(name != "head_rate" for name, _ in self.opens):
            raise BadInput(
                f"actions: opens: {self.opens} has more than a head_rate, once; a run is opened "
                "with nothing else"
            )

    @property
    def size(self) -> int:
        """Number of discrete actions, or length of one of another view."""
        if self.view == "joint":
            return len(self.seats)
        if self.view == "continuous":
            return 1 + self.rollback
        return len(self.multipliers) + self.rollback + len(self.optimizers) + len(self.turns)

    @property
    def keep(self) -> int:
        """The discrete action that changes nothing."""
        return self.multipliers.index(1.0)

    @property
    def seats(self) -> dict[str, tuple[Decision, ...]]:
        """Each knob's choices in the joint view: steps of the rate, a switch, turns of a dial."""
        rate = [Decision(multiplier) for multiplier in self.multipliers]
        found = {"rate": tuple(rate + [Decision(rollback=True)] * self.rollback)}
        if self.optimizers:
            found["optimizer"] = (KEEP, *(Decision(optimizer=name) for name in self.optimizers))
        for each in self.turns:
            found[each[0]] = (*found.get(each[0], (KEEP,)), Decision(turns=(each,)))
        return found

    def space(
        self,
    ) -> "gymnasium.spaces.Discrete | gymnasium.spaces.Box | gymnasium.spaces.MultiDiscrete":
        """The gymnasium space of these actions."""
        if self.view == "joint":
            return gymnasium.spaces.MultiDiscrete([len(choices) for choices in self.seats.values()])
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
        if decision.turns:
            return dials.label(decision.turns[0])
        return "keep" if decision.multiplier == 1 else f"x{decision.multiplier:g}"


def plain(actions: Actions) -> dict[str, Any]:
    """The actions for a file or a hash: further knobs are left out where there are none."""
    return {k: v for k, v in asdict(actions).items() if v or k not in ("turns", "opens")}


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
    if actions.view == "joint":
        return _together(_array(action), action, actions)
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
    index -= actions.rollback
    if index < len(actions.optimizers):
        return Decision(optimizer=actions.optimizers[index])
    return Decision(turns=(actions.turns[index - len(actions.optimizers)],))


def _together(chosen: np.ndarray[Any, np.dtype[Any]], action: object, actions: Actions) -> Decision:
    """One choice for each knob -> what they ask for together."""
    seats = tuple(actions.seats.values())
    sizes = [len(choices) for choices in seats]
    if (
        chosen.shape != (len(seats),)
        or chosen.dtype.kind not in "iu"
        or not all(0 <= index < size for index, size in zip(chosen, sizes, strict=True))
    ):
        raise BadInput(
            f"action: {_brief(action)} is not a choice for each knob; give {len(seats)} whole "
            f"numbers below {', '.join(map(str, sizes))}"
        )
    picked = [choices[int(index)] for index, choices in zip(chosen, seats, strict=True)]
    return Decision(
        picked[0].multiplier,
        picked[0].rollback,
        next((each.optimizer for each in picked if each.optimizer), None),
        tuple(each for decision in picked for each in decision.turns),
    )


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
    the new optimizer starts at a comparable step size. A turn moves a further knob within its
    own range; one that the run has not stays None.
    """
    rate = knobs.rate * (ROLLBACK_FACTOR if decision.rollback else decision.multiplier)
    optimizer = decision.optimizer or knobs.optimizer
    if optimizer != knobs.optimizer:
        share = exchange(knobs.optimizer, optimizer, parameters, adapter)
        rate, low, high = rate * share, low * share, high * share
    rate = min(max(rate, low, RATE_FLOOR), high, RATE_CEILING)
    values = {
        name: DIALS[name].turned(value, amount)
        for name, amount in decision.turns
        if (value := getattr(knobs, name)) is not None
    }
    return replace(knobs, rate=rate, optimizer=optimizer).having(**values)


def opened(knobs: Knobs, actions: Actions) -> Knobs:
    """The knobs to open a run with: it has what these actions turn, set as they open it."""
    steps = {name: None for name, _ in actions.turns} | dict(actions.opens)
    return knobs.having(
        **{
            name: start if amount is None else DIALS[name].turned(start, amount)
            for name, amount in steps.items()
            if (start := DIALS[name].start) is not None and getattr(knobs, name) is None
        }
    )
