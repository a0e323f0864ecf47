"""The budget, the referee, and what every method must keep to.

A new method's test module subclasses `MethodConformance` and overrides the ``method`` fixture.
"""

import contextlib
import math

import pytest
from fakes import OPTIMUM, OTHER, TASK, FakeJob, no_data

from baselines.method import (
    FORWARD,
    Arena,
    Best,
    Budget,
    BudgetSpent,
    Method,
    run_cost,
    run_static,
)
from envs.errors import BadInput
from envs.job import Score
from envs.knobs import Knobs

INTERVAL = 2 * 8 + 24 * FORWARD  # rows to train on and to evaluate on, in one interval of TASK


class Recorder:
    """Opens fake jobs and keeps them."""

    def __init__(self):
        self.jobs = []

    def __call__(self, task, seed, knobs):
        self.jobs.append(FakeJob(task, seed, knobs))
        return self.jobs[-1]


class FirstLosses:
    """Opens fake jobs and keeps the first training loss of each."""

    def __init__(self):
        self.seen = []

    def __call__(self, task, seed, knobs):
        job, advance = FakeJob(task, seed, knobs), FakeJob.advance

        def first(steps):
            progress = advance(job, steps)
            if progress.step == steps:
                self.seen.append(progress.losses[0])
            return progress

        job.advance = first
        return job


def ended(method, arena):
    """The arena after the method, which may end by spending the budget."""
    with contextlib.suppress(BudgetSpent):
        method.run(arena)
    return arena


class MethodConformance:
    """What a comparison relies on, for any method."""

    runs = 3.0

    @pytest.fixture
    def method(self) -> Method:
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def _no_data(self, monkeypatch):
        no_data(monkeypatch)

    def test_hands_in_a_trial_for_one_run(self, method):
        assert ended(method, Arena(TASK, 0, 1e-3, 1, FakeJob)).trials

    @pytest.mark.parametrize("runs", [0.05, 0.5, 1, 2.5])
    def test_never_spends_more_than_the_budget(self, method, runs):
        arena = ended(method, Arena(TASK, 0, 1e-3, runs, FakeJob))
        assert arena.budget.spent <= runs * run_cost(TASK) * (1 + 1e-9)

    def test_same_seed_same_outcome(self, method):
        one, two = (
            ended(method, Arena(TASK, 3, 1e-3, self.runs, FakeJob, clock=lambda: 0.0))
            for _ in range(2)
        )
        assert repr(one.outcome("x")) == repr(two.outcome("x"))

    def test_runs_of_a_cell_are_paired(self, method):
        """The first update sees the same weights and batch, whatever the method sets."""
        first = FirstLosses()
        ended(method, Arena(TASK, 5, 1e-3, self.runs, first))
        assert set(first.seen) == {FakeJob(TASK, 5, Knobs()).advance(1).losses[0]}

    def test_every_trial_was_charged_and_judged_once(self, method):
        opened = Recorder()
        arena = ended(method, Arena(TASK, 0, 1e-3, self.runs, opened))
        assert sum(job.step for job in opened.jobs) * TASK.batch <= arena.budget.spent
        assert sum(job.read.count("test") for job in opened.jobs) <= len(arena.trials)
        assert all(job.read.count("test") <= 1 for job in opened.jobs)
        spent = [trial.spent for trial in arena.trials]
        assert spent == sorted(spent)

    def test_name_is_short_and_stable(self, method):
        assert 0 < len(method.name) < 40
        assert method.name == method.name


class Greedy:
    """Tries to train on for ever."""

    name = "greedy"

    def run(self, arena):
        job = arena.open(Knobs(OPTIMUM))
        best = Best()
        try:
            while True:
                job.advance(1)
                best.offer(job.evaluate("selection"), job)
        except BudgetSpent:
            arena.hand_in(job, best, [], "complete", job.knobs)
            raise


class TestGreedy(MethodConformance):
    @pytest.fixture
    def method(self):
        return Greedy()


def test_a_run_costs_its_batches_and_a_third_of_its_evaluations():
    assert run_cost(TASK) == 20 * 8 + 10 * 24 / 3
    arena = Arena(TASK, 0, OPTIMUM, 1, FakeJob)
    trial = run_static(arena, Knobs(OPTIMUM))
    assert trial.state == "complete"
    assert arena.budget.spent == pytest.approx(arena.budget.total)
    assert trial.spent == arena.budget.spent


def test_a_refused_charge_spends_nothing():
    budget = Budget(10.0)
    budget.charge(7)
    with pytest.raises(BudgetSpent, match="4 rows asked, 3 left"):
        budget.charge(4)
    assert budget.spent == 7
    budget.charge(3)


