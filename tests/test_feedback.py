import math

import numpy as np
import pytest
import torch
from fakes import OPTIMUM, TASK, FakeJob, no_data
from test_method import MethodConformance, Recorder, ended
from transformers.optimization import GreedyLR

from baselines.compare import compare
from baselines.feedback import FEEDBACK, Greedy, Plateau, RangeTest, pick
from baselines.method import Arena, run_cost
from envs.env import EXPLORE
from envs.errors import BadInput
from envs.job import Score, TorchJob
from envs.knobs import Knobs, factor
from envs.task import Task

TEN = Task("fake", rows=64, batch=8, steps=200, interval=20, selection_rows=24)


@pytest.fixture(autouse=True)
def _no_data(monkeypatch):
    no_data(monkeypatch)


class TestFeedback(MethodConformance):
    @pytest.fixture(params=FEEDBACK)
    def method(self, request):
        return FEEDBACK[request.param]()


class Scripted(FakeJob):
    """A fake job whose selection losses are given, one an evaluation; it notes its rates."""

    script: tuple[float, ...] = ()

    def __init__(self, *given):
        super().__init__(*given)
        self.rates = []

    def advance(self, steps):
        self.rates.append(self.knobs.rate)
        return super().advance(steps)

    def evaluate(self, split):
        seen = sum(read == "selection" for read in self.read)
        super().evaluate(split)
        return Score(self.script[seen], 0.5) if split == "selection" else Score(1.0, 0.5)


def rates_of(method, losses, start=1e-3):
    """The rates that a method runs with, interval by interval, when it measures those losses."""
    opened = []

    class Job(Scripted):
        script = tuple(losses)

        def __init__(self, *given):
            super().__init__(*given)
            opened.append(self)

    arena = ended(method, Arena(TASK, 0, start, 1, Job))
    assert [point.rate for point in arena.trials[0].curve] == opened[0].rates
    assert arena.trials[0].knobs.rate == start
    return opened[0].rates


# The range test.


class Valley(FakeJob):
    """Its loss tells the rate of the last update: lowest at ``best``, NaN from 100 times it."""

    best = OPTIMUM * 0.3

    def __init__(self, *given):
        super().__init__(*given)
        self.seen, self.tested = [], None

    def _loss(self):
        if not self.seen:
            return 1.6
        off = math.log10(self.seen[-1] / self.best)
        return 1.0 + 0.3 * off**2 if off < 2 else math.nan

    def advance(self, steps):
        progress = super().advance(steps)
        self.seen.append(self.knobs.rate)
        return progress

    def restore(self, snapshot):
        super().restore(snapshot)
        if self.tested is None:
            self.tested, self.seen = self.seen, []


def test_the_range_test_finds_the_bottom_of_a_known_valley():
    opened = []

    class Job(Valley):
        def __init__(self, *given):
            super().__init__(*given)
            opened.append(self)

    arena = ended(RangeTest(), Arena(TEN, 0, 1e-9, 1, Job))
    job, step = opened[0], 10 ** (4 / 19)
    assert len(opened) == 1
    assert job.tested == pytest.approx(list(OPTIMUM * np.logspace(-2, 2, 20))[: len(job.tested)])
    found = arena.trials[0].knobs
    assert 1 / step < found.rate * 3 / Valley.best < step
    assert (found.shape, job.seen[0]) == ("cosine", found.rate)


def test_the_cosine_spans_what_the_range_test_left_and_both_are_one_run():
    opened = Recorder()
    arena = Arena(TEN, 0, 1e-9, 1, opened)
    RangeTest().run(arena)
    (trial,) = arena.trials
    assert trial.steps == TEN.steps
    tests = round(trial.knobs.warmup * TEN.steps)
    assert tests == 20
    rest = Knobs(1e-3, "cosine")
    for step in range(TEN.steps - tests):
        assert factor(trial.knobs, tests + step, TEN.steps) == pytest.approx(
            factor(rest, step, TEN.steps - tests)
        )
    assert arena.budget.spent <= run_cost(TEN)


def test_the_range_test_stops_where_the_loss_blows_up_and_trains_on_longer():
    class Job(Valley):
        def _loss(self):
            return 50.0 if self.seen and self.seen[-1] > OPTIMUM else 1.0

    arena = ended(RangeTest(), Arena(TEN, 0, 1e-3, 1, Job))
    assert arena.trials[0].knobs.warmup * TEN.steps == pytest.approx(12)
    assert arena.trials[0].knobs.rate < OPTIMUM


