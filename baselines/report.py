"""Outcomes -> one self-contained HTML page."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from baselines import figures, plates, stats
from baselines.figures import Outcome, Picture, percent, spread, styles, trials
from baselines.schedules import BestList
from envs.catalog import CORPORA
from envs.files import write_atomic

Cell = tuple[str, int, float]  # task, seed, starting rate: the same for every method
Table = dict[str, dict[Cell, Outcome]]
RESAMPLES = 500
REFERENCE = "keep"  # the user's own schedule


def summarise(
    outcomes: Iterable[Outcome],
    training: Sequence[Mapping[str, Any]] = (),
    ours: str | None = None,
) -> dict[str, Any]:
    """The comparison in numbers, JSON-ready but for NaN and inf; scores are shares of 1.

    A method's score in a cell is the test accuracy of its selection-best trial; one without a
    trial has failed. Chances and harm are over the cells that both methods have. ours: the
    steered method that the others are set against; by default the one that spends least.
    """
    table = table_of(outcomes)
    cells = {cell for runs in table.values() for cell in runs}
    steered = steered_of(table)
    if ours is None:
        ours = min(steered, key=lambda name: _mean(table[name], runs_of), default=None)
    rows = [_row(name, table, ours, name in steered, len(cells)) for name in table]
    rows.sort(key=lambda row: (("steered", "search", "schedule").index(row["kind"]),
                               row["name"] != ours, -row["test"]["point"]))  # fmt: skip
    tasks = [
        {
            "name": task,
            "role": _role(task, table),
            "tests": {row["name"]: interval_of(scores_of(table[row["name"]], task)) for row in rows
                      if scores_of(table[row["name"]], task)},
            "curves": _curves(table, rows, task),
        }
        for task in sorted({cell[0] for cell in cells})
    ]  # fmt: skip
    searches = [row["name"] for row in rows if row["kind"] == "search"]
    summary: dict[str, Any] = {
        "steered": ours,
        "reference": REFERENCE if REFERENCE in table else None,
        "methods": rows,
        "tasks": tasks,
        "curves": _curves(table, rows),
        "match": {name: match_of(table[ours], table[name]) for name in searches} if ours else {},
        "harm": harm_of(table, ours),
        "cells": len(cells),
        "seeds": sorted({cell[1] for cell in cells}),
        "rates": sorted({cell[2] for cell in cells}),
        "trials": sum(row["trials"] for row in rows),
        "seconds": sum(float(o["seconds"]) for runs in table.values() for o in runs.values()),
    }
    summary["cost"] = cost_of(summary, training)
    return summary | {"verdict": verdict(summary), "table": _table(summary)}


def table_of(outcomes: Iterable[Outcome]) -> Table:
    """Outcomes by method and cell."""
    table: Table = {}
    for outcome in outcomes:
        table.setdefault(str(outcome["method"]), {})[_cell(outcome)] = outcome
    return table


def steered_of(table: Table) -> list[str]:
    """Methods that a learned tuner steers."""
    return [name for name, runs in table.items() if any(o.get("steered") for o in runs.values())]


def verdict(summary: Mapping[str, Any]) -> str:
    """One paragraph in plain language, from the numbers alone, good news or bad."""
    name, methods = summary["steered"], {row["name"]: row for row in summary["methods"]}
    count = len(summary["tasks"])
    if name is None:
        return (
            f"{len(methods)} methods ran on {count} task{'s' * (count != 1)}. None of them is a "
            "steered run, so nothing can be said about the tuner."
        )
    held = sum(task["role"] == "held-out" for task in summary["tasks"])
    where = f"{count} task{'s' * (count != 1)}, {'all' if held == count else held} held out"
    row = methods[name]
    said = [f"On {where}, one steered run reached {spread(row['test'])} test accuracy."]
    if summary["reference"]:
        own = methods[summary["reference"]]["test"]
        gain = row["test"]["point"] - own["point"]
        word = "more" if gain > 0 else "less" if gain < 0 else "neither more nor less"
        apart = row["test"]["low"] > own["high"] or row["test"]["high"] < own["low"]
        doubt = ", with intervals that overlap"
        if len(summary["seeds"]) == 1:  # then an interval has no width
            apart, doubt = False, ", with one seed, which cannot tell it from luck"
        said.append(
            f"The user's own schedule from the same starting rates reached {spread(own)}: steering "
            f"brought {f'{abs(gain) * 100:.1f} points ' if gain else ''}{word}"
            f"{'' if apart else doubt}."
        )
    worth = sorted((m["median"]["point"], search) for search, m in summary["match"].items())
    if worth:
        ends = [f"{trials(summary['match'][search]['median'])} trials of {search}"
                for search in dict.fromkeys((worth[0][1], worth[-1][1]))]  # fmt: skip
        said.append(f"In the median task it is worth {' to '.join(ends)}.")
    said.append(
        f"It diverged in {row['diverged']} of {row['trials']} runs"
        + (f" and ended clearly worse than the user's own schedule in {percent(harm['rate'])} % of "
           f"{harm['runs']} cells." if (harm := summary["harm"]) else ".")
    )  # fmt: skip
    return " ".join(said)


def _table(summary: Mapping[str, Any]) -> list[list[str]]:
    """Method, runs, test accuracy, chance that steered is better, trials to match, diverged."""
    table = []
    for row in summary["methods"]:
        match = summary["match"].get(row["name"])
        table.append([
            row["name"], f"{row['runs']:.3g}", spread(row["test"]),
            spread(row["chance"]) if row["chance"] else "",
            trials(match["median"]) if match and match["median"]["n_max"] else "",
            f"{row['diverged']} of {row['trials']}",
        ])  # fmt: skip
    return table


def _cell(outcome: Outcome) -> Cell:
    return str(outcome["task"]), int(outcome["seed"]), float(outcome["start_rate"])


def runs_of(outcome: Outcome) -> float:
    """Whole runs' worth of budget that were spent."""
    return float(outcome["spent"] / outcome["run_cost"])


