"""Evidence: what a suite's raw outcomes say of each steered method, in numbers."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from baselines import report, stats
from baselines.figures import Outcome
from baselines.report import REFERENCE, RESAMPLES, Table
from baselines.schedules import KeepAgain

TAUS = np.linspace(-0.5, 1.0, 61)  # normalised scores at which profiles are told


def measure(outcomes: Iterable[Outcome], policies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A suite in numbers: `report.summarise`, and what a page of evidence needs beyond it.

    policies: ``name`` of each in the outcomes and what its ``training`` took, the tuner first.
    JSON-ready but for NaN and inf; scores and shares are of 1.
    """
    found = list(outcomes)
    table = report.table_of(found)
    training = {p["name"]: p["training"] for p in policies if p["name"] in table}
    summary = report.summarise(found, ours=next(iter(training), None))
    for task in summary["tasks"]:
        del task["curves"]
    steered = report.steered_of(table)
    told = {name: judge(name, table, summary, training.get(name)) for name in steered}
    offsets = {name: by_offset(runs) for name, runs in table.items()}
    return summary | {
        "judged": told,
        "chance_harm": _harm(table, KeepAgain.name) if KeepAgain.name in table else None,
        "normalised": normalised(table),
        "ranks": ranks(table),
        "offsets": {name: known for name, known in offsets.items() if known},
        "provenance": report.provenance(found),
    }


def judge(
    name: str, table: Table, summary: Mapping[str, Any], training: Mapping[str, Any] | None
) -> dict[str, Any]:
    """One method against the others: worth, chances, harm, divergence, break-even, losses.

    training: what a policy's took; only policies have trials to match.
    """
    row = next(row for row in summary["methods"] if row["name"] == name)
    searches = [r["name"] for r in summary["methods"] if r["kind"] == "search"]
    match = summary["match"] if name == summary["steered"] else {}
    if training is not None and not match:
        match = {search: report.match_of(table[name], table[search]) for search in searches}
    lines = [training] if training and training.get("seconds") else []
    in_order = {
        search: report.match_of(table[name], table[search], ordered=True) for search in match
    }
    cost = report.cost_of({**summary, "match": match}, lines)
    return {
        "match": match,
        "match_in_order": in_order,
        "chance": {other: _chance(table, name, other) for other in table if other != name},
        "jobs": jobs(table, name),
        "harm": _harm(table, name),
        "diverged": _share(row["diverged"], row["trials"]),
        "last_loss": {who: _last(table[who]) for who in (name, REFERENCE) if who in table},
        "cost": cost | {"break_even": break_even(cost, match)},
        "losses": losses(table, name),
    }


def _chance(
    table: Table, name: str, other: str, task: str | None = None, equal: bool = False
) -> dict[str, float] | None:
    """Probability of improvement over the cells that both have, in one task or in all."""
    ours, theirs = ({cell: o for cell, o in table[n].items() if task in (None, cell[0])}
                    for n in (name, other))  # fmt: skip
    pairs = report.paired(ours, theirs, equal)
    if not pairs[0]:
        return None
    return asdict(stats.probability_of_improvement(*pairs, paired=True, n=RESAMPLES))


def jobs(table: Table, name: str) -> dict[str, Any]:
    """Job by job: mean test scores with the user's own schedule and steered, and the chance."""
    found = {}
    for task in sorted({cell[0] for cell in table[name]}):
        chance = _chance(table, name, report.REFERENCE, task) if report.REFERENCE in table else None
        if chance is not None:
            means = (_mean(report.scores_of(table[n], task)[0]) for n in (report.REFERENCE, name))
            found[task] = dict(zip(("own", "steered"), means, strict=True)) | {"chance": chance}
    return found


def _mean(scores: stats.Array) -> float:
    """Of the runs that did not fail; NaN if all did."""
    known = scores[np.isfinite(scores)]
    return float(known.mean()) if known.size else math.nan


def _harm(table: Table, name: str) -> dict[str, Any] | None:
    harm = report.harm_of(table, name)
    if harm is None:
        return None
    return harm | _share(round(harm["rate"] * harm["runs"]), harm["runs"])


def _last(runs: Mapping[report.Cell, Outcome]) -> float:
    """The highest selection loss at the end of a run; NaN if it is known of none."""
    known = [t["curve"][-1]["selection_loss"] if t.get("curve") else t.get("last_loss", math.nan)
             for outcome in runs.values() for t in outcome["trials"]]  # fmt: skip
    return max((loss for loss in known if not math.isnan(loss)), default=math.nan)


def _share(count: int, of: int) -> dict[str, Any]:
    nothing = dict.fromkeys(("low", "point", "high"), math.nan)
    return {"count": count, "of": of} | (asdict(stats.share(count, of)) if of else nothing)


def break_even(cost: Mapping[str, Any], match: Mapping[str, Any]) -> dict[str, Any] | None:
    """Jobs until training has paid for itself, by the ends of the trials to match.

    ``training / ((trials - 1) x a run)`` with the searcher of `report.cost_of`; inf where nothing
    is saved. ``bound``: more trials would be needed than were tried, so that it is no more than
    that. None if the training's seconds are not known.
    """
    if cost["search"] is None:
        return None
    trials = match[cost["search"]]["median"]

    def jobs(worth: float) -> float:
        saved = (min(worth, trials["n_max"]) - 1) * cost["run_seconds"]
        return cost["training_seconds"] / saved if saved > 0 else math.inf

    return {"low": jobs(trials["high"]), "point": jobs(trials["point"]),
            "high": jobs(trials["low"]), "bound": trials["point"] > trials["n_max"]}  # fmt: skip


