"""Statistics of a comparison: how much better, and how sure.

Scores are higher when better; a list of arrays holds the runs of one job each. A failed run scores
NaN, counts as the worst and is never left out. Sources: Agarwal et al. 2021, "Deep RL at the edge
of the statistical precipice" (arXiv 2108.13264); Tang et al. 2020 (arXiv 2004.13705).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from envs.errors import BadInput

Array = npt.NDArray[np.float64]
Jobs = Sequence[npt.ArrayLike] | npt.NDArray[Any]
Pool = tuple[npt.NDArray[np.intp], Array]
Statistic = Callable[[list[Array]], float]


@dataclass(frozen=True)
class Interval:
    """A point estimate and its confidence interval, 95 % unless told."""

    low: float
    point: float
    high: float


@dataclass(frozen=True)
class TrialsToMatch:
    """Trials one steered run is worth, inf being "> n_max"; as text ``12 (8 to > 40)``."""

    interval: Interval
    n_max: int
    draws: Array = field(repr=False, compare=False)  # (resamples,), for the median over jobs

    def __str__(self) -> str:
        numbers = (self.interval.point, self.interval.low, self.interval.high)
        texts = [f"{n:g}" if math.isfinite(n) else f"> {self.n_max}" for n in numbers]
        return "{} ({} to {})".format(*texts)


def iqm(scores: Jobs) -> float:
    """Interquartile mean ``mean(sort(x)[k : n - k]), k = floor(n / 4)`` over all runs pooled.

    The 25 % trimmed mean of Agarwal 2021, section 4.3; -inf when more than a quarter failed.
    """
    pooled = np.sort(np.concatenate([job.ravel() for job in _jobs(scores)]))
    cut = pooled.size // 4
    return float(pooled[cut : pooled.size - cut].mean())


def bootstrap(
    statistic: Statistic, samples: Jobs, *, n: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Stratified percentile bootstrap: seeds drawn again within each job (Agarwal 2021, 4.1).

    ``samples``: one array per job, (seeds,) or (seeds, ...); a row stays whole, so what
    belongs to one seed stays paired. With five seeds in all it is narrower than its level says.
    """
    jobs = [np.asarray(job, dtype=float) for job in samples]
    rng = np.random.default_rng(seed)
    draws = np.empty(n)
    for i in range(n):
        draws[i] = statistic([job[rng.integers(len(job), size=len(job))] for job in jobs])
    return _interval(draws, statistic(jobs), level)