def _mean(runs: Mapping[Cell, Outcome], of: Any) -> float:
    return float(np.mean([of(outcome) for outcome in runs.values()]))


def _role(task: str, table: Table) -> str:
    told = [o["role"] for runs in table.values() for c, o in runs.items()
            if c[0] == task and o.get("role")]  # fmt: skip
    corpus = CORPORA.get(task.split("/")[0])
    return str(told[0]) if told else corpus.role if corpus else "own"


def _trace(outcome: Outcome) -> tuple[stats.Array, stats.Array]:
    """Runs spent as each trial was handed in, and the test score of the best so far."""
    handed = outcome["trials"]
    tests = np.array([t["test"] for t in handed], dtype=float)
    if not np.isfinite(tests).any():
        return np.empty(0), np.empty(0)
    spent = np.array([t["spent"] for t in handed], dtype=float) / outcome["run_cost"]
    return spent, stats.running_best([t["selection"] for t in handed], tests)


def score_of(outcome: Outcome, runs: float = math.inf) -> float:
    """Test score after that many runs' worth of budget, but of one trial at least."""
    spent, best = _trace(outcome)
    return float(best[max(1, int(np.sum(spent <= runs + 1e-9))) - 1]) if best.size else math.nan


def seeds_of(cells: Iterable[Cell]) -> dict[str, list[list[Cell]]]:
    """By task, the cells of each seed: one for each starting rate, which are drawn together.

    Where a seed lacks one, each cell stands for itself.
    """
    groups: dict[str, dict[int, list[Cell]]] = {}
    for cell in sorted(cells):
        groups.setdefault(cell[0], {}).setdefault(cell[1], []).append(cell)
    found = {task: list(seeds.values()) for task, seeds in groups.items()}
    return {task: seeds if len(set(map(len, seeds))) == 1 else [[c] for s in seeds for c in s]
            for task, seeds in found.items()}  # fmt: skip


def scores_of(runs: Mapping[Cell, Outcome], task: str | None = None) -> list[stats.Array]:
    """Final scores, one array (seeds, starting rates) per task."""
    return [np.array([[score_of(runs[cell]) for cell in seed] for seed in seeds])
            for name, seeds in seeds_of(runs).items() if task in (None, name)]  # fmt: skip


