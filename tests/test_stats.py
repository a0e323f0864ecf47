import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import trim_mean

from baselines import stats
from envs.errors import BadInput

scores = st.floats(-1e3, 1e3, allow_nan=False).map(lambda x: round(x, 6))
pools = st.integers(1, 12).flatmap(lambda n: arrays(float, n, elements=scores))


def by_enumeration(selection, test):
    """Every subset, and within it an equal share to each trial tied for the best selection."""
    curve = []
    for size in range(1, len(test) + 1):
        outcomes = []
        for subset in itertools.combinations(range(len(test)), size):
            top = max(selection[i] for i in subset)
            outcomes.append(np.mean([test[i] for i in subset if selection[i] == top]))
        curve.append(np.mean(outcomes))
    return np.array(curve)


def test_iqm_by_hand_and_against_scipy():
    assert stats.iqm([[0.0, 1.0, 3.0], [1000.0]]) == 2.0
    assert stats.iqm([5.0]) == 5.0
    ragged = [np.arange(7.0), np.arange(3.0) ** 3]
    assert stats.iqm(ragged) == trim_mean(np.concatenate(ragged), 0.25)


def test_iqm_counts_a_failed_run_as_the_worst():
    assert stats.iqm([[math.nan, 1.0, 3.0, 9.0]]) == 2.0
    assert stats.iqm([[math.nan, math.nan, 3.0, 9.0]]) == -math.inf


def test_no_runs_is_an_error_in_words():
    for empty in ([], [[1.0], []]):
        with pytest.raises(BadInput, match="at least one"):
            stats.iqm(empty)


def test_bootstrap_covers_the_mean_of_a_normal():
    rng = np.random.default_rng(0)
    covered = 0
    for repeat in range(100):
        sample = [rng.normal(loc=job, size=15) for job in range(2)]
        interval = stats.bootstrap(
            lambda jobs: (jobs[0].mean() + jobs[1].mean()) / 2, sample, n=200, seed=repeat
        )
        covered += interval.low <= 0.5 <= interval.high
    assert 0.89 <= covered / 100 <= 0.99


def test_bootstrap_width_follows_the_standard_error():
    sample = np.random.default_rng(1).normal(size=400)
    interval = stats.bootstrap(lambda jobs: jobs[0].mean(), [sample], seed=3)
    expected = 2 * 1.96 * sample.std() / math.sqrt(400)
    assert interval.high - interval.low == pytest.approx(expected, rel=0.1)
    assert interval.point == sample.mean()
    assert interval == stats.bootstrap(lambda jobs: jobs[0].mean(), [sample], seed=3)
    half = stats.bootstrap(lambda jobs: jobs[0].mean(), [sample], seed=3, level=0.5)
    assert half.high - half.low < 0.5 * expected


def test_bootstrap_keeps_rows_together_and_jobs_apart():
    pairs = np.stack([np.arange(8.0), np.arange(8.0) + 1], axis=1)
    gap = stats.bootstrap(lambda jobs: np.mean(jobs[0][:, 1] - jobs[0][:, 0]), [pairs], n=50)
    assert (gap.low, gap.point, gap.high) == (1.0, 1.0, 1.0)
    strata = stats.bootstrap(lambda jobs: np.mean(jobs), [[0.0] * 4, [10.0] * 4], n=50)
    assert (strata.low, strata.high) == (5.0, 5.0)