def test_the_range_test_starts_training_from_the_pretrained_weights(tiny_task, monkeypatch):
    monkeypatch.undo()  # real data
    weights = []

    class Job(TorchJob):
        def restore(self, snapshot):
            super().restore(snapshot)
            weights.append(self.snapshot())

    task = tiny_task()
    RangeTest().run(Arena(task, 0, 1e-3, 1, Job))
    fresh = TorchJob(task, 0).snapshot()
    assert all(torch.equal(a, b) for a, b in zip(weights[0], fresh, strict=True))


@pytest.mark.parametrize(
    ("losses", "place"),
    [
        ([2.0, 2.0, 1.0, 2.0, 2.0], 0),  # the loss after rate 1 dips, but smoothed over 3 is alike
        ([2.0, 1.9, 1.5, 1.0, 0.9, 1.2, 9.0], 3),
        ([2.0, 1.9, 1.5, 1.0, math.nan], 1),  # its neighbour is lost
        ([math.nan], 0),
        ([2.0, math.inf], 0),
    ],
)
def test_picked_is_the_rate_before_the_lowest_smoothed_loss(losses, place):
    assert pick([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], losses) == place + 1.0


def test_a_run_too_short_for_a_range_test_is_refused():
    tiny = Task("fake", rows=64, batch=8, steps=3, interval=1)
    with pytest.raises(BadInput, match="at least 4"):
        RangeTest().run(Arena(tiny, 0, 1e-3, 1, FakeJob))
    with pytest.raises(BadInput, match="share"):
        RangeTest(0.9)


# Plateau and greedy.


def test_the_plateau_halves_after_three_intervals_without_a_better_loss():
    losses = [1.0, 0.9, 0.95, 0.9, 0.91, 0.92, 0.8, 0.8, 0.8, 0.8]
    assert rates_of(Plateau(), losses) == [1e-3] * 5 + [5e-4] * 4 + [5e-4]
    losses = [1.0, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1]
    assert rates_of(Plateau(), losses) == [1e-3] * 4 + [5e-4] * 3 + [2.5e-4] * 3


def test_greedy_rises_on_a_new_best_and_falls_otherwise():
    found = rates_of(Greedy(0.5), [1.0, 0.9, 0.95, 0.92, 0.8, 0.8, 0.7, 0.6, 0.5, 0.4])
    assert found == pytest.approx(1e-3 * np.array([1, 2, 4, 2, 1, 2, 1, 2, 4, 8]))


def test_greedy_stays_within_its_reach_and_can_leave_the_ends():
    greedy = Greedy()
    falling, flat = [1 / n for n in range(1, 60)], [1.0] * 60
    assert greedy.rate(1e-3, falling) == pytest.approx(1e-3 * EXPLORE)
    assert greedy.rate(1e-3, flat) == pytest.approx(1e-3 / EXPLORE)
    assert greedy.rate(1e-3, [*flat, 0.5]) > greedy.rate(1e-3, flat)


def stepped(scheduler, optimizer, losses):
    for loss in losses:
        scheduler.step(loss)
    return optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("seed", range(20))
def test_the_rules_are_those_of_torch_and_transformers(seed):
    rng = np.random.default_rng(seed)
    losses = (1.0 + np.cumsum(rng.normal(-0.01, 0.05, 40))).tolist()
    if seed % 4 == 0:
        losses[10] = math.nan
    for patience in (0, 2):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
        torchs = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.5, patience=patience, eps=0.0
        )
        mine = Plateau(patience=patience).rate(1e-3, losses)
        assert mine == pytest.approx(stepped(torchs, optimizer, losses))
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
        theirs = GreedyLR(
            optimizer, factor=0.7, patience=patience, eps=0.0,
            min_lr=1e-3 / EXPLORE, max_lr=1e-3 * EXPLORE,
        )  # fmt: skip
        mine = Greedy(patience=patience).rate(1e-3, losses)
        assert mine == pytest.approx(stepped(theirs, optimizer, losses))


def test_a_packed_range_test_finds_the_rate_of_a_plain_one(tiny_task, tmp_path, monkeypatch):
    """Its updates one by one stand beside whole intervals of the other lanes."""
    monkeypatch.undo()  # real data
    methods, tasks = [RangeTest(), Plateau()], [tiny_task(steps=40)]
    alone = compare(methods, tasks, (0, 1), tmp_path / "alone", runs=1, offset=-1.5)
    packed = compare(methods, tasks, (0, 1), tmp_path / "packed", runs=1, offset=-1.5, pack=4)
    for one, other in zip(alone, packed, strict=True):
        assert other["packed"] == 4
        assert one["spent"] == other["spent"]
        mine, theirs = one["trials"][0], other["trials"][0]
        assert mine["knobs"] == theirs["knobs"]
        assert [p["rate"] for p in mine["curve"]] == [p["rate"] for p in theirs["curve"]]
        assert mine["test_loss"] == pytest.approx(theirs["test_loss"], rel=1e-3)
