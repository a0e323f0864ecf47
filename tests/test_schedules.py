import math
from dataclasses import replace

import pytest
from fakes import OPTIMUM, OTHER, TASK, FakeJob, no_data
from test_method import MethodConformance, ended

from baselines.method import Arena
from baselines.schedules import (
    STATIC,
    Constant,
    CosineWarmup,
    Fixed,
    Keep,
    KeepAgain,
    LoraDefault,
    TrainerDefault,
    best_fixed,
    best_list,
    find_fixed,
    grid,
)
from envs.errors import BadInput
from envs.knobs import Knobs, factor


@pytest.fixture(autouse=True)
def _no_data(monkeypatch):
    no_data(monkeypatch)


class TestStatic(MethodConformance):
    @pytest.fixture(params=[*STATIC, "fixed"])
    def method(self, request):
        return Fixed(Knobs(OPTIMUM)) if request.param == "fixed" else STATIC[request.param]()


def test_keep_again_is_the_same_schedule_on_another_draw():
    seeds = []

    def open_job(task, seed, knobs):
        seeds.append((seed, knobs))
        return FakeJob(task, seed, knobs)

    for method in (Keep(), KeepAgain(), KeepAgain()):
        method.run(Arena(TASK, 3, 3e-4, 1, open_job))
    (kept, one), (again, other), (third, _) = seeds
    assert one == other == Knobs(3e-4)
    assert (kept, again) == (3, third)
    assert again != kept


@pytest.mark.parametrize(
    ("method", "knobs"),
    [
        (Keep(), Knobs(3e-4)),
        (TrainerDefault(), Knobs(5e-5)),
        (LoraDefault(), Knobs(2e-4)),
        (CosineWarmup(), Knobs(3e-4, "cosine", 0.1)),
        (Constant(), Knobs(3e-4, "constant")),
        (Fixed(Knobs(1e-3, "cosine")), Knobs(1e-3, "cosine")),
    ],
)
def test_one_run_with_the_knobs_of_the_schedule(method, knobs):
    arena = ended(method, Arena(TASK, 0, 3e-4, 5, FakeJob))
    assert [trial.knobs for trial in arena.trials] == [knobs]


def test_the_trainers_default_is_what_transformers_does():
    import torch
    from transformers import get_scheduler
    from transformers.training_args import TrainingArguments

    fields = {f.name: f.default for f in TrainingArguments.__dataclass_fields__.values()}
    knobs = Knobs(5e-5)
    assert fields["learning_rate"] == knobs.rate
    assert str(fields["lr_scheduler_type"]) in ("linear", "SchedulerType.LINEAR")
    assert (fields["weight_decay"], fields["max_grad_norm"]) == (knobs.weight_decay, knobs.clip)
    assert not fields["warmup_steps"]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler("linear", optimizer, 0, 20)
    for step in range(20):
        assert factor(knobs, step, 20) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


def test_a_relative_rate_moves_with_the_reference_and_the_optimizer():
    for optimizer, ratio in (("adamw", 1.0), ("sgd", 12.0), ("rmsprop", 0.25)):
        arena = Arena(TASK, 0, 1e-5, 1, FakeJob)
        Fixed(Knobs(0.5, optimizer=optimizer), relative=True).run(arena)
        assert arena.trials[0].knobs.rate == pytest.approx(0.5 * OPTIMUM * ratio)


def test_the_grid_has_different_names_and_settings():
    settings = grid()
    assert len({s.name for s in settings}) == len({s.knobs for s in settings}) == 60
    assert all(s.relative for s in settings)


def test_a_best_list_is_greedy_and_each_is_tried_once_while_the_budget_lasts():
    """a is best on average; with it c helps more than b, which is good where a is."""
    candidates = [
        Fixed(Knobs(rate), True, name) for name, rate in zip("abcd", (1, 2, 3, 4), strict=True)
    ]
    scores = {"a": (9, 9, 0), "b": (8, 8, 1), "c": (0, 0, 9), "d": (0, 1, 2)}
    outcomes = [
        {"task": job, "seed": 0, "method": name, "trials": [{"selection": row[job]}]}
        for name, row in scores.items() for job in range(3)
    ]  # fmt: skip
    found = best_list(candidates, outcomes, 3)
    assert [setting.name for setting in found.settings] == ["a", "c", "b"]
    assert len(best_list(candidates, outcomes).settings) == 4
    for runs, made in ((9, 3), (2, 2)):
        arena = ended(found, Arena(TASK, 0, 1e-5, runs, FakeJob))
        rates = [trial.knobs.rate for trial in arena.trials]
        assert rates == pytest.approx([OPTIMUM * rate for rate in (1, 3, 2)][:made])


def test_find_fixed_finds_the_known_optimum():
    best = find_fixed([TASK, OTHER], [0, 1], make_job=FakeJob)
    assert best.knobs.rate == 1.0
    assert best.relative
    assert best.name == "fixed"


def test_best_fixed_ranks_within_a_job_so_that_one_task_cannot_decide():
    """b wins two of three jobs narrowly, a wins one by far: the mean score would take a."""
    a, b = (Fixed(Knobs(rate), name=name) for name, rate in (("a", 1e-3), ("b", 1e-4)))
    scores = {"x": (0.50, 0.51), "y": (0.60, 0.61), "z": (0.9, 0.1)}
    outcomes = [
        {"method": name, "task": task, "seed": 0, "trials": [{"selection": pair[i]}]}
        for task, pair in scores.items()
        for i, name in enumerate("ab")
    ]
    assert best_fixed([a, b], outcomes) == replace(b, name="fixed")
    assert best_fixed([a, b], [o for o in outcomes if o["task"] == "z"]).knobs == a.knobs
    with pytest.raises(BadInput, match="lacks a job"):
        best_fixed([a, b], outcomes[:-1])
    with pytest.raises(BadInput, match="lacks a job"):
        best_fixed([a, b], [])


def test_a_setting_that_diverges_is_the_worst():
    wild = Fixed(Knobs(1.0), name="wild")
    tame = Fixed(Knobs(OPTIMUM / 30), name="tame")
    assert find_fixed([TASK], [0], [wild, tame], FakeJob).knobs == tame.knobs
    assert math.isclose(find_fixed([TASK], [0], [wild], FakeJob).knobs.rate, 1.0)
