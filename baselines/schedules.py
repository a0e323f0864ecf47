"""Schedules: contestants that set the knobs once and train a single run.

What people do without a search. Each is a value: two that are equal make the same run.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar

import numpy as np

from baselines.method import Arena, Method, run_static
from envs import workload
from envs.env import MakeJob
from envs.errors import BadInput
from envs.knobs import RATE_CEILING, RATE_FLOOR, SHAPES, Knobs, Optimizer, reference_rate
from envs.start import open_job
from envs.task import Task

LISTED = 16  # settings of the best list


@dataclass(frozen=True)
class Keep:
    """The user's own: AdamW from the starting rate they chose, linear to zero, no warm-up."""

    name: ClassVar[str] = "keep"
    runs: ClassVar[int] = 1

    def run(self, arena: Arena) -> None:
        """One run."""
        run_static(arena, Knobs(arena.start_rate))


@dataclass(frozen=True)
class KeepAgain:
    """The same with another head and data order: what chance alone makes of a run.

    No contestant but a measure: how often it is "worse than `keep`" is how often harm is found
    where nothing was done.
    """

    name: ClassVar[str] = "keep-again"
    runs: ClassVar[int] = 1

    def run(self, arena: Arena) -> None:
        """One run."""
        run_static(arena, Knobs(arena.start_rate), draw=1)


@dataclass(frozen=True)
class TrainerDefault:
    """AdamW at 5e-5, linear to zero, no warm-up: `transformers.TrainingArguments` untouched."""

    name: ClassVar[str] = "trainer-default"
    runs: ClassVar[int] = 1

    def run(self, arena: Arena) -> None:
        """One run."""
        run_static(arena, Knobs(5e-5))


@dataclass(frozen=True)
class LoraDefault:
    """AdamW at 2e-4, linear to zero, no warm-up: the rate that adapters are handed out with.

    Hu et al. 2021 (LoRA, arXiv 2106.09685, table 11); likewise Dettmers et al. 2023 (QLoRA, arXiv
    2305.14314), who hold it to the end. A contestant where a task has an adapter.
    """

    name: ClassVar[str] = "lora-default"
    runs: ClassVar[int] = 1

    def run(self, arena: Arena) -> None:
        """One run."""
        run_static(arena, Knobs(2e-4))


@dataclass(frozen=True)
class CosineWarmup:
    """The starting rate after a linear warm-up, then half a cosine to zero.

    Loshchilov & Hutter 2017 (SGDR, arXiv 1608.03983), without restarts.
    """

    warmup: float = 0.1  # share of the steps
    name: ClassVar[str] = "cosine-warmup"
    runs: ClassVar[int] = 1

    def run(self, arena: Arena) -> None:
        """One run."""
        run_static(arena, Knobs(arena.start_rate, "cosine", self.warmup))


@dataclass(frozen=True)
class Constant:
    """The starting rate to the end."""

    name: ClassVar[str] = "constant"
    runs: ClassVar[int] = 1

    def run(self, arena: Arena) -> None:
        """One run."""
        run_static(arena, Knobs(arena.start_rate, "constant"))


@dataclass(frozen=True)
class Fixed:
    """One setting for every task, whatever rate the user started from.

    ``relative``: ``knobs.rate`` counts in multiples of the `reference` rate of the task at hand,
    so that a setting found on a small model carries over to a large one.
    """

    knobs: Knobs
    relative: bool = False
    name: str = "fixed"
    runs: ClassVar[int] = 1

    def run(self, arena: Arena) -> None:
        """One run."""
        knobs = self.knobs
        if self.relative:
            rate = knobs.rate * reference(arena.task, knobs.optimizer)
            knobs = replace(knobs, rate=min(max(rate, RATE_FLOOR), RATE_CEILING))
        run_static(arena, knobs)


@dataclass(frozen=True)
class BestList:
    """Settings that are tried one after another while the budget lasts, whatever the job."""

    settings: tuple[Fixed, ...]
    name: str = "list"

    def run(self, arena: Arena) -> None:
        """Each once, or until `BudgetSpent`."""
        for setting in self.settings:
            setting.run(arena)


STATIC: dict[str, type[Method]] = {
    method.name: method for method in (Keep, TrainerDefault, LoraDefault, CosineWarmup, Constant)
}
"""Schedules that need no argument, by name."""