def probability_of_improvement(
    x: Jobs, y: Jobs, *, paired: bool = False, n: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """``mean over jobs of P(X > Y) + P(X = Y) / 2`` (Agarwal 2021, section 4.3).

    Unpaired, P is over every pair of a run of X and a run of Y (Mann-Whitney): any two runs.
    ``paired``: P is over seeds, row s of both being the same seed: the same run, steered or not.
    A job is (seeds,), or (seeds, rates) of runs that are drawn together.
    """
    ours, theirs = _matched(x, y, by_seed=paired)

    def win_rate(jobs: list[Array]) -> float:
        if paired:
            pairs = [(job[:, 0], job[:, 1]) for job in jobs]
        else:
            pairs = [(a[:, None], b) for a, b in zip(jobs[: len(x)], jobs[len(x) :], strict=True)]
        return float(np.mean([np.mean((a > b) + 0.5 * (a == b)) for a, b in pairs]))

    stacked = [np.stack(pair, axis=1) for pair in zip(ours, theirs, strict=True) if paired]
    return bootstrap(win_rate, stacked or ours + theirs, n=n, seed=seed, level=level)


def expected_best(selection: npt.ArrayLike, test: npt.ArrayLike, n_max: int | None = None) -> Array:
    """Expected test score of the selection-best of N = 1 .. ``n_max`` trials: (n_max,).

    ``sum_i test_(i) C(i - 1, N - 1) / C(T, N)``, i ascending by selection score: the mean over
    all sets of N of the T trials (Tang 2020), unbiased where trials are exchangeable, as in
    random search. Equal selection scores are equally likely to be taken, none at all is taken
    last; a trial without either score has the worst test score of the pool. NaN if all failed.
    """
    pool = _pool(selection, test)
    return _curve(pool, pool[0].size if n_max is None else n_max)


def trials_to_match(
    steered: npt.ArrayLike,
    selection: Jobs,
    test: Jobs,
    *,
    n_max: int | None = None,
    ordered: bool = False,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> TrialsToMatch:
    """The smallest N whose `expected_best` reaches the mean steered test score.

    ordered: in place of that, the mean over studies of `running_best`, trials in the order in
    which they came: without bias for a searcher that learns, for which the pooled estimate gives
    the first trials the quality of the last.

    ``steered``: (seeds,) or (seeds, rates); ``selection``, ``test``: one pool of trials, or a
    list with one pool per study, whose curves are averaged. ``n_max``: by default and at most the
    smallest pool. A failed run of either side has the worst finite score of both. The bootstrap
    draws seeds and whole studies again (Davison & Hinkley 1997, section 3.8), with two or three of
    them too narrow; of a single study trials, and the curve is put back to where it was: a pool
    drawn again lacks a third of its trials, the best one as any other.
    """
    one: list[tuple[Any, Any]] = [(selection, test)]
    studies = list(zip(selection, test, strict=True)) if len(test) and np.ndim(test[0]) else one
    ours = _jobs([steered])[0]
    known = np.concatenate([ours.ravel(), *(_pool(*study)[1] for study in studies)])
    known = known[np.isfinite(known)]
    if known.size == 0:
        raise BadInput("scores: every run of both sides failed; nothing can be compared")
    pools = [_pool(*study, known.min()) for study in studies]
    ours = np.where(np.isfinite(ours), ours, known.min())
    top = min(rank.size for rank, _ in pools) if n_max is None else n_max
    slack = 1e-12 * np.abs(known).max()  # Equal scores match, however their sums round.

    def match(target: float, curve: Array) -> float:
        reached = np.flatnonzero(curve >= target - slack)
        return float(reached[0] + 1) if reached.size else math.inf

    rng = np.random.default_rng(seed)
    curves = np.array([(_came if ordered else _curve)(pool, top) for pool in pools])
    targets = ours[rng.integers(len(ours), size=(resamples, len(ours)))]
    targets = targets.reshape(resamples, -1).mean(axis=1)
    if ordered or len(pools) > 1:
        drawn = curves[rng.integers(len(pools), size=(resamples, len(pools)))].mean(axis=1)
    else:
        rank, scores = pools[0]
        again = rng.integers(rank.size, size=(resamples, rank.size))
        drawn = np.array([_curve((rank[k], scores[k]), top) for k in again])
        drawn += curves[0] - drawn.mean(axis=0)
    draws = np.array([match(*pair) for pair in zip(targets, drawn, strict=True)])
    point = match(float(ours.mean()), curves.mean(axis=0))
    return TrialsToMatch(_interval(draws, point, level), top, draws)


def median_trials_to_match(jobs: Sequence[TrialsToMatch], *, seed: int = 0) -> TrialsToMatch:
    """Median over these jobs, with the uncertainty within each: 95 %.

    Of an even number of jobs the lower middle one: halfway to "> n_max" has no value. Where more
    were tried in some jobs than in others, all count up to the fewest: what a job needs beyond
    what it tried cannot be set beside another's number.
    """
    rng = np.random.default_rng(seed)  # Shuffles: jobs resampled from one seed move together.
    n_max = min(job.n_max for job in jobs)
    table = np.stack([rng.permutation(job.draws) for job in jobs])
    points = np.array([job.interval.point for job in jobs])
    draws, point = (
        np.quantile(np.where(known > n_max, math.inf, known), 0.5, axis=0, method="lower")
        for known in (table, points)
    )
    return TrialsToMatch(_interval(draws, float(point), 0.95), n_max, draws)


def running_best(selection: npt.ArrayLike, test: npt.ArrayLike) -> Array:
    """Test score of the selection-best of the first 1 .. T trials as they came: (T,).

    For searchers whose trials are not exchangeable (TPE, CMA-ES). The first of equals stays.
    """
    pool = _pool(selection, test)
    return _came(pool, pool[0].size)


def _came(pool: Pool, n_max: int) -> Array:
    rank, scores = pool
    better = np.diff(np.maximum.accumulate(rank), prepend=-1) > 0
    return scores[np.maximum.accumulate(np.where(better, np.arange(rank.size), 0))][:n_max]


def normalised(x: npt.ArrayLike, default: npt.ArrayLike, oracle: npt.ArrayLike) -> Array:
    """``(x - default) / (oracle - default)``: 0 is the user's default, 1 the offline oracle."""
    gain = np.subtract(oracle, default, dtype=float)
    if not np.all(gain > 0):
        raise BadInput("oracle: not above the default; leave out a job with nothing to gain")
    return np.asarray(np.subtract(x, default, dtype=float) / gain)


def performance_profile(scores: Jobs, thresholds: npt.ArrayLike) -> Array:
    """``F(tau) = mean over jobs of the share of runs with x > tau`` (Agarwal 2021, 4.2)."""
    tau = np.asarray(thresholds, dtype=float)
    shares = [(job.reshape(-1, 1) > tau).mean(axis=0) for job in _jobs(scores)]
    return np.asarray(np.mean(shares, axis=0))


def harm_rate(
    steered: Jobs,
    reference: Jobs,
    *,
    relative: float = 0.01,
    deviations: float = 2.0,
    both: bool = False,
) -> float:
    """Share of all runs that end worse than the reference run of the same seed.

    Worse: ``reference - steered > min(relative * |reference|, deviations * sd)``, sd over the
    seeds of the job's reference (n - 1; unused below two). Either bound is enough: that reading
    counts more harm, much of it chance; with ``both``, both must be passed. A failed run harms
    unless its reference failed as well.
    """
    harmed = []
    for got, base in zip(*_matched(steered, reference, by_seed=True), strict=True):
        sound = np.isfinite(base)
        some = sound.sum() > 1
        spread = deviations * base[sound].std(ddof=1) if some else 0.0 if both else math.inf
        level = np.where(sound, base, 0.0)
        bound = (np.maximum if both else np.minimum)(relative * np.abs(level), spread)
        harmed.append(sound & (got < level - bound))
    return float(np.concatenate(harmed).mean())


def share(count: int, of: int, *, level: float = 0.95) -> Interval:
    """A share with its exact binomial interval (Clopper & Pearson 1934): 0 of n is not surely 0."""
    from scipy.stats import binomtest

    exact = binomtest(count, of).proportion_ci(level, method="exact")
    return Interval(float(exact.low), count / of, float(exact.high))


def mean_ranks(scores: npt.ArrayLike) -> Array:
    """(blocks, methods) -> mean rank of each method over the blocks, 1 the best; ties share."""
    from scipy.stats import rankdata

    return np.asarray(rankdata(-_sound(scores), axis=1).mean(axis=0))


def wilcoxon_holm(scores: npt.ArrayLike) -> Array:
    """(blocks, methods) -> p of every pair of methods being equal, symmetric, 1 on the diagonal.

    Wilcoxon's signed-rank test over the blocks, zeros split (Demsar 2006), adjusted for the
    number of pairs after Holm 1979. Failed runs score 0. Blocks count as independent.
    """
    from scipy.stats import wilcoxon

    sound = _sound(scores)
    count = sound.shape[1]
    first, second = np.triu_indices(count, 1)
    gaps = (sound[:, first] - sound[:, second]).T
    raw = np.array([wilcoxon(gap, zero_method="zsplit", method="approx").pvalue if gap.any()
                    else 1.0 for gap in gaps])  # fmt: skip
    order = np.argsort(raw)
    steps = np.maximum.accumulate(raw[order] * (raw.size - np.arange(raw.size)))
    found = np.ones((count, count))
    found[first[order], second[order]] = found[second[order], first[order]] = np.minimum(steps, 1)
    return found


def least_p(blocks: int, methods: int) -> float:
    """The smallest p that `wilcoxon_holm` could give: of a method that is ahead in every block."""
    perfect = np.arange(1.0, blocks + 1)[:, None] * np.array([1.0, 0.0])
    return float(wilcoxon_holm(perfect)[0, 1]) * methods * (methods - 1) / 2


def cliques(ranks: npt.ArrayLike, p: npt.ArrayLike, *, alpha: float = 0.05) -> list[list[int]]:
    """Largest groups of methods, neighbours by rank, of which no two differ; of two at least."""
    order, apart = np.argsort(ranks, kind="stable"), np.asarray(p) < alpha
    found: list[list[int]] = []
    for start in range(len(order)):
        stop = start + 1
        while stop < len(order) and not apart[order[stop], order[start:stop]].any():
            stop += 1
        group = order[start:stop].tolist()
        if stop - start > 1 and not (found and group[-1] in found[-1]):
            found.append(group)
    return found


def _sound(scores: npt.ArrayLike) -> Array:
    return np.nan_to_num(np.asarray(scores, dtype=float), nan=0.0, neginf=0.0)


def _interval(draws: Array, point: float, level: float) -> Interval:
    """Order statistics, rounded outwards and never interpolated, so that inf stays inf."""
    low = np.quantile(draws, (1 - level) / 2, method="lower")
    high = np.quantile(draws, (1 + level) / 2, method="higher")
    return Interval(float(low), float(point), float(high))


def _jobs(scores: Jobs) -> list[Array]:
    """One array of runs per job, NaN as -inf: numpy would sort NaN above every score."""
    jobs = [np.asarray(job, dtype=float) for job in scores]
    if not jobs or any(job.size == 0 for job in jobs):
        raise BadInput("scores: no runs, or none for one job; give at least one for each")
    return [np.where(np.isnan(job), -np.inf, job) for job in jobs]


def _matched(x: Jobs, y: Jobs, *, by_seed: bool) -> tuple[list[Array], list[Array]]:
    ours, theirs = _jobs(x), _jobs(y)
    pairs = zip(ours, theirs, strict=False)
    if len(ours) != len(theirs) or (by_seed and any(a.shape != b.shape for a, b in pairs)):
        raise BadInput("scores: jobs or seeds differ between the methods; compare the same ones")
    return ours, theirs


def _pool(selection: npt.ArrayLike, test: npt.ArrayLike, worst: float | None = None) -> Pool:
    """Rank by selection score (0 the worst, equal for equals) and test score, none missing."""
    chosen, scores = np.asarray(selection, dtype=float), np.asarray(test, dtype=float)
    if chosen.shape != scores.shape or chosen.ndim != 1 or chosen.size == 0:
        raise BadInput(f"trials: {chosen.shape} and {scores.shape} scores; give two equal lists")
    sound = np.isfinite(chosen) & np.isfinite(scores)
    worst = min(scores[sound], default=math.nan) if worst is None else worst
    _, rank = np.unique(np.where(np.isfinite(chosen), chosen, -np.inf), return_inverse=True)
    return rank, np.where(sound, scores, worst)


def _curve(pool: Pool, n_max: int) -> Array:
    rank, scores = pool
    counts = np.bincount(rank)  # Resampled pools lack some ranks.
    means = np.bincount(rank, scores)[counts > 0] / counts[counts > 0]
    return np.asarray(_odds(rank.size, n_max) @ np.repeat(means, counts[counts > 0]))


@lru_cache(maxsize=8)
def _odds(trials: int, n_max: int) -> Array:
    """(n_max, trials): chance ``C(i - 1, N - 1) / C(T, N)`` that the i-th worst is best of N.

    By its ratio from N to N + 1, ``(i - N) (N + 1) / (N (T - N))``: binomials would overflow.
    """
    if not 1 <= n_max <= trials:
        raise BadInput(f"n_max: {n_max} for {trials} trials; use 1 to {trials}")
    n, i = np.arange(1, n_max)[:, None], np.arange(1, trials + 1)
    ratios = np.maximum(i - n, 0) * (n + 1) / (n * (trials - n))
    return np.cumprod(np.vstack([np.full(trials, 1 / trials), ratios]), axis=0)
