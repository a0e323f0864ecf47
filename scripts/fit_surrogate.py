"""Fit the surrogate's learning curves to recorded runs, and say how well they fit.

    python scripts/fit_surrogate.py [--runs benchmarks/results/surrogate_runs.jsonl.gz]

Three quarters of the recorded settings are fitted by robust least squares (`envs.curves` has the
model; validation losses as signed roots, as the reward sees them, and logs of training losses). The
rest is held back: there the settings alone predict a final quality, and its rank correlation
with the recorded one, over settings, is the figure of merit. Then what the curves leave over is
measured: how runs alike differ, the noise of the losses, and the probe's figures by linear
regression. Writes ``envs/surrogate.json`` and ``benchmarks/results/surrogate_fit.json``.
"""

import argparse
import gzip
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import spearmanr

from envs import curves
from envs.curves import Constants, Settings, Weights
from envs.knobs import OPTIMIZERS, Knobs, factor, reference_rate
from envs.observe import slope
from envs.readings import FIGURES, HOT
from envs.reward import CEILING

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "benchmarks" / "results" / "surrogate_runs.jsonl.gz"
FIGURES_FILE = RUNS.parent / "surrogate_fit.json"
TASKS = ("trec6", "trec50", "sms", "movie", "amazon", "tweets")
DECISIONS = 10
AGAIN = 100_000  # as in record_runs.py
FINAL_WEIGHT, TRAIN_WEIGHT = 3.0, 0.3
LEAST_FACTOR = 0.02  # of the schedule's shape: below, an update is rounding
PRIOR_WEIGHT = 0.05  # pull of each constant towards its first guess
EM_ROUNDS, EM_DRAWS, EM_TOLERANCE = 8, 150, 0.05  # tolerance: a squared residual of a run

FIRST = Constants(
    np.tile([0.0, np.log(0.1), np.log(0.02), np.log(0.15)], (len(TASKS), 1)),
    np.array(
        [  # scale, noise, crack, shock, power, calm
            [0.0, np.log(0.3), np.log(10.0), np.log(20.0), 0.0, np.log(0.1)],
            [1.0, np.log(0.3), np.log(10.0), np.log(20.0), 0.5, np.log(0.05)],
            [0.0, np.log(0.3), np.log(10.0), np.log(20.0), 0.0, np.log(0.1)],
        ]
    ),
    np.array([0.0, 1.0, np.log(0.3), 0.5, 1.0, 0.5, 0.0, 0.0, 0.0, 1.0, 1.0, np.log(2.0)]),
)


class Record(NamedTuple):
    """Recorded runs as arrays; intervals that were not run are NaN."""

    number: Any  # (n,)
    given: Settings
    optimizer: Any  # (n,)
    updates: Any  # (n,) of an interval
    rate: Any  # (T, n) mean rate of an interval over the reference rate
    rollback: Any  # (T, n)
    train: Any  # (T, n)
    validation: Any  # (T + 1, n)


def read(path: Path) -> list[dict[str, Any]]:
    """The recorded runs."""
    text = path.read_bytes()
    lines = (gzip.decompress(text) if path.suffix == ".gz" else text).splitlines()
    return [json.loads(line) for line in lines]


def gather(runs: list[dict[str, Any]]) -> Record:
    """Recorded runs -> arrays."""
    count = len(runs)
    rate, train = (np.full((DECISIONS, count), np.nan) for _ in range(2))
    rollback = np.zeros((DECISIONS, count), dtype=bool)
    validation = np.full((DECISIONS + 1, count), np.nan)
    for i, run in enumerate(runs):
        ruler = reference_rate(run["parameters"], run["optimizer"], "full")
        for t, report in enumerate(run["reports"]):
            validation[t, i] = report["validation"]
            if t:
                rate[t - 1, i] = report["rate"] / ruler * mean_factor(run, t - 1)
                rollback[t - 1, i] = bool(report["rollback"])
                losses = np.array(report["losses"])
                train[t - 1, i] = losses.mean() if np.isfinite(losses).all() else np.nan
    column = {name: np.array([float(run[name]) for run in runs])
              for name in ("classes", "prior", "rows", "batch", "noise", "interval")}  # fmt: skip
    return Record(
        np.array([run["number"] for run in runs]),
        Settings(
            np.array([TASKS.index(run["task"]) for run in runs]), column["classes"],
            column["prior"], column["rows"], column["batch"], column["noise"],
        ),
        np.array([OPTIMIZERS.index(run["optimizer"]) for run in runs]),
        column["interval"], rate, rollback, train, validation,
    )  # fmt: skip


