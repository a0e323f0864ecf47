import math
from dataclasses import replace
from typing import get_args

import pytest
from fakes import OPTIMUM, OTHER, TASK, FakeJob, no_data
from test_method import MethodConformance, ended

from baselines.method import Arena
from baselines.search import (
    HIGHEST,
    KNOTS,
    LOWEST,
    NO_DECAY,
    Sampler,
    Search,
    along,
    draw,
)
from envs.errors import BadInput, UnknownName
from envs.knobs import RATE_CEILING, reference_rate

QUICK = [name for name in get_args(Sampler) if name != "gp"]  # GP takes half a second a trial


def trials(method, runs=30.0, seed=0, task=TASK):
    return ended(method, Arena(task, seed, 1e-5, runs, FakeJob)).trials


def as_adamw(knobs):
    """The rate on AdamW's scale."""
    ruler = [reference_rate(1, name, "full") for name in ("adamw", knobs.optimizer)]
    return knobs.rate * ruler[0] / ruler[1]


@pytest.fixture(autouse=True)
def _no_data(monkeypatch):
    no_data(monkeypatch)


class TestSearch(MethodConformance):
    @pytest.fixture(params=[(s, p) for s in get_args(Sampler) for p in (None, "hyperband")])
    def method(self, request):
        return Search(*request.param)


@pytest.mark.parametrize("sampler", QUICK)
@pytest.mark.parametrize("seed", range(3))
def test_thirty_trials_find_the_known_optimum(sampler, seed):
    best = max(trials(Search(sampler), seed=seed), key=lambda trial: trial.selection)
    assert OPTIMUM / 2 < as_adamw(best.knobs) < OPTIMUM * 2


def test_gp_finds_the_known_optimum():
    best = max(trials(Search("gp"), runs=16), key=lambda trial: trial.selection)
    assert OPTIMUM / 2 < as_adamw(best.knobs) < OPTIMUM * 2


def test_as_many_trials_as_the_budget_has_runs():
    assert [t.state for t in trials(Search("random", decades=1.0), runs=7)] == ["complete"] * 7


def test_rates_are_spread_over_three_decades_around_the_reference_not_the_start():
    drawn = [math.log10(as_adamw(t.knobs) / OPTIMUM) for t in trials(Search(), runs=200)]
    assert min(drawn) < -1.4
    assert max(drawn) > 1.4
    assert max(map(abs, drawn)) <= 1.5 + 1e-9
    assert abs(sum(drawn) / len(drawn)) < 0.2


def test_the_space_reaches_every_knob():
    settings = [trial.knobs for trial in trials(Search(), runs=200)]
    assert {k.shape for k in settings} == {"constant", "linear", "cosine"}
    assert {k.optimizer for k in settings} == {"adamw", "sgd", "rmsprop"}
    assert all(0 <= k.warmup <= 0.2 for k in settings)
    none = sum(k.weight_decay == 0 for k in settings) / len(settings)
    assert 0.15 < none < 0.35
    assert all(k.weight_decay == 0 or NO_DECAY <= k.weight_decay <= 0.1 for k in settings)


def test_a_search_may_keep_to_the_reach_of_a_tuner_that_switches_no_optimizer():
    search = Search("tpe", optimizers=("adamw",))
    assert search.name == "tpe+adamw"
    settings = [trial.knobs for trial in trials(search, runs=40)]
    assert {k.optimizer for k in settings} == {"adamw"}
    assert {k.shape for k in settings} == {"constant", "linear", "cosine"}
    for bad in ((), ("lion",)):
        with pytest.raises(BadInput, match="search: optimizers"):
            Search(optimizers=bad)


def test_a_center_of_ones_own_and_a_rate_that_would_leave_the_range():
    drawn = [t.knobs for t in trials(Search(center=1.0, decades=0.5), runs=30)]
    assert all(k.rate <= RATE_CEILING for k in drawn)
    assert all(0.3 < as_adamw(k) < 3.2 for k in drawn if k.rate < RATE_CEILING)


def test_hyperband_prunes_charges_what_was_used_and_so_tries_more():
    arena = ended(Search("random", "hyperband"), Arena(TASK, 0, 1e-3, 10, FakeJob))
    states = [trial.state for trial in arena.trials]
    assert states.count("pruned") > 5
    assert len(states) > 15
    interval = arena.budget.total / 10 / TASK.decisions
    assert sum(len(t.curve) for t in arena.trials) * interval == pytest.approx(arena.budget.spent)


