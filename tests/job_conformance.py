"""What every `Job` must do; a new kind of job inherits it."""

import gc
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

SEED, STEPS = 3, 12


def same(first, second):
    """Equal reports; NaN is itself."""
    return repr(first) == repr(second)


class JobConformance:
    """Subclasses give `open`: a job of `STEPS` updates, interval 4, with dropout if it may."""

    RATE = 1e-2  # moves the weights and does not break them

    def open(self, seed=SEED, rate=RATE):
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def _collected(self):
        yield
        gc.collect()

    def test_the_reports_are_of_the_updates_asked_for(self):
        job = self.open()
        assert (job.step, job.knobs.rate) == (0, self.RATE)
        for steps, done in ((4, 4), (1, 5), (7, 12)):
            report = job.advance(steps)
            assert (job.step, report.step, len(report.losses)) == (done, done, steps)
            assert report.finite
            assert report.rate == self.RATE
            assert all(math.isfinite(loss) for loss in report.losses)
            assert math.isfinite(report.gradient)
            assert report.gradient > 0
            assert 0 < report.clipped <= 1
            assert math.isnan(report.cosine) == (steps == 1)
        assert job.context.total == STEPS
        assert job.context.start_rate == self.RATE

    def test_one_seed_is_one_run_whatever_else_draws(self):
        runs = []
        for seed in (0, 0, 1):
            job = self.open(seed)
            first = job.advance(4)
            random.random(), np.random.rand(), torch.rand(3)
            runs.append((first, job.advance(4), job.evaluate("validation")))
        assert same(runs[0], runs[1])
        assert not same(runs[0][0].losses, runs[2][0].losses)

    def test_the_callers_random_numbers_are_its_own(self):
        def drawn():
            return random.random(), np.random.rand(), torch.rand(1).item()

        random.seed(5), np.random.seed(5), torch.manual_seed(5)
        expected = [drawn(), drawn(), drawn()]
        random.seed(5), np.random.seed(5), torch.manual_seed(5)
        job, found = self.open(), []
        for _ in range(3):
            found.append(drawn())
            job.advance(2)
            job.evaluate("validation")
        assert found == expected

    def test_two_in_turns_are_each_as_if_alone(self):
        alone = [self.open(seed) for seed in (0, 1)]
        expected = [[job.advance(4), job.advance(4)] for job in alone]
        jobs = [self.open(seed) for seed in (0, 1)]
        found = [[job.advance(4) for job in jobs] for _ in range(2)]
        assert same([list(pair) for pair in zip(*found, strict=True)], expected)

    def test_looking_does_not_change_training(self):
        looked_at, alone = self.open(), self.open()
        for _ in range(3):
            for split in ("validation", "selection", "test"):
                assert looked_at.evaluate(split) == looked_at.evaluate(split)
            looked_at.snapshot()
            assert same(looked_at.advance(4), alone.advance(4))
        assert looked_at.evaluate("test") == alone.evaluate("test")

    def test_every_change_of_the_rate_changes_the_next_update(self):
        left, turned = self.open(), self.open()
        turned.apply(replace(turned.knobs, rate=self.RATE / 10))
        first, second = left.advance(4), turned.advance(4)
        assert first.losses[0] == second.losses[0]
        assert first.losses[1] != second.losses[1]
        assert second.rate == self.RATE / 10
        assert second.update < first.update

    def test_weights_come_back_to_the_bit_and_updates_do_not(self):
        job = self.open()
        start, first = job.snapshot(), job.evaluate("validation")
        job.restore(start)  # before any update
        job.advance(4)
        kept, score = job.snapshot(), job.evaluate("validation")
        assert score != first
        job.advance(4)
        assert job.evaluate("validation") != score
        job.apply(replace(job.knobs, rate=self.RATE / 2))
        job.restore(kept)
        assert job.evaluate("validation") == score
        assert (job.step, job.knobs.rate) == (8, self.RATE / 2)
        assert job.advance(4).finite
        job.restore(start)
        assert job.evaluate("validation") == first

    def test_a_divergence_is_reported_and_never_raised(self):
        job = self.open()
        good = job.snapshot()
        bad = [torch.full_like(part, math.nan) for part in good]
        job.advance(4)
        job.restore(bad)
        report = job.advance(4)
        assert not report.finite
        assert (job.step, len(report.losses)) == (8, 4)
        assert math.isnan(report.losses[-1])
        assert math.isnan(job.evaluate("validation").loss)

    def test_a_job_may_be_dropped_at_any_moment(self):
        for updates in (0, 4, STEPS):
            job = self.open()
            if updates:
                job.advance(updates)
            del job
            gc.collect()
        assert self.open().advance(STEPS).finite
