"""Trainer jobs: any transformers or TRL Trainer as a `Job`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from envs.job import Score
from envs.task import Split


@dataclass(frozen=True)
class Setup:
    """What a factory hands over: a Trainer that has not begun, and how its weights are judged.

    score: the Trainer and a split -> a cost that is never negative (nats for a likelihood), and
    the metric, higher is better. It may leave the model in evaluation mode and use up random
    numbers: the job guards both.
    """

    trainer: Any
    score: Callable[[Any, Split], Score]
    rows: int  # of the training split
    classes: int = 2
