"""Dials: the knobs beyond the rate, each with its unit, its range and how it moves.

A job carries out those it has (a knob it has not is None in its `envs.knobs.Knobs`): see `REACH`.
"""

import math
from dataclasses import dataclass
from typing import Literal

from envs.errors import BadInput, lookup


@dataclass(frozen=True)
class Dial:
    """How one knob moves: by a factor, or by whole steps."""

    unit: str
    low: float
    high: float
    floor: float = 0.0  # a lower value is off, at 0, and from 0 the first step up leads here
    way: Literal["times", "plus"] = "times"
    start: float | None = None  # what to open a run with that is to have the knob; None: its own

    def turned(self, value: float, amount: float) -> float:
        """The value after a step, within the range; one that began outside is not pulled in.

        A knob without a floor that is off, at 0, stays off: nothing is known of its scale.
        """
        if self.way == "plus":
            moved = value + amount
        elif value == 0:
            moved = self.floor if amount > 1 else 0.0
        elif amount > 1:
            moved = max(value * amount, self.floor)
        else:
            moved = value * amount if value * amount >= self.floor else 0.0
        if moved == 0 and (self.floor or value == 0):
            return 0.0
        return min(max(moved, min(self.low, value)), max(self.high, value))

    def allows(self, amount: object) -> bool:
        """Whether a step can be of that size: a factor other than 1, or a whole number but 0."""
        if isinstance(amount, bool) or not isinstance(amount, int | float):
            return False
        size = float(amount)
        if self.way == "plus":
            return size != 0 and abs(size) <= self.high and size.is_integer()
        return math.isfinite(size) and 1e-3 <= size <= 1e3 and size != 1


DIALS = {
    "weight_decay": Dial("share of a weight an update, times the rate", 0.0, 1.0, floor=1e-3),
    "clip": Dial("largest gradient norm", 0.01, 1e3),
    "adapter_scale": Dial("times LoRA's own scaling", 0.0, 8.0, floor=0.125, start=1.0),
    "beta": Dial("weight of the KL term or of the preference", 1e-3, 10.0),
    "depth": Dial("uppermost layers in training", 0.0, 100.0, way="plus", start=100.0),
    "head_rate": Dial("times the rate, of a head without pretraining", 0.1, 100.0, start=1.0),
}

_ON, _SWITCHABLE = "if it is on", "if it is a SwitchableOptimizer"
_OPENED = "if the run was opened with it"
_NEW = "if the policy opens or turns it, and a classifier's head is new"
_LORA = "LoRA, if the policy turns it, but for ``load_best_model_at_end``"
_GIVEN = "if ``trainer=`` is given and has one"
REACH: dict[str, dict[str, str]] = {
    name: dict(
        zip(
            ("TorchJob", "packs", "TrainerJob", "TunerCallback", "DDP", "FSDP2"), cells, strict=True
        )
    )
    for name, cells in {
        "rate": ("yes",) * 6,
        "rollback": ("yes",) * 6,
        "optimizer": ("yes", "yes", _SWITCHABLE, _SWITCHABLE, _SWITCHABLE, ""),
        "weight_decay": ("yes",) * 6,
        "clip": (_ON,) * 6,
        "adapter_scale": (f"LoRA, {_OPENED}", "", f"LoRA, {_OPENED}", _LORA, _LORA, ""),
        "beta": ("", "", "if the Trainer has one", *[_GIVEN] * 3),
        "depth": (_OPENED, "", _OPENED, "if the policy turns it", "", ""),
        "head_rate": (_OPENED, _OPENED, f"a classifier's new head, {_OPENED}", *[_NEW] * 2, ""),
    }.items()
}
"""What turns each knob, and on which condition; empty: not at all.

DDP and FSDP2 are the callback in several processes.
"""

Turn = tuple[str, float]  # the name of a dial, and the factor or the steps to move it by


def check(turn: Turn, where: str = "turns") -> None:
    """Raise `BadInput` unless it names a dial and a step that it can make."""
    if not isinstance(turn, tuple) or len(turn) != 2:
        raise BadInput(f"actions: {where}: {turn!r} is no pair; give a knob's name and a factor")
    name, amount = turn
    if not (dial := lookup(DIALS, name, "knob to turn")).allows(amount):
        fix = "a whole number but 0" if dial.way == "plus" else "a factor from 0.001 to 1000 but 1"
        raise BadInput(f"actions: {where}: {name} cannot move by {amount!r}; give {fix}")


def label(turn: Turn) -> str:
    """A turn as a label: ``weight_decay x3``, ``depth -1``."""
    name, amount = turn
    return f"{name} {amount:+g}" if DIALS[name].way == "plus" else f"{name} x{amount:g}"


def parse(text: str) -> Turn:
    """What `label` made; raises `BadInput` on anything else."""
    name, _, amount = text.partition(" ")
    dial = lookup(DIALS, name, "knob to turn")
    try:
        turn = name, float(amount if dial.way == "plus" else amount.removeprefix("x"))
    except ValueError:
        form = f"{name} -1" if dial.way == "plus" else f"{name} x3"
        raise BadInput(f"turns: {text!r} is no step; write it as {form!r}") from None
    check(turn)
    return turn