def distinct(runs: Mapping[Cell, Outcome]) -> dict[Cell, Outcome]:
    """Without those that repeat another starting rate's: what takes no rate from the user."""
    found: dict[Any, Cell] = {}
    for cell, outcome in sorted(runs.items()):
        told = [(repr(t.get("knobs")), repr(t["selection"]), repr(t["test"]))
                for t in outcome["trials"]]  # fmt: skip
        found.setdefault((*cell[:2], *told) if told else cell, cell)
    return {cell: runs[cell] for cell in found.values()}


def interval_of(jobs: list[stats.Array]) -> dict[str, float]:
    """IQM of scores, (seeds,) or (seeds, rates) of each job, with its bootstrap interval."""
    columns = [job.reshape(len(job), -1, 1) for job in jobs]
    return {key: column[0] for key, column in _bands(columns).items()}


def paired(
    ours: Mapping[Cell, Outcome], other: Mapping[Cell, Outcome], equal: bool = False
) -> tuple[list[stats.Array], list[stats.Array]]:
    """`scores_of` both in the cells that both have; the other's at our spend if equal."""
    both = {cell: ours[cell] for cell in ours.keys() & other.keys()}
    theirs = [
        np.array([[score_of(other[cell], runs_of(ours[cell]) if equal else math.inf)
                   for cell in seed] for seed in seeds])
        for seeds in seeds_of(both).values()
    ]  # fmt: skip
    return scores_of(both), theirs


def _row(name: str, table: Table, ours: str | None, steered: bool,
         cells: int) -> dict[str, Any]:  # fmt: skip
    runs = table[name]
    handed = [trial for outcome in distinct(runs).values() for trial in outcome["trials"]]
    several = max(len(outcome["trials"]) for outcome in runs.values()) > 1
    chances: dict[str, Any] = {"chance": None, "chance_equal": None}
    if ours and name != ours and runs.keys() & table[ours].keys():
        for key, equal in (("chance", False), ("chance_equal", True)):
            pair = paired(table[ours], runs, equal)
            chance = stats.probability_of_improvement(*pair, paired=True, n=RESAMPLES)
            chances[key] = asdict(chance)
    return {
        "name": name,
        "kind": "steered" if steered else "search" if several else "schedule",
        "cells": len(runs),
        "missing": cells - len(runs),
        "runs": _mean(runs, runs_of),
        "test": interval_of(scores_of(runs)),
        **chances,
        "trials": len(handed),
        "diverged": sum(trial["state"] == "diverged" for trial in handed),
        "rows": _mean(runs, lambda outcome: outcome["spent"]),
        "seconds": _mean(runs, lambda outcome: outcome["seconds"]),
    }


def _curves(table: Table, rows: Sequence[Mapping[str, Any]],
            task: str | None = None) -> dict[str, dict[str, list[float]]]:  # fmt: skip
    """Per method: IQM of the best so far against runs spent, from where every cell has a trial."""
    curves = {}
    for name in (row["name"] for row in rows):
        cells = [cell for cell in table[name] if task in (None, cell[0])]
        known = {cell: _trace(table[name][cell]) for cell in cells}
        traces = [trace for trace in known.values() if trace[0].size]
        if not traces:
            continue
        first, last = (max(float(t[0][i]) for t in traces) for i in (0, -1))
        single = all(t[0].size == 1 for t in traces)
        grid = [float(np.mean([t[0][0] for t in traces]))] if single else _grid(first, last)
        x = np.array(grid) + 1e-9
        scores = [np.array([[_best_at(x, *known[cell]) for cell in seed] for seed in seeds])
                  for seeds in seeds_of(cells).values()]  # fmt: skip
        curves[name] = {"runs": grid} | _bands(scores)
    return curves


def _best_at(runs: stats.Array, spent: stats.Array, best: stats.Array) -> stats.Array:
    """The score of a `_trace` at each of ``runs``; of one without a trial -inf."""
    if not spent.size:
        return np.full(runs.size, -np.inf)
    return best[np.maximum(np.searchsorted(spent, runs), 1) - 1]


def _grid(first: float, last: float) -> list[float]:
    points = np.unique(np.round(np.geomspace(max(1, math.ceil(first)), max(1, last), 40)))
    return sorted({float(first), *(float(p) for p in points if first < p < last), float(last)})


