"""The logbook of a steered run: its reports, and where it stands, as plain numbers."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from envs.job import with_validation
from envs.knobs import KEEP, Decision
from envs.observe import mean_loss
from envs.progress import Progress

RAW = 3  # latest reports that keep the loss of each update; of older ones the mean is enough


@dataclass
class Logbook:
    """What a resumed run needs of the run so far, apart from weights, guard and rates."""

    next: int = 0  # step of the next decision
    last: int = -1  # step of the latest one
    history: list[Progress] = field(default_factory=list)
    report: Progress | None = None  # of a full interval that is not decided on yet
    applied: Decision = KEEP  # the latest decision
    validation: float = math.nan  # latest loss of the user's own evaluations
    validated: int = -1  # step of that evaluation
    key: str = ""  # its name among the metrics
    best: float = math.inf
    best_step: int = -1
    judged: bool = False  # the best is one of validation losses, not of training losses

    def note(self, metrics: Mapping[str, float], step: int) -> None:
        """An evaluation of the user's: the loss that was there first is the one that counts."""
        losses = [name for name in metrics if name.endswith("_loss")]
        self.key = self.key or ("eval_loss" if "eval_loss" in losses else min(losses, default=""))
        if self.key in losses:
            self.validation, self.validated = float(metrics[self.key]), step

    def news(self) -> float | None:
        """The user's validation loss, if it is newer than the latest decision."""
        return self.validation if self.validated > self.last or not self.history else None

    def forget_validation(self) -> None:
        """What was found so far is the loss of another objective."""
        self.history = [replace(report, validation=math.nan) for report in self.history]
        self.best, self.best_step, self.judged = math.inf, -1, False

    def shown(self, report: Progress, validation: float | None) -> Progress:
        """A report as the policy gets to see it."""
        if not self.history:
            return replace(report, validation=math.nan if validation is None else validation)
        return with_validation(report, self.history[-1], validation, self.applied)

    def add(self, report: Progress) -> None:
        """The next report; losses of old ones become their mean, which is all that is used."""
        self.history.append(report)
        if len(self.history) > RAW and (old := self.history[-RAW - 1]).losses:
            self.history[-RAW - 1] = replace(old, losses=(mean_loss(old),))

    def is_best(self, after: int = 0) -> bool:
        """Whether the latest weights are the best so far: by validation loss once there is one.

        after: not asked for that many updates after it was true, so that copies are not many.
        """
        report = self.history[-1]
        if self.best_step >= 0 and report.step - self.best_step < after:
            return False
        judged = any(math.isfinite(past.validation) for past in self.history)
        if judged and not self.judged:
            self.judged, self.best = True, math.inf
        value = mean_loss(report)
        if judged:
            value = report.validation if report.age == 0 else math.nan
        if not (value < self.best or self.best_step < 0):
            return False
        self.best = value if math.isfinite(value) else math.inf
        self.best_step = report.step
        return True

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; NaN and inf as they are."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Logbook":
        """What `to_json` gave."""
        report = found["report"]
        return cls(
            **{
                **found,
                "history": [_progress(each) for each in found["history"]],
                "report": report and _progress(report),
                "applied": _decision(found["applied"]),
            }
        )


def _progress(found: dict[str, Any]) -> Progress:
    decision = _decision(found["decision"])
    return Progress(**{**found, "losses": tuple(found["losses"]), "decision": decision})


def _decision(found: dict[str, Any]) -> Decision:
    turns = found.get("turns", ())  # an older checkpoint has none
    return Decision(**{**found, "turns": tuple((name, amount) for name, amount in turns)})
