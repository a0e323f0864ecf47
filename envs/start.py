"""Start: a task's run and its data, of the kind that its objective calls for."""

from typing import Protocol

from envs import workload
from envs.job import Job, TorchJob
from envs.knobs import Knobs
from envs.task import Task


class Data(Protocol):
    """What is told of a task's data, whatever the objective."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of what is told apart; empty where nothing is."""

    @property
    def fingerprint(self) -> str:
        """A hash of all that is read in training and in judging."""


def open_job(task: Task, seed: int, knobs: Knobs | None = None, device: str | None = None) -> Job:
    """A new run: the native loop for classification, a Trainer for every other objective."""
    if task.objective == "classification":
        return TorchJob(task, seed, knobs, device)
    from envs.objectives import prepare
    from envs.trainer_job import TrainerJob

    return TrainerJob(task, seed, knobs, make=prepare)


def data_of(task: Task) -> Data:
    """Read and check the task's data. Raises `BadInput` before any training."""
    if task.objective == "classification":
        return workload.load(task)
    from envs import objectives

    return objectives.load(task)