def _bands(jobs: list[stats.Array]) -> dict[str, list[float]]:
    """`stats.iqm` and its stratified bootstrap at every column at once.

    jobs: (seeds, rates, columns); a seed is drawn with all its starting rates.
    """

    def iqms(pooled: Any) -> stats.Array:
        cut = pooled.shape[-2] // 4
        ordered = np.sort(np.where(np.isnan(pooled), -np.inf, pooled), axis=-2)
        return np.asarray(ordered[..., cut : pooled.shape[-2] - cut, :].mean(axis=-2))

    rng = np.random.default_rng(0)
    drawn = [job[rng.integers(len(job), size=(RESAMPLES, len(job)))] for job in jobs]
    draws = iqms(np.concatenate(
        [job.reshape(RESAMPLES, -1, job.shape[-1]) for job in drawn], axis=1
    ))  # fmt: skip
    low = np.quantile(draws, 0.025, axis=0, method="lower")
    high = np.quantile(draws, 0.975, axis=0, method="higher")
    point = iqms(np.concatenate([job.reshape(-1, job.shape[-1]) for job in jobs]))
    return {"low": low.tolist(), "point": point.tolist(), "high": high.tolist()}


def match_of(
    ours: Mapping[Cell, Outcome], search: Mapping[Cell, Outcome], *, ordered: bool = False
) -> dict[str, Any]:
    """Trials to match in each task and in the median one; ordered: see `trials_to_match`."""
    found: dict[str, stats.TrialsToMatch] = {}
    search = distinct(search)
    for task in sorted({cell[0] for cell in ours} & {cell[0] for cell in search}):
        studies = [_whole(o["trials"]) for c, o in sorted(search.items()) if c[0] == task]
        studies = [study for study in studies if study]
        if studies:
            pools = [[np.array([t[k] for t in s], float) for s in studies]
                     for k in ("selection", "test")]  # fmt: skip
            found[task] = stats.trials_to_match(
                scores_of(ours, task)[0], *pools, ordered=ordered, resamples=RESAMPLES
            )
    asked = {task: asdict(match.interval) | {"n_max": match.n_max} for task, match in found.items()}
    if not found:
        nothing = dict.fromkeys(("low", "point", "high"), math.nan)
        return {"median": nothing | {"n_max": 0}, "tasks": asked}
    middle = stats.median_trials_to_match(list(found.values()))
    return {"median": asdict(middle.interval) | {"n_max": middle.n_max}, "tasks": asked}


def _whole(handed: Sequence[Outcome]) -> Sequence[Outcome]:
    """Without the last trial where only the end of the budget cut it short, not a pruner."""
    pruned = [trial["state"] == "pruned" for trial in handed]
    return handed[:-1] if pruned and pruned[-1] and not any(pruned[:-1]) else handed


def harm_of(table: Table, ours: str | None) -> dict[str, Any] | None:
    """How often, in how many cells and by how much a method is worse than the reference."""
    if ours is None or REFERENCE not in table:
        return None
    got, base = paired(table[ours], table[REFERENCE])
    if not got:
        return None
    got, base = ([at for job in jobs for at in job.T] for jobs in (got, base))  # rate by rate
    regret = np.nan_to_num(np.concatenate(base)) - np.nan_to_num(np.concatenate(got))
    rate, runs = stats.harm_rate(got, base), sum(map(len, got))
    return {"rate": rate, "clear": stats.harm_rate(got, base, both=True), "runs": runs,
            "interval": asdict(stats.share(round(rate * runs), runs)),
            "worst": float(regret.max())}  # fmt: skip