def reference(task: Task, optimizer: Optimizer = "adamw") -> float:
    """The rule-of-thumb rate for a task's model: starting rates are drawn around it."""
    return reference_rate(workload.parameters(task.model), optimizer, task.adapter, task.objective)


def grid(
    decades: Sequence[float] = (-1.0, -0.5, -0.25, 0.0, 0.5),
    warmups: Sequence[float] = (0.0, 0.1),
    heads: Sequence[float] = (1.0, 10.0),
) -> tuple[Fixed, ...]:
    """Candidates for the best fixed setting: relative rates x shapes x warm-ups x head's rates."""
    return tuple(
        Fixed(
            Knobs(10.0**u, shape, warmup, head_rate=head),
            True,
            f"fixed {10.0**u:.3g} {shape} {warmup:g} head {head:g}",
        )
        for u, shape, warmup, head in product(decades, SHAPES, warmups, heads)
    )


def best_fixed(candidates: Sequence[Fixed], outcomes: Iterable[Mapping[str, Any]]) -> Fixed:
    """The candidate with the best mean rank by selection metric over jobs, named ``fixed``.

    outcomes: of a comparison of exactly these candidates on the tuner's own training tasks.
    Ranks, so that a task with a wide range of scores does not decide alone; equals share theirs.
    """
    every = _by_job(candidates, outcomes)
    ahead, equal = every[:, None, :] > every[:, :, None], every[:, None, :] == every[:, :, None]
    ranks = (ahead + 0.5 * equal).sum(2)
    return replace(candidates[int(np.argmin(ranks.mean(0)))], name="fixed")


def best_list(
    candidates: Sequence[Fixed], outcomes: Iterable[Mapping[str, Any]], length: int = LISTED
) -> "BestList":
    """Candidates to try one after another, each the one that helps those before it most.

    Greedy: the next is what raises the mean over jobs of the best selection metric so far, in
    shares of the job's range (sequential portfolios, as in Xu et al. 2010, Hydra, AAAI).
    """
    every = _by_job(candidates, outcomes)
    low, high = every.min(1, keepdims=True), every.max(1, keepdims=True)
    shares = (every - low) / np.where(high > low, high - low, 1.0)
    chosen, best = list[int](), np.zeros((len(every), 1))
    while len(chosen) < min(length, len(candidates)):
        worth = np.maximum(shares, best).mean(0) + 1e-6 * shares.mean(0)  # the latter among equals
        worth[chosen] = -1.0
        chosen.append(int(np.argmax(worth)))
        best = np.maximum(best, shares[:, chosen[-1:]])
    return BestList(tuple(candidates[i] for i in chosen))


def _by_job(candidates: Sequence[Fixed], outcomes: Iterable[Mapping[str, Any]]) -> Any:
    """(jobs, candidates) best selection metrics."""
    names = [candidate.name for candidate in candidates]
    table: dict[tuple[str, int], dict[str, float]] = {}
    for outcome in outcomes:
        job = str(outcome.get("cell", outcome)["task"]), int(outcome["seed"])
        scores = [trial["selection"] for trial in outcome["trials"]]
        table.setdefault(job, {})[outcome["method"]] = max(scores, default=0.0)
    if not table or any(set(row) != set(names) for row in table.values()):
        raise BadInput("fixed: a candidate lacks a job; compare all of them on the same ones")
    return np.array([[row[name] for name in names] for row in table.values()])


def find_fixed(
    tasks: Sequence[Task],
    seeds: Sequence[int],
    candidates: Sequence[Fixed] = grid(),
    make_job: MakeJob = open_job,
) -> Fixed:
    """Run every candidate on every training task and seed, and take the `best_fixed`.

    ``len(candidates) * len(tasks) * len(seeds)`` whole runs in this process; for more, give
    ``grid()`` to `baselines.compare.compare`, which is crash-safe and uses every core.
    """
    outcomes = []
    for number, (task, seed) in enumerate(product(tasks, seeds)):
        for candidate in candidates:
            arena = Arena(task, seed, candidate.knobs.rate, 1, make_job)
            candidate.run(arena)
            outcomes.append(arena.outcome(candidate.name, cell={"task": number // len(seeds)}))
    return best_fixed(candidates, outcomes)
