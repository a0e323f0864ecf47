"""Contestants with an optimizer of their own, on fake jobs and on tiny real ones."""

from functools import partial

import pytest
import torch
from test_method import MethodConformance

from baselines.compare import compare
from baselines.method import Arena
from baselines.optimizers import OPTIMIZERS, Prodigy, ScheduleFree, prodigy, schedule_free
from baselines.schedules import Keep
from envs import optim
from envs.errors import BadInput
from envs.job import TorchJob
from envs.knobs import Knobs, factor

pytest.importorskip("schedulefree")
pytest.importorskip("prodigyopt")


class TestOptimizers(MethodConformance):
    @pytest.fixture(params=OPTIMIZERS)
    def method(self, request, monkeypatch):
        opened = Arena.open
        monkeypatch.setattr(Arena, "open", lambda arena, knobs, make_job: opened(arena, knobs))
        return OPTIMIZERS[request.param]()


class Kept(TorchJob):
    """A job that is kept, with the rate and the estimate of its optimizer's last update."""

    jobs: list[TorchJob] = []  # noqa: RUF012

    def __init__(self, *given, **options):
        super().__init__(*given, **options)
        Kept.jobs.append(self)

    def advance(self, steps):
        progress = super().advance(steps)
        self.group = dict(self._optimizer.param_groups[0])
        return progress


@pytest.fixture
def kept(monkeypatch):
    monkeypatch.setattr("baselines.optimizers.TorchJob", Kept)
    monkeypatch.setattr(Kept, "jobs", [])
    return Kept.jobs


def test_schedule_free_evaluates_and_keeps_the_averaged_weights(tiny_task):
    """In eval() mode the weights are x, the mean of the z: here z after each update, by hand."""
    job = TorchJob(tiny_task(), 0, Knobs(3e-3, "constant"), optimizer=schedule_free)
    iterates = []
    for _ in range(6):
        job.advance(1)
        state = job._optimizer.state
        iterates.append([state[p]["z"].clone() for p in job._parameters])
    mean = [torch.stack(steps).mean(0) for steps in zip(*iterates, strict=True)]
    for kept, expected in zip(job.snapshot(), mean, strict=True):
        torch.testing.assert_close(kept, expected, rtol=1e-3, atol=1e-5)
    judged = job.evaluate("selection")
    job._optimizer.train()  # the weights that gradients are taken at
    assert job.evaluate("selection") != judged
    job._optimizer.eval()
    assert job.evaluate("selection").loss == pytest.approx(judged.loss, rel=1e-5)


def test_looking_does_not_change_a_schedule_free_run(tiny_task):
    one, other = (TorchJob(tiny_task(), 0, Knobs(3e-3), optimizer=schedule_free) for _ in range(2))
    for _ in range(3):
        one.advance(4)
        one.evaluate("selection")
        one.snapshot()
        other.advance(4)
    assert all(torch.equal(a, b) for a, b in zip(one.snapshot(), other.snapshot(), strict=True))


def test_the_referee_judges_the_averaged_weights(tiny_task, kept):
    arena = Arena(tiny_task(), 0, 3e-3, 1)
    ScheduleFree().run(arena)
    (trial,) = arena.trials
    assert trial.test == kept[0].evaluate("test").metric
    assert (trial.state, trial.knobs) == ("complete", Knobs(3e-3, "constant", 0.05))


def test_prodigy_runs_at_rate_one_along_a_cosine_and_finds_a_rate(tiny_task, kept):
    arena = Arena(tiny_task(steps=40), 0, 1e-9, 1)
    Prodigy().run(arena)
    group = kept[0].group
    assert group["safeguard_warmup"] is True
    assert arena.trials[0].knobs == Knobs(1.0, "cosine")
    assert group["lr"] == factor(Knobs(1.0, "cosine"), 39, 40)
    assert group["d"] > 1e-5


@pytest.mark.parametrize("make", [schedule_free, prodigy])
def test_a_restored_job_starts_afresh(tiny_task, make):
    """As a new job with the same batches: neither moments nor counters are left."""
    task = tiny_task()
    job, other = (TorchJob(task, 0, Knobs(1e-3, "constant"), optimizer=make) for _ in range(2))
    pretrained = job.snapshot()
    job.advance(4)
    job.restore(pretrained)
    for _ in range(4):
        next(other._order)
    one, two = job.advance(4), other.advance(4)
    assert one.losses == two.losses
    assert all(torch.equal(a, b) for a, b in zip(job.snapshot(), other.snapshot(), strict=True))


def test_an_optimizer_of_ones_own_takes_a_rate_and_no_other_optimizer(tiny_task):
    job = TorchJob(tiny_task(), 0, Knobs(1e-3), optimizer=schedule_free)
    job.apply(Knobs(2e-3))
    job.advance(1)
    assert job._optimizer.param_groups[0]["lr"] == 2e-3
    for knobs in (Knobs(1e-3, optimizer="sgd"), Knobs(1e-3, weight_decay=0.1)):
        with pytest.raises(BadInput, match="only the rate"):
            job.apply(knobs)


def test_the_plain_optimizer_given_as_a_factory_changes_nothing(tiny_task):
    one, other = TorchJob(tiny_task(), 0), TorchJob(tiny_task(), 0, optimizer=optim.make)
    assert one.advance(6).losses == other.advance(6).losses


def test_packed_or_not_the_outcome_is_the_same_to_the_bit(tiny_task, tmp_path):
    task = tiny_task()
    methods = [ScheduleFree(), Prodigy(), Keep()]
    run = partial(compare, methods, [task], (0, 1), runs=1, offset=-1.5)
    alone, packed = run(tmp_path / "alone"), run(tmp_path / "packed", pack=4)
    assert [outcome.get("packed") for outcome in packed] == [None] * 4 + [2] * 2
    for one, other in zip(alone[:4], packed[:4], strict=True):
        assert repr(one["trials"]) == repr(other["trials"])
        assert one["spent"] == other["spent"] == one["budget"]


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match="pip install schedulefree"):
        ScheduleFree()
    with pytest.raises(BadInput, match="pip install prodigyopt"):
        Prodigy()


def test_the_version_of_the_package_is_part_of_what_is_compared():
    assert ScheduleFree().describe()["version"]
    assert ScheduleFree(0.1).describe() != ScheduleFree().describe()
    assert Prodigy().describe()["version"]