def cost_of(summary: Mapping[str, Any], training: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Training cost of the agent, and after how many jobs it has paid for itself.

    Break-even: training / ((trials to match - 1) x seconds of a run), with TPE or, where it took
    no part, the searcher that needs the fewest trials, ``search``; None where steering saves
    nothing. A list of settings is no searcher: it was learned, too.
    """
    seconds = float(sum(line.get("seconds") or 0 for line in training)) if training else None
    finite = [(m["median"]["point"], m["median"]["n_max"], name)
              for name, m in summary["match"].items()
              if m["median"]["n_max"] and name != BestList.name]  # fmt: skip
    if not seconds or not finite:
        return {"training_seconds": seconds, "run_seconds": None, "jobs": None, "search": None}
    worth, most, name = min(finite, key=lambda match: (match[2] != "tpe", *match))
    row = next(row for row in summary["methods"] if row["name"] == name)
    run = row["seconds"] / row["runs"]
    saved = (min(worth, most) - 1) * run
    jobs = math.ceil(seconds / saved) if saved > 0 else None
    return {"training_seconds": seconds, "run_seconds": run, "jobs": jobs, "search": name}


def provenance(outcomes: Iterable[Outcome]) -> dict[str, dict[str, Any]]:
    """Versions, hardware and data as the outcomes recorded them, for ``facts`` of `render`."""
    found: dict[str, dict[str, set[str]]] = {"Versions": {}, "Hardware": {}, "Data": {}}
    for outcome in outcomes:
        cell = outcome.get("cell", {})
        named = [("Versions", n, v) for n, v in outcome.get("versions", {}).items()]
        named += [("Hardware", "device", outcome["device"])] if "device" in outcome else []
        named += [("Data", outcome["task"], f"rows {cell['data']['rows']}, "
                   f"model {cell['data']['model']}")] if "data" in cell else []  # fmt: skip
        named += [("Versions", "code", cell["code"])] if "code" in cell else []
        for heading, name, value in named:
            found[heading].setdefault(name, set()).add(str(value))
    return {heading: {name: ", ".join(sorted(values)) for name, values in sorted(rows.items())}
            for heading, rows in found.items() if rows}  # fmt: skip


def render(
    summary: Mapping[str, Any],
    pictures: Mapping[str, Picture],
    facts: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """The page. ``facts``: heading -> name -> value, shown as they are told."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("baselines", ""), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters |= {"percent": percent, "trials": trials, "count": "{:,.0f}".format,
                            "whole": lambda x: f"{100 * x:.0f}"}  # fmt: skip
    return environment.get_template("report.html.jinja").render(
        summary=summary, pictures=pictures, facts=facts or {},
        steered=[name for name in pictures if name.startswith("steered-")],
        colours={name: colour for name, (colour, _) in styles(summary).items()},
    )  # fmt: skip


def write(
    folder: Path,
    outcomes: Iterable[Outcome],
    *,
    steered: Sequence[Mapping[str, Any]] = (),
    training: Sequence[Mapping[str, Any]] = (),
    facts: Mapping[str, Mapping[str, Any]] | None = None,
    beyond: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write ``report.html``, ``summary.json`` and ``figures/*.png`` in a folder -> the summary.

    beyond: further figures of the same outcomes, ``normalised`` and ``ranks`` as of
    `baselines.evidence`.
    """
    runs = list(outcomes)
    summary = summarise(runs, training) | dict(beyond or {})
    pictures = figures.draw_all(summary, figures.traces(runs, summary, steered, score_of), training)
    pictures |= across(summary)
    for name, picture in pictures.items():
        file = re.sub(r"[^\w.-]+", "-", name)
        write_atomic(folder / "figures" / f"{file}.png", picture.png)
    page = render(summary, pictures, provenance(runs) | dict(facts or {}))
    write_atomic(folder / "report.html", page.encode())
    text = json.dumps(finite(summary), indent=1, allow_nan=False) + "\n"
    write_atomic(folder / "summary.json", text.encode())
    return summary


def across(summary: Mapping[str, Any]) -> dict[str, Picture]:
    """Pictures of all methods against each other, where there are figures for them."""
    style, drawn = styles(summary), dict[str, Picture]()
    scores, order = summary.get("normalised"), summary.get("ranks")
    if scores:
        told = "; ".join(f"{name} {of['point']:.2f}" for name, of in scores["methods"].items())
        drawn["profiles"] = figures.picture("profiles", "Performance profiles",
            f"Mean normalised scores: {told}",
            partial(plates.draw_profiles, scores=scores, style=style), legend=True)  # fmt: skip
    if order:
        told = "; ".join(f"{name} {rank:.1f}" for name, rank in order["methods"].items())
        drawn["ranks"] = figures.picture("ranks", "Mean ranks, and who does not differ", told,
            partial(plates.draw_ranks, ranks=order, style=style),
            height=0.9 + 0.26 * len(order["methods"]))  # fmt: skip
    return drawn


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null; for trials to match, ``n_max`` tells which."""
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
