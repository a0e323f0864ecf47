"""The recorded runs, and what the shipped constants say of those that were held back."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "scripts"))

import fit_surrogate  # noqa: E402
import record_runs  # noqa: E402

from envs import curves  # noqa: E402
from envs.progress import Progress  # noqa: E402


@pytest.fixture(scope="module")
def record():
    return fit_surrogate.gather(fit_surrogate.read(fit_surrogate.RUNS))


def test_the_fit_is_as_good_as_it_is_said_to_be(record):
    """Rank correlation over settings that the fit did not see, against the bar of 0.8."""
    said = json.loads(fit_surrogate.FIGURES_FILE.read_text())
    constants = curves.constants_of(curves.load())
    held = fit_surrogate.split(record, held=True)
    found = fit_surrogate.agreement(constants, held)
    assert found["spearman"] == pytest.approx(said["held_back"]["spearman"], abs=0.005)
    assert found["spearman"] > 0.8
    assert min(found["tasks"].values()) > 0.7
    assert found["settings"] == 600
    seen = fit_surrogate.split(record, held=False)
    assert not set(held.number) & set(seen.number)
    assert len(seen.number) == 1800
    assert fit_surrogate.ceiling(record)["settings"] == 150


def test_the_first_guess_fits_worse(record):
    held = fit_surrogate.split(record, held=True)
    guess = fit_surrogate.agreement(fit_surrogate.FIRST, held)
    fitted = fit_surrogate.agreement(curves.constants_of(curves.load()), held)
    assert fitted["mean_absolute_error"] < 0.7 * guess["mean_absolute_error"]


def test_a_run_that_follows_the_curves_leaves_nothing_over(record):
    """Losses made by the simulation itself: residuals are nought, the agreement is perfect."""
    constants = curves.constants_of(curves.load())
    some = fit_surrogate.split(record, held=True)
    train, validation = fit_surrogate.simulate(constants, some)
    ran = np.vstack([np.ones(len(some.number), bool), ~np.isnan(some.train)])
    own = some._replace(train=train, validation=np.where(ran, validation, np.nan))
    assert max(abs(part).max() for part in fit_surrogate.residuals(constants, own)) < 1e-9
    own = own._replace(validation=validation)
    assert fit_surrogate.agreement(constants, own)["spearman"] == 1.0


def test_a_rollback_brings_the_best_weights_back(record):
    constants = curves.constants_of(curves.load())
    one = fit_surrogate.split(record, held=True)
    rate = np.full_like(one.rate, 0.3)
    rate[5:7] = 30.0  # ruin
    back = np.zeros_like(one.rollback)
    back[7] = True
    plain, saved = (
        fit_surrogate.simulate(constants, one._replace(rate=rate, rollback=rollback))[1]
        for rollback in (np.zeros_like(back), back)
    )
    np.testing.assert_array_equal(plain[:8], saved[:8])
    assert (saved[8] < plain[8]).mean() > 0.9


def test_deviations_are_recovered():
    rng = np.random.default_rng(0)
    line = np.column_stack([np.ones(20_000), rng.uniform(-1, 1, 20_000)])
    rest = np.exp(line @ [-1.0, 0.5]) * rng.standard_normal(20_000)
    assert fit_surrogate.deviation_line(line, rest) == pytest.approx([-1.0, 0.5], abs=0.05)


def test_a_report_in_short_and_a_torn_line(tmp_path):
    short = record_runs.report(Progress(10, 1.23456e-3, 0.5, (1.23456, 2.0), 0.98765))
    assert short["losses"] == [1.235, 2.0]
    assert short["validation"] == 0.9877
    assert short["rate"] == 0.001235
    path = tmp_path / "runs.jsonl"
    path.write_text('{"number":3}\n{"number":4,"repo')
    assert list(record_runs.finished(path)) == [3]