@pytest.mark.parametrize("rows", [-1, math.nan, -math.inf])
def test_nothing_can_be_earned_back(rows):
    budget = Budget(10.0, 5.0)
    with pytest.raises(BadInput, match="earned back"):
        budget.charge(rows)
    assert budget.spent == 5


def test_an_update_is_refused_before_it_is_made():
    opened = Recorder()
    arena = Arena(TASK, 0, OPTIMUM, 0.01, opened)
    with pytest.raises(BudgetSpent):
        arena.open(Knobs(OPTIMUM)).advance(2)
    assert opened.jobs[0].step == 0


def test_the_test_split_is_closed_to_methods():
    opened = Recorder()
    job = Arena(TASK, 0, OPTIMUM, 1, opened).open(Knobs(OPTIMUM))
    with pytest.raises(BadInput, match="referee alone"):
        job.evaluate("test")
    assert opened.jobs[0].read == []


def test_the_referee_reads_test_once_and_of_the_best_checkpoint():
    opened = Recorder()
    arena = Arena(TASK, 0, OPTIMUM, 3, opened)
    job, best = arena.open(Knobs(OPTIMUM)), Best()
    job.advance(8)
    best.offer(job.evaluate("selection"), job)
    expected = opened.jobs[0]._loss() + 0.03
    job.apply(Knobs(OPTIMUM * 200))  # beyond repair
    job.advance(2)
    best.offer(job.evaluate("selection"), job)
    spent = arena.budget.spent
    trial = arena.hand_in(job, best, [], "diverged", job.knobs)
    assert opened.jobs[0].read.count("test") == 1
    assert math.isnan(trial.test_loss), "the method is not told"
    assert arena.trials[0].test_loss == pytest.approx(expected)
    assert arena.budget.spent == spent, "the referee's reading is not the method's cost"
    with pytest.raises(KeyError):
        arena.hand_in(job, best, [], "complete", job.knobs)
    assert opened.jobs[0].read.count("test") == 1


def test_checkpoint_rule_is_metric_then_loss_and_never_a_number_that_is_none():
    job = Arena(TASK, 0, OPTIMUM, 3, FakeJob).open(Knobs(OPTIMUM))
    best = Best()
    for score, taken in (
        (Score(math.nan, 0.9), False),
        (Score(1.0, 0.5), True),
        (Score(0.8, 0.4), False),
        (Score(0.9, 0.5), True),
        (Score(0.9, 0.5), False),
        (Score(math.inf, 1.0), False),
        (Score(5.0, 0.6), True),
    ):
        before = best.score
        best.offer(score, job)
        assert (best.score is score) is taken, score
        assert taken or best.score is before


def test_a_pruned_trial_is_charged_what_it_used():
    arena = Arena(TASK, 0, OPTIMUM, 3, FakeJob)
    trial = run_static(arena, Knobs(OPTIMUM), lambda point: point.step == 6)
    assert (trial.state, trial.steps, len(trial.curve)) == ("pruned", 6, 3)
    assert trial.spent == arena.budget.spent == pytest.approx(3 * INTERVAL)


def test_a_run_that_the_budget_cuts_is_handed_in_if_anything_was_seen_of_it():
    arena = Arena(TASK, 0, OPTIMUM, 1.5, FakeJob)
    run_static(arena, Knobs(OPTIMUM))
    with pytest.raises(BudgetSpent):
        run_static(arena, Knobs(OPTIMUM))
    with pytest.raises(BudgetSpent):
        run_static(arena, Knobs(OPTIMUM))
    assert [(trial.state, trial.steps) for trial in arena.trials] == [
        ("complete", 20), ("pruned", 10),
    ]  # fmt: skip


def test_divergence_ends_a_run_and_its_best_checkpoint_counts():
    arena = Arena(TASK, 0, OPTIMUM, 1, FakeJob)
    trial = run_static(arena, Knobs(OPTIMUM * 1000))
    assert (trial.state, trial.steps, trial.selection) == ("diverged", 2, 0.0)
    assert trial.spent == pytest.approx(INTERVAL)
    assert math.isinf(arena.trials[0].test_loss)


def test_an_outcome_says_what_it_cost():
    ticks = iter([10.0, 12.5])
    arena = Arena(OTHER, 4, 1e-3, 2, FakeJob, clock=lambda: next(ticks))
    run_static(arena, Knobs(OPTIMUM))
    outcome = arena.outcome("x", note="y")
    assert outcome["task"] == "other/tiny-32"
    assert (outcome["seconds"], outcome["note"], outcome["start_rate"]) == (2.5, "y", 1e-3)
    assert outcome["budget"] == 2 * outcome["run_cost"]