def mean_factor(run: dict[str, Any], t: int) -> float:
    """Mean of the schedule's shape over interval t."""
    knobs, length = Knobs(shape=run["shape"]), run["interval"]
    steps = range(t * length, (t + 1) * length)
    return float(np.mean([factor(knobs, step, run["steps"]) for step in steps]))


def simulate(constants: Constants, record: Record, jitter: Any = None) -> tuple[Any, Any]:
    """Expected losses of the recorded settings: training (T, n), validation (T + 1, n)."""
    if jitter is None:
        jitter = np.zeros((len(curves.JITTER), len(record.number)))
    laws = curves.law(constants, record.given, jitter)
    now = best = curves.fresh(laws)
    optimizer = constants.optimizer[record.optimizer].T
    before = np.zeros(len(record.number))
    train, last = curves.losses(now, laws)
    trains, validations, lowest = [], [last], last
    for t in range(DECISIONS):
        now = choose(record.rollback[t], best, now)
        rate = np.where(np.isnan(record.rate[t]), 1.0, record.rate[t])
        begun = curves.losses(now, laws)[0]
        now = curves.interval(now, laws, rate, before, record.updates, optimizer)
        before = rate
        train, last = curves.losses(now, laws)
        better = last < lowest
        best, lowest = choose(better, now, best), np.where(better, last, lowest)
        trains.append(np.sqrt(begun * train))
        validations.append(last)
    return np.array(trains), np.array(validations)


def choose(which: Any, one: Weights, other: Weights) -> Weights:
    """Weights of the one where asked, else of the other."""
    return Weights(*(np.where(which, a, b) for a, b in zip(one, other, strict=True)))


def root(loss: Any, start: Any) -> Any:
    """The signed square root of log(start / loss), without the reward's bound."""
    fall = np.log(start) - np.log(np.maximum(loss, 1e-4))
    return np.copysign(np.sqrt(np.abs(fall) + 1e-4) - 1e-2, fall)


def quality(validation: Any, start: Any) -> Any:
    """Final potential of (T + 1, n) losses; a run that diverged on its way is at the bound."""
    ran = ~np.isnan(validation)
    last = validation[ran.sum(0) - 1, np.arange(validation.shape[1])]
    lost = (np.where(ran, validation, 0.0) > np.e * start).any(0)
    return np.where(lost, -CEILING, np.maximum(root(last, start), -CEILING))


def residuals(constants: Constants, record: Record, jitter: Any = None) -> Any:
    """What is to be small: (T, n) of validation and (T, n) of training."""
    train, validation = simulate(constants, record, jitter)
    start = record.validation[0]
    wide = 1.8  # how far beyond a divergence still counts
    real = np.clip(root(record.validation[1:], start), -wide, None)
    seen = np.clip(root(validation[1:], start), -wide, None)
    weight = np.ones_like(real)
    ran = (~np.isnan(real)).sum(0)
    weight[ran - 1, np.arange(len(ran))] = FINAL_WEIGHT
    off = np.where(np.isnan(real), 0.0, weight * (seen - real))
    cap = np.log(np.e * 3 * start)
    logs = np.clip(np.log(np.maximum(record.train, 3e-3)), None, cap)
    guess = np.clip(np.log(np.maximum(train, 3e-3)), None, cap)
    return off, np.where(np.isnan(logs), 0.0, TRAIN_WEIGHT * (guess - logs))


def fit(record: Record, rounds: int) -> Constants:
    """Robust least squares from `FIRST`, with a weak pull towards it."""
    first = np.concatenate([part.ravel() for part in FIRST])

    def cost(flat: Any) -> Any:
        parts = residuals(unpack(flat), record)
        pull = PRIOR_WEIGHT * np.sqrt(len(record.number)) * (flat - first)
        return np.concatenate([part.ravel() for part in parts] + [pull])

    found = least_squares(cost, first, loss="soft_l1", f_scale=0.3, max_nfev=rounds, verbose=1)
    return unpack(found.x)


def unpack(flat: Any) -> Constants:
    """A flat vector -> constants."""
    shapes = [part.shape for part in FIRST]
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
    return Constants(*(p.reshape(s) for p, s in zip(np.split(flat, ends), shapes, strict=True)))


