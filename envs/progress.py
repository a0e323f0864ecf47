"""Progress: what a job reports after each interval."""

import math
from dataclasses import dataclass

from envs.knobs import KEEP, Decision


@dataclass(frozen=True)
class Context:
    """What does not change during a run, for the observation."""

    total: int  # updates in the whole run
    decisions: int  # intervals in the whole run
    parameters: int
    rows: int
    classes: int
    adapter: str
    optimizer: str
    start_rate: float
    objective: str = "classification"  # as in `envs.task.Objective`


@dataclass(frozen=True)
class Progress:
    """A job's report at a decision point. The first report, at update 0, has no losses.

    NaN stands for "not measured"; a loss may be NaN or inf when the run diverged.
    """

    step: int  # updates done
    rate: float  # peak rate now in force, before the schedule's shape
    factor: float  # the schedule's shape at the next update
    losses: tuple[float, ...] = ()  # training loss of each update of the interval
    validation: float = math.nan  # validation loss, the latest known
    age: int = 0  # intervals since that evaluation
    gradient: float = math.nan  # gradient norm before clipping (sampled, see probe.py)
    clipped: float = 1.0  # gradient norm after over before clipping, in (0, 1]
    update: float = math.nan  # norm of an update over the norm of the weights (sampled)
    cosine: float = math.nan  # between the gradients of the last two updates (sampled)
    finite: bool = True  # all weights are finite
    decision: Decision = KEEP  # what was applied before this interval