@pytest.mark.parametrize("paired", [False, True])
def test_probability_of_improvement_of_known_samples(paired):
    same = [[1.0, 2.0, 3.0], [5.0, 5.0, 6.0]]
    assert stats.probability_of_improvement(same, same, paired=paired, n=50).point == 0.5
    above = [[4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]
    assert stats.probability_of_improvement(above, same, paired=paired, n=50) == stats.Interval(
        1.0, 1.0, 1.0
    )
    assert stats.probability_of_improvement(same, above, paired=paired, n=50).high == 0.0


def test_pairing_compares_equal_seeds_only():
    x, y = [[1.0, 2.0, 3.0]], [[0.0, 1.5, 3.0]]
    assert stats.probability_of_improvement(x, y, n=50).point == pytest.approx(5.5 / 9)
    assert stats.probability_of_improvement(x, y, paired=True, n=50).point == 2.5 / 3
    with pytest.raises(BadInput, match="differ"):
        stats.probability_of_improvement([[1.0, 2.0]], [[1.0]], paired=True)
    with pytest.raises(BadInput, match="differ"):
        stats.probability_of_improvement([[1.0]], [[1.0], [2.0]])


def test_jobs_weigh_the_same_whatever_their_seeds():
    x, y = [[1.0], [0.0] * 9], [[0.0], [1.0] * 9]
    assert stats.probability_of_improvement(x, y, n=50).point == 0.5


def test_a_failed_run_loses_to_any_other_and_ties_with_its_like():
    failed = [[math.nan]]
    assert stats.probability_of_improvement([[-1e9]], failed, n=5).point == 1.0
    assert stats.probability_of_improvement(failed, failed, n=5).point == 0.5


@pytest.mark.parametrize("trials", [1, 2, 40, 1000])
def test_expected_best_of_one_to_t_is_known_in_closed_form(trials):
    pool = np.random.default_rng(0).permutation(np.arange(1.0, trials + 1))
    n = np.arange(1, trials + 1)
    expected = n * (trials + 1) / (n + 1)
    np.testing.assert_allclose(stats.expected_best(pool, pool), expected, rtol=1e-11)


@pytest.mark.parametrize("levels", [2, 4, 100])
def test_expected_best_against_every_subset(levels):
    rng = np.random.default_rng(levels)
    for trials in range(1, 10):
        selection, test = rng.integers(levels, size=trials), rng.normal(size=trials)
        np.testing.assert_allclose(
            stats.expected_best(selection, test), by_enumeration(selection, test), atol=1e-12
        )


def test_expected_best_when_all_tie_is_the_mean():
    np.testing.assert_allclose(stats.expected_best([1.0] * 3, [0.0, 1.0, 5.0]), [2.0] * 3)


def test_failed_trials_are_the_worst_of_the_pool():
    nan = math.nan
    selection, test = [nan, 1.0, 2.0, 3.0], [9.0, 0.5, 0.7, nan]
    # No selection score: taken last. No test score: taken in its turn, for the worst score.
    expected = by_enumeration([0.0, 1.0, 2.0, 3.0], [0.5, 0.5, 0.7, 0.5])
    np.testing.assert_allclose(stats.expected_best(selection, test), expected)


@pytest.mark.parametrize(
    ("selection", "test", "n_max", "problem"),
    [
        ([1.0], [1.0, 2.0], None, "equal lists"),
        ([[1.0]], [[1.0]], None, "equal lists"),
        ([], [], None, "equal lists"),
        ([1.0], [1.0], 2, "use 1 to 1"),
        ([1.0], [1.0], 0, "use 1 to 1"),
    ],
)
def test_a_pool_that_cannot_be_used_is_an_error_in_words(selection, test, n_max, problem):
    with pytest.raises(BadInput, match=problem):
        stats.expected_best(selection, test, n_max)


@given(pools)
def test_expected_best_grows_where_selection_is_the_test(pool):
    curve = stats.expected_best(pool, pool)
    slack = 1e-9 * (1 + np.abs(pool).max())
    assert np.all(np.diff(curve) >= -slack)
    assert curve[0] == pytest.approx(pool.mean(), abs=slack)
    assert curve[-1] == pytest.approx(pool.max(), abs=slack)


@given(pools, st.randoms(use_true_random=False))
def test_expected_best_ignores_the_order_and_stays_in_bounds(test, random):
    selection = np.array([random.randrange(4) for _ in test], dtype=float)
    curve = stats.expected_best(selection, test)
    slack = 1e-9 * (1 + np.abs(test).max())
    assert np.all((curve >= test.min() - slack) & (curve <= test.max() + slack))
    order = random.sample(range(len(test)), len(test))
    np.testing.assert_allclose(
        stats.expected_best(selection[order], test[order]), curve, atol=slack
    )


@pytest.mark.parametrize("n", [1, 4, 20])
def test_trials_to_match_of_a_pool_whose_answer_is_known(n):
    """Of 1 .. T the best of N is worth N (T + 1) / (N + 1): exactly reached counts as reached."""
    pool = np.random.default_rng(0).permutation(np.arange(1.0, 41.0))
    worth = n * 41 / (n + 1)
    assert stats.trials_to_match([worth], pool, pool, resamples=50).interval.point == n
    assert stats.trials_to_match([worth + 1e-6], pool, pool, resamples=50).interval.point == n + 1
    around = [worth - 1, worth + 1]
    result = stats.trials_to_match(around, pool, pool, resamples=200)
    assert result.interval.low <= result.interval.point == n <= result.interval.high


def test_a_searcher_that_learns_is_matched_in_its_own_order():
    """Pooled, its first trial would be worth as much as the mean of all."""
    rising = [np.arange(1.0, 41.0), np.arange(1.0, 41.0) + 2]  # the mean of both after N is N + 1
    assert stats.trials_to_match([11.0], rising, rising, resamples=20).interval.point == 1
    ordered = stats.trials_to_match([11.0], rising, rising, ordered=True, resamples=400)
    assert ordered.interval.point == 10
    assert (ordered.interval.low, ordered.interval.high) == (9, 11)  # one study, or the other


def test_more_trials_than_were_tried_are_said_to_be_more():
    pool = np.arange(1.0, 41.0)
    beyond = stats.trials_to_match([99.0], pool, pool, n_max=30, resamples=20)
    assert beyond.interval == stats.Interval(math.inf, math.inf, math.inf)
    assert str(beyond) == "> 30 (> 30 to > 30)"
    near = stats.trials_to_match([38.0], pool, pool, n_max=20, resamples=400)
    assert str(near) == f"13 ({near.interval.low:g} to > 20)"
    with pytest.raises(BadInput, match="use 1 to 40"):
        stats.trials_to_match([1.0], pool, pool, n_max=41)


def test_the_interval_of_trials_to_match_covers_the_truth():
    """Uniform scores: the best of N is worth N / (N + 1) in expectation, whatever the pool."""
    rng = np.random.default_rng(5)
    covered = 0
    for repeat in range(40):
        pool = rng.random(64)
        steered = 8 / 9 - 1e-9 + rng.normal(scale=0.02, size=5)
        result = stats.trials_to_match(steered, pool, pool, resamples=100, seed=repeat)
        covered += result.interval.low <= 8 <= result.interval.high
    assert covered >= 33


def test_the_lower_end_is_not_above_the_truth_more_often_than_it_may():
    """Five studies of a job: trials drawn again within each would put it above in 32 of 200."""
    rng, above, worth = np.random.default_rng(6), 0, 16 / 17 - 1e-9
    for repeat in range(200):
        pools = rng.random((5, 32))
        steered = worth + rng.normal(scale=0.02, size=5)
        found = stats.trials_to_match(steered, pools, pools, resamples=100, seed=repeat)
        above += found.interval.low > 16
    assert above <= 14  # 2.5 % are 5, and five studies are few


def test_studies_are_averaged_and_not_pooled():
    """Two seeds of a job differ in level: each study is searched by itself."""
    low, high = np.arange(1.0, 11.0), np.arange(101.0, 111.0)
    worth = 3 * 11 / 4
    studies = stats.trials_to_match([worth, worth + 100], [low, high], [low, high], resamples=20)
    assert studies.interval.point == 3
    assert studies.n_max == 10
    uneven = stats.trials_to_match([0.0], [low, low[:4]], [low, low[:4]], resamples=20)
    assert uneven.n_max == 4


def test_failed_steered_runs_drag_the_answer_down():
    pool = np.arange(1.0, 41.0)
    sound = stats.trials_to_match([38.0, 38.0], pool, pool, resamples=20)
    failed = stats.trials_to_match([38.0, math.nan], pool, pool, resamples=20)
    assert failed.interval.point == 1 < sound.interval.point  # (38 + 1) / 2 is below the mean.
    assert stats.trials_to_match([math.nan], pool, pool, resamples=20).interval.point == 1
    with pytest.raises(BadInput, match="no runs"):
        stats.trials_to_match([], pool, pool)


def test_a_study_that_failed_whole_is_the_worst_there_is():
    nan = math.nan
    assert np.isnan(stats.expected_best([1.0, nan], [nan, nan])).all()
    assert np.isnan(stats.running_best([1.0, nan], [nan, nan])).all()
    sound, failed = [1.0, 2.0, 3.0], [nan] * 3
    result = stats.trials_to_match([1.9], [sound, failed], [sound, failed], resamples=20)
    assert result.interval.point == 3  # (2 + 1) / 2, (8/3 + 1) / 2, then (3 + 1) / 2
    with pytest.raises(BadInput, match="every run of both sides failed"):
        stats.trials_to_match([nan], failed, failed)


def of(point, draws, n_max=40):
    return stats.TrialsToMatch(stats.Interval(point, point, point), n_max, np.array(draws))


def test_median_over_jobs():
    jobs = [of(4.0, [4.0] * 100), of(12.0, [12.0] * 100), of(math.inf, [math.inf] * 100, 30)]
    assert str(stats.median_trials_to_match(jobs)) == "12 (12 to 12)"
    assert stats.median_trials_to_match(jobs[::2]).interval.point == 4.0  # the lower middle one
    assert str(stats.median_trials_to_match(jobs[2:])) == "> 30 (> 30 to > 30)"
    beyond = [jobs[2], of(35.0, [20.0] * 4 + [35.0] * 96)]  # 35 of 40, beside more than 30 of 30
    assert str(stats.median_trials_to_match(beyond)) == "> 30 (20 to > 30)"


def test_jobs_resampled_with_one_seed_do_not_move_together():
    """The median of three equal jobs varies less than each, unless their draws are in step."""
    draws = np.arange(1000.0)
    alone = stats.median_trials_to_match([of(500.0, draws, 1000)]).interval
    three = stats.median_trials_to_match([of(500.0, draws, 1000)] * 3).interval
    assert three.high - three.low < 0.9 * (alone.high - alone.low)


def test_running_best_follows_selection_and_reports_test():
    selection, test = [0.5, 0.4, 0.7, 0.7, math.nan, 0.9], [1.0, 9.0, 3.0, 8.0, 7.0, 2.0]
    assert stats.running_best(selection, test).tolist() == [1.0, 1.0, 3.0, 3.0, 3.0, 2.0]
    assert stats.running_best([math.nan, 0.1, 0.2], [5.0, 4.0, 1.0]).tolist() == [1.0, 4.0, 1.0]


@settings(max_examples=50)
@given(pools)
def test_the_mean_running_best_over_orders_is_the_expected_best(pool):
    pool = pool[:5]
    orders = [
        stats.running_best(*[pool[list(o)]] * 2) for o in itertools.permutations(range(len(pool)))
    ]
    np.testing.assert_allclose(
        np.mean(orders, axis=0), stats.expected_best(pool, pool), atol=1e-8, rtol=1e-9
    )


def test_normalised():
    assert stats.normalised([0.5, 0.7, 0.9], 0.5, 0.9).tolist() == pytest.approx([0.0, 0.5, 1.0])
    assert stats.normalised([[1.0], [3.0]], [[0.0], [2.0]], [[2.0], [4.0]]).tolist() == [
        [0.5],
        [0.5],
    ]
    for oracle in (0.5, 0.4, math.nan):
        with pytest.raises(BadInput, match="nothing to gain"):
            stats.normalised(0.6, 0.5, oracle)


def test_performance_profile_averages_jobs_and_counts_failures():
    profile = stats.performance_profile(
        [[0.0, 1.0], [1.0, math.nan, 2.0, 3.0]], [-9.0, 0.0, 1.0, 3.0]
    )
    assert profile.tolist() == [(1 + 0.75) / 2, (0.5 + 0.75) / 2, (0 + 0.5) / 2, 0.0]


def test_harm_needs_either_bound_only():
    reference = [[1.0, 1.02, 0.98, 1.0]]  # sd 0.0163: two of them are 3.3 %.
    steered = [[0.985, 1.02, 0.98, 1.5]]  # 1.5 % worse, equal, equal, better
    assert stats.harm_rate(steered, reference) == 0.25
    assert stats.harm_rate(steered, reference, relative=0.02) == 0.0
    assert stats.harm_rate(steered, reference, both=True) == 0.0
    assert stats.harm_rate([[0.96, 1.02, 0.98, 1.5]], reference, both=True) == 0.25
    tight = [[100.0, 100.1, 99.9, 100.0]]  # sd 0.08: two of them are 0.16 %.
    assert stats.harm_rate([[99.5, 100.1, 99.9, 100.0]], tight) == 0.25
    assert stats.harm_rate([[99.5, 100.1, 99.9, 100.0]], tight, deviations=9.0) == 0.0


def test_harm_of_negative_scores_single_seeds_and_failures():
    assert stats.harm_rate([[-2.1]], [[-2.0]]) == 1.0
    assert stats.harm_rate([[-2.01]], [[-2.0]]) == 0.0
    nan = math.nan
    assert stats.harm_rate([[nan, nan, 1.0, 1.0]], [[1.0, nan, nan, 1.0]]) == 0.25
    assert stats.harm_rate([[0.5], [1.0, 1.0, 1.0]], [[1.0], [1.0, 1.0, 1.0]]) == 0.25
