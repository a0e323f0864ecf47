"""Objectives: the ready Trainer of every task that is not plain classification."""

from collections.abc import Callable, Mapping

from envs import alignment, supervised
from envs.errors import lookup
from envs.examples import Data, load
from envs.knobs import Knobs
from envs.setups import arguments
from envs.task import OBJECTIVE_TASKS, Task
from envs.trainer_job import Setup

__all__ = ["MAKERS", "TASKS", "Data", "arguments", "load", "prepare"]

TASKS = OBJECTIVE_TASKS

MAKERS: Mapping[str, Callable[[Task, int, Knobs], Setup]] = {
    "regression": supervised.regression,
    "tokens": supervised.tokens,
    "causal": supervised.causal,
    "translation": supervised.translation,
    "headlines": supervised.headlines,
    "reward": alignment.reward,
    "dpo": alignment.dpo,
    "kto": alignment.kto,
    "sft": alignment.sft,
    "grpo": alignment.grpo,
}


def prepare(task: Task, seed: int, knobs: Knobs) -> Setup:
    """The Trainer of the task's objective, and how its weights are judged.

    The seed draws new weights, the order of the data and dropout; the caller's random states are
    untouched. Dropout and generation inside ``train()`` draw from the global states of whoever
    runs it. Raises `BadInput` before any training.
    """
    return lookup(MAKERS, task.objective, "objective with a Trainer")(task, seed, knobs)