def losses(table: Table, name: str) -> list[dict[str, Any]]:
    """Tasks and methods it is more often behind than ahead of, the worst first.

    Behind at the end of the other's whole budget, or already when both have spent the same.
    """
    found = []
    for other in table.keys() - {name}:
        for task in sorted({cell[0] for cell in table[name]}):
            whole = _chance(table, name, other, task)
            equal = _chance(table, name, other, task, equal=True)
            if whole and equal and min(whole["point"], equal["point"]) < 0.5:
                cells = [cell for cell in table[other] if cell[0] == task]
                spent = [report.runs_of(table[other][cell]) for cell in cells]
                found.append({
                    "task": task, "method": other, "cells": len(cells),
                    "runs": float(np.mean(spent)), "chance": whole, "chance_equal": equal,
                })  # fmt: skip
    return sorted(found, key=lambda lost: (lost["chance"]["point"], lost["task"], lost["method"]))


def normalised(table: Table) -> dict[str, Any] | None:
    """Scores between the user's own schedule, 0, and the oracle, 1; None without either.

    A job's default is the mean test score of `REFERENCE` over seeds; its oracle the best test
    score of any trial of any method and seed, which no method could have chosen. Jobs in which
    the oracle is no better are left out.
    """
    ends: dict[str, tuple[float, float]] = {}
    for task in sorted({cell[0] for cell in table.get(REFERENCE, ())}):
        tests = [trial["test"] for runs in table.values() for cell, outcome in runs.items()
                 if cell[0] == task for trial in outcome["trials"]]  # fmt: skip
        (own,) = report.scores_of(table[REFERENCE], task)
        oracle = max(filter(math.isfinite, tests), default=-math.inf)
        if np.isfinite(own).any() and oracle > np.nanmean(own):
            ends[task] = float(np.nanmean(own)), float(oracle)
    methods, profiles = {}, {}
    for name, runs in table.items():
        jobs = [stats.normalised(job, *ends[task]) for task in ends
                for job in report.scores_of(runs, task)]  # fmt: skip
        if jobs:
            methods[name] = report.interval_of(jobs)
            profiles[name] = stats.performance_profile(jobs, TAUS).tolist()
    if not methods:
        return None
    jobs_told = {task: {"default": low, "oracle": high} for task, (low, high) in ends.items()}
    return {"jobs": jobs_told, "methods": methods, "taus": TAUS.tolist(), "profiles": profiles}


def ranks(table: Table) -> dict[str, Any] | None:
    """Mean ranks over the seeds of jobs that all methods have, and who does not differ from whom.

    A seed's score is its mean over starting rates, a failed run's being 0. ``cliques`` is None
    where so few of them could tell no two of so many methods apart.
    """
    names = list(table)
    cells = set.intersection(*(set(runs) for runs in table.values())) if table else set()
    seeds = [seed for job in report.seeds_of(cells).values() for seed in job]
    if len(names) < 2 or len(seeds) < 2:
        return None
    scores = np.array([
        [np.nan_to_num([report.score_of(table[name][cell]) for cell in seed]).mean()
         for name in names] for seed in seeds
    ])  # fmt: skip
    mean, p = stats.mean_ranks(scores), stats.wilcoxon_holm(scores)
    groups = stats.cliques(mean, p) if stats.least_p(*scores.shape) < 0.05 else None
    return {
        "blocks": len(seeds),
        "methods": {names[i]: float(mean[i]) for i in np.argsort(mean, kind="stable")},
        "cliques": groups and [[names[i] for i in group] for group in groups],
    }


def by_offset(runs: Mapping[report.Cell, Outcome]) -> dict[str, Any] | None:
    """What exactly misjudged starting rates cost; None if none were set.

    ``lost``: for each offset the share of the right rate's score that is lost, the mean over
    tasks of ``1 - median over seeds / that from the right rate``. ``worst``: the largest of them,
    with an interval: the seeds of each task drawn again, each with all its offsets.
    """
    groups: dict[str, dict[int, dict[float, float]]] = {}
    for (task, seed, _), outcome in runs.items():
        offset = outcome.get("cell", {}).get("offset")
        if offset is not None:
            score = float(np.nan_to_num(report.score_of(outcome)))
            groups.setdefault(task, {}).setdefault(seed, {})[offset] = score
    rows = [list(task.values()) for task in groups.values()]
    offsets = sorted({offset for task in rows for row in task for offset in row})
    whole = [[[row[o] for o in offsets] for row in task if len(row) == len(offsets)]
             for task in rows]  # fmt: skip
    samples = [np.array(task) for task in whole if task]
    if 0.0 not in offsets or len(offsets) < 2 or not samples:
        return None
    right = offsets.index(0.0)

    def lost(jobs: list[stats.Array]) -> stats.Array:
        medians = np.array([np.median(job, axis=0) for job in jobs])
        medians = medians[medians[:, right] > 0]
        return np.asarray((1 - medians / medians[:, [right]]).mean(axis=0))

    worst = stats.bootstrap(lambda jobs: float(np.delete(lost(jobs), right).max()), samples,
                            n=RESAMPLES)  # fmt: skip
    shares = {f"{o:+g}": float(x) for o, x in zip(offsets, lost(samples), strict=True)}
    return {"lost": shares, "worst": asdict(worst)}