def test_hyperband_deals_the_same_brackets_again():
    one, two = (trials(Search("random", "hyperband"), runs=10) for _ in range(2))
    assert [t.steps for t in one] == [t.steps for t in two]


def test_pruner_or_not_the_first_trial_is_the_same():
    one, two = (trials(Search("tpe", p), runs=2)[0].knobs for p in (None, "hyperband"))
    assert one == two


@pytest.mark.parametrize("sampler", QUICK)
def test_diverged_trials_do_not_end_a_study_and_are_avoided(sampler):
    """Half of the space diverges at once: a diverged trial tells the sampler so."""
    found = trials(Search(sampler, center=OPTIMUM * 100), runs=30, seed=1)
    wild = [trial.state == "diverged" for trial in found]
    assert any(wild)
    assert len(found) >= 30
    if sampler != "random":
        assert sum(wild[-10:]) <= 2


def test_seeds_and_tasks_draw_different_trials():
    first = {
        trials(Search(), runs=1, seed=seed, task=task)[0].knobs
        for seed in (0, 1)
        for task in (TASK, OTHER)
    }
    assert len(first) == 4


def test_nothing_is_printed(capfd):
    trials(Search("tpe", "hyperband"), runs=12)
    assert capfd.readouterr() == ("", "")


def test_names():
    assert Search("tpe", "hyperband").name == "tpe+hyperband"
    assert Search("cmaes").name == "cmaes"
    with pytest.raises(UnknownName, match="Did you mean 'tpe'"):
        Search("tpee")
    with pytest.raises(UnknownName, match="pruner"):
        Search("tpe", "median")
    for bad in ({"center": math.nan}, {"center": 0.0}, {"decades": 0}, {"decades": math.nan}):
        with pytest.raises(BadInput):
            Search(**bad)


def test_cmaes_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match="pip install cmaes"):
        Search("cmaes")


class TestKnots(MethodConformance):
    @pytest.fixture(params=["random", "tpe"])
    def method(self, request):
        return Search(request.param, knots=KNOTS)


def test_knots_interpolate_to_known_rates():
    """Log-linear: halfway between 0.1 and 1 lies the root of 0.1."""
    knots = (0.1, 1.0, 1.0, 0.01)
    found = [along(knots, place / 6) for place in range(7)]
    assert found == pytest.approx([0.1, 0.1**0.5, 1.0, 1.0, 1.0, 0.1, 0.01])
    assert along((0.5, 2.0), 0.5) == pytest.approx(1.0)


@pytest.mark.parametrize("task", [TASK, replace(TASK, interval=20)])
def test_each_interval_has_the_rate_of_its_place_among_the_knots(task, monkeypatch):
    drawn = []

    def noted(*given):
        drawn.append(draw(*given))
        return drawn[-1]

    monkeypatch.setattr("baselines.search.draw", noted)
    for trial in trials(Search(knots=KNOTS, decades=0.1), runs=5, task=task):
        knobs, multipliers = drawn.pop(0)
        assert trial.knobs == knobs
        assert (knobs.shape, knobs.warmup, len(multipliers)) == ("constant", 0.0, 4)
        assert all(LOWEST <= m <= HIGHEST for m in multipliers)
        rates = [point.rate for point in trial.curve]
        last = max(1, task.decisions - 1)
        assert rates == pytest.approx(
            [knobs.rate * along(multipliers, i / last) for i in range(len(rates))]
        )
        assert rates[0] == pytest.approx(knobs.rate * multipliers[0])
        if task is TASK and trial.state == "complete":
            assert rates[-1] == pytest.approx(knobs.rate * multipliers[-1])


def test_thirty_trials_with_knots_come_near_the_known_optimum():
    """The best constant run reaches the optimum; knots have to find it at each of four points."""
    best = max(trials(Search("tpe", knots=KNOTS), runs=60), key=lambda trial: trial.selection)
    constant = trials(Search(center=OPTIMUM, decades=1e-6), runs=1)[0]
    assert best.selection > 0.85 * constant.selection


def test_knots_have_a_name_and_bounds():
    assert Search("tpe", knots=4).name == "tpe+knots"
    assert Search("tpe", "hyperband", knots=4).name == "tpe+knots+hyperband"
    with pytest.raises(BadInput, match="knots"):
        Search(knots=1)