def split(record: Record, held: bool) -> Record:
    """The runs that are held back, or the others: whole settings, a quarter of each task's."""
    mask = (((record.number // len(TASKS)) % 4 == 0) == held) & (record.number < AGAIN)
    return Record(
        record.number[mask], Settings(*(part[mask] for part in record.given)),
        *(part[..., mask] for part in record[2:]),
    )  # fmt: skip


def agreement(constants: Constants, record: Record) -> dict[str, Any]:
    """Rank correlation over settings between simulated and recorded final quality."""
    start = record.validation[0]
    seen = quality(simulate(constants, record)[1], start)
    real = quality(record.validation, start)
    lost, called = real <= -CEILING, seen <= -CEILING

    def rank(mask: Any) -> float:
        return round(float(spearmanr(seen[mask], real[mask])[0]), 3)

    return {
        "settings": len(real),
        "spearman": rank(real < np.inf),
        "spearman_without_divergences": rank(~lost),
        "mean_absolute_error": round(float(np.abs(seen - real).mean()), 3),
        "tasks": {name: rank(record.given.task == i) for i, name in enumerate(TASKS)},
        "optimizers": {name: rank(record.optimizer == i) for i, name in enumerate(OPTIMIZERS)},
        "diverged": {"recorded": int(lost.sum()), "simulated": int(called.sum()),
                     "both": int((lost & called).sum())},
    }  # fmt: skip


def ceiling(record: Record) -> dict[str, Any]:
    """How far two runs of the same settings agree that differ in their seed only."""
    place = {number: i for i, number in enumerate(record.number.tolist())}
    pairs = [(place[n - AGAIN], place[n]) for n in place if n >= AGAIN and n - AGAIN in place]
    real = quality(record.validation, record.validation[0])
    one, other = (real[[pair[k] for pair in pairs]] for k in (0, 1))
    return {
        "settings": len(pairs),
        "spearman": round(float(spearmanr(one, other)[0]), 3),
        "mean_absolute_error": round(float(np.abs(one - other).mean()), 3),
    }


def spreads(constants: Constants, record: Record, rng: np.random.Generator) -> tuple[Any, Any]:
    """How runs alike differ: deviations of `curves.JITTER`, and each run's likely jitter.

    Expectation maximisation by importance sampling: draws from the present deviations, weighted
    by how well they explain the run's validation losses.
    """
    deviation = np.full(len(curves.JITTER), 0.5)
    shape = (len(deviation), len(record.number))
    for _ in range(EM_ROUNDS):
        draws = [deviation[:, None] * rng.standard_normal(shape) for _ in range(EM_DRAWS)]
        costs = [
            0.5 * (residuals(constants, record, draw)[0] ** 2).sum(0) / EM_TOLERANCE
            for draw in draws
        ]
        weight = np.exp(np.min(costs, 0) - costs)
        weight /= weight.sum(0)
        second = sum(w * draw**2 for w, draw in zip(weight, draws, strict=True))
        deviation = np.sqrt(second.mean(1))
    return deviation, sum(w * draw for w, draw in zip(weight, draws, strict=True))


def readings(
    constants: Constants, record: Record, runs: list[dict[str, Any]], jitter: Any
) -> dict[str, Any]:
    """The regressions of noise and probe figures, from what the curves leave over."""
    _, validation = simulate(constants, record, jitter)
    laws = curves.law(constants, record.given, jitter)
    held = curves.held(laws, record.rate, constants.optimizer[record.optimizer].T)
    over = np.log(record.validation[1:] / validation[1:])
    # Two noisy readings differ by the root of two times one reading's noise; a curve that is off
    # is so in both, so that second differences leave it out.
    steps = np.diff(over, n=2, axis=0) / np.sqrt(6)
    usable = np.isfinite(steps) & (np.abs(over[2:]) < 1) & (steps != 0)
    line = np.stack([np.ones(usable.sum()), np.log(held[2:][usable])], 1)
    rows = [row for i, run in enumerate(runs) for row in table(run)]
    seen = np.array([row[1:] for row in rows])
    kinds = np.array([row[0] for row in rows])
    cool = np.column_stack([seen[:, :2], np.minimum(seen[:, 2], HOT), seen[:, 3]])
    return {
        "train": rounded(deviation_line(cool, seen[:, 5])),
        "validation": rounded(deviation_line(line, steps[usable])),
        "metric": metric(runs),
        "probe": {name: figures(seen[kinds == i]) for i, name in enumerate(OPTIMIZERS)},
    }


def table(run: dict[str, Any]) -> list[tuple[float, ...]]:
    """A row for each sound report: optimizer, then predictors, and what is to be predicted."""
    ruler = reference_rate(run["parameters"], run["optimizer"], "full")
    start, batch = np.log(np.log(run["classes"])), np.log(run["batch"] / 16)
    rows, knobs = [], Knobs(shape=run["shape"])
    for t, report in enumerate(run["reports"][1:]):
        losses = np.array(report["losses"])
        numbers = (report["gradient"], report["update"], report["cosine"])
        last = factor(knobs, (t + 1) * run["interval"] - 1, run["steps"])
        sound = np.isfinite([*losses, *numbers]).all() and min(*losses, *numbers[:2]) > 0
        if not sound or last < LEAST_FACTOR:
            continue
        relative = report["rate"] / ruler
        noise = slope(losses)[1] * np.sqrt(len(losses) / (len(losses) - 2))
        rows.append(
            (OPTIMIZERS.index(run["optimizer"]), 1.0, np.log(losses).mean() - start,
             np.log10(relative * mean_factor(run, t)), batch, np.log(losses[-1]) - start, noise,
             np.log10(relative * last), np.log(numbers[0]), np.log10(numbers[1]), numbers[2])
        )  # fmt: skip
    return rows


def deviation_line(line: Any, rest: Any) -> Any:
    """Log deviation as a linear function, scaled to leave the whole variance as it is."""
    known = np.abs(rest) > 0
    found = np.linalg.lstsq(line[known], np.log(np.abs(rest[known])), rcond=None)[0]
    guess = np.exp(line[known] @ found)
    found[0] += 0.5 * np.log(np.mean(np.minimum((rest[known] / guess) ** 2, 50.0)))
    return found


def figures(seen: Any) -> dict[str, list[float]]:
    """Gradient norm, update ratio and cosine: `PREDICTORS`, then the deviation's line."""
    base = np.stack([np.ones(len(seen)), seen[:, 4], seen[:, 6], seen[:, 3]], 1)
    pulled = np.column_stack([base, np.minimum(seen[:, 7], 0.0)])
    result = {}
    for name, column, line in zip(FIGURES, (7, 8, 9), (base, pulled, pulled), strict=True):
        found = np.linalg.lstsq(line, seen[:, column], rcond=None)[0]
        wide = deviation_line(base[:, [0, 2]], seen[:, column] - line @ found)
        result[name] = rounded([*found, *[0.0] * (pulled.shape[1] - len(found)), *wide])
    return result


def metric(runs: list[dict[str, Any]]) -> list[float]:
    """Accuracy against the validation loss and the number of classes."""
    rows = [
        (
            np.log(np.clip(report["validation"] / np.log(run["classes"]), 0.02, 2)),
            1 / run["classes"],
            a,
        )
        for run in runs
        for report, a in zip(run["reports"], run["metric"], strict=True)
        if np.isfinite(report["validation"])
    ]
    seen = np.array(rows)
    line = np.column_stack([np.ones(len(seen)), seen[:, :2]])
    return rounded(np.linalg.lstsq(line, seen[:, 2], rcond=None)[0])


def rounded(values: Any) -> list[float]:
    """Four digits: more than the data tell."""
    return [float(f"{value:.4g}") for value in values]


def contents(
    constants: Constants, runs: list[dict[str, Any]], deviation: Any, read: dict[str, Any]
) -> dict[str, Any]:
    """The fitted file. Each task has the class subsets that were met: classes and prior."""
    tasks = {}
    for i, name in enumerate(TASKS):
        own = [run for run in runs if run["task"] == name]
        most = max(run["classes"] for run in own)
        pairs = sorted({(run["classes"], run["prior"]) for run in own if run["noise"] == 0})
        whole = float(np.median([prior for classes, prior in pairs if classes == most]))
        tasks[name] = {
            **dict(zip(curves.TASK, rounded(constants.task[i]), strict=True)),
            "whole": [most, rounded([whole])[0]],
            "subsets": [list(pair) for pair in pairs[:: max(1, len(pairs) // 24)]],
        }
    return {
        "parameters": int(np.median([run["parameters"] for run in runs])),
        "tasks": tasks,
        "optimizers": {
            name: dict(zip(curves.OPTIMIZER, rounded(constants.optimizer[i]), strict=True))
            for i, name in enumerate(OPTIMIZERS)
        },
        "shared": dict(zip(curves.SHARED, rounded(constants.shared), strict=True)),
        "jitter": dict(zip(curves.JITTER, rounded(deviation), strict=True)),
        "readings": read,
    }


def main() -> None:
    """Fit, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    runs = read(options.runs)
    record = gather(runs)
    used = split(record, held=False)
    kept = set(used.number.tolist())
    fitted_on = [run for run in runs if run["number"] in kept]
    constants = fit(used, options.rounds)
    deviation, jitter = spreads(constants, used, np.random.default_rng(0))
    file = contents(constants, fitted_on, deviation, readings(constants, used, fitted_on, jitter))
    constants = curves.constants_of(file)
    curves.FITTED.write_text(json.dumps(file, indent=1) + "\n")
    figures = {
        "held_back": agreement(constants, split(record, held=True)),
        "fitted": agreement(constants, used),
        "two_seeds": ceiling(record),
        "jitter": file["jitter"],
    }
    print(json.dumps(figures, indent=1))
    facts = {"runs": len(runs), "seeds": [0], "command": "python scripts/fit_surrogate.py"}
    FIGURES_FILE.write_text(json.dumps(figures | facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
