"""Outcomes -> one self-contained HTML page, and figures."""

import html
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from baselines import stats
from envs.catalog import CORPORA
from envs.files import write_atomic

Outcome = Mapping[str, Any]
Cell = tuple[str, int, float]  # task, seed, starting rate: the same for every method
Table = dict[str, dict[Cell, Outcome]]
RESAMPLES = 500
REFERENCE = "keep"  # the user's own schedule
INK, SOFT, LINE = "#30343a", "#767c85", "#d8dce1"  # in the page they follow light and dark
COLOURS = {  # 3 to 1 against white and near-black; red is the tuner's alone
    "steered": ("#d9482b", "#dd8a1b", "#b5355a"),
    "search": ("#2b7fb8", "#8467c9", "#2f9466", "#b8568f", "#1d93a3", "#5b70d6"),
    "schedule": ("#93703a", "#6f8a3a", "#a46a58", "#5c8394", "#8d7799", "#4d8a72"),
}
MINE, CARE, CALM = "#d9482b", "#dd8a1b", "#2b7fb8"


@dataclass(frozen=True)
class Picture:
    """A figure of the report: ``svg`` for the page, ``png`` for everything else."""

    title: str
    alt: str
    svg: str
    png: bytes


def summarise(
    outcomes: Iterable[Outcome], training: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """The comparison in numbers, JSON-ready but for NaN and inf; scores are shares of 1.

    A method's score in a cell is the test accuracy of its selection-best trial; one without a
    trial has failed. Chances and harm are over the cells that both methods have.
    """
    table: Table = {}
    for outcome in outcomes:
        table.setdefault(str(outcome["method"]), {})[_cell(outcome)] = outcome
    cells = {cell for runs in table.values() for cell in runs}
    steered = [name for name, runs in table.items() if any(o.get("steered") for o in runs.values())]
    ours = min(steered, key=lambda name: _mean(table[name], _runs), default=None)
    rows = [_row(name, table, ours, name in steered, len(cells)) for name in table]
    rows.sort(key=lambda row: (("steered", "search", "schedule").index(row["kind"]),
                               row["name"] != ours, -row["test"]["point"]))  # fmt: skip
    tasks = [
        {
            "name": task,
            "role": _role(task, table),
            "tests": {row["name"]: _interval(_scores(table[row["name"]], task)) for row in rows
                      if _scores(table[row["name"]], task)},
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
        "match": {name: _match(table[ours], table[name]) for name in searches} if ours else {},
        "harm": _harm(table, ours),
        "cells": len(cells),
        "seeds": sorted({cell[1] for cell in cells}),
        "rates": sorted({cell[2] for cell in cells}),
        "trials": sum(row["trials"] for row in rows),
        "seconds": sum(float(o["seconds"]) for runs in table.values() for o in runs.values()),
    }
    summary["cost"] = _cost(summary, training)
    return summary | {"verdict": verdict(summary), "table": _table(summary)}


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
        said.append(
            f"The user's own schedule from the same starting rates reached {spread(own)}: steering "
            f"brought {f'{abs(gain) * 100:.1f} points ' if gain else ''}{word}"
            f"{'' if apart else ', with intervals that overlap'}."
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


def percent(share: float) -> str:
    """A share as a percentage with one decimal, without the sign."""
    return f"{100 * share:.1f}" if math.isfinite(share) else "–"


def spread(number: Mapping[str, float]) -> str:
    """An interval of shares: ``83.1 % (81.0 to 84.9)``."""
    return f"{percent(number['point'])} % ({percent(number['low'])} to {percent(number['high'])})"


def trials(number: Mapping[str, float]) -> str:
    """A number of trials with its interval, censored at ``n_max``: ``12 (8 to > 40)``."""
    interval = stats.Interval(*(number[key] for key in ("low", "point", "high")))
    return str(stats.TrialsToMatch(interval, int(number["n_max"]), np.empty(0)))


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


def _runs(outcome: Outcome) -> float:
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


def _score(outcome: Outcome, runs: float = math.inf) -> float:
    """Test score after that many runs' worth of budget, but of one trial at least."""
    spent, best = _trace(outcome)
    return float(best[max(1, int(np.sum(spent <= runs + 1e-9))) - 1]) if best.size else math.nan


def _scores(runs: Mapping[Cell, Outcome], task: str | None = None) -> list[stats.Array]:
    """Final scores, one array per task."""
    groups: dict[str, list[float]] = {}
    for cell in sorted(runs):
        if task in (None, cell[0]):
            groups.setdefault(cell[0], []).append(_score(runs[cell]))
    return [np.array(group) for group in groups.values()]


def _interval(jobs: list[stats.Array]) -> dict[str, float]:
    return {key: column[0] for key, column in _bands([job[:, None] for job in jobs]).items()}


def _paired(
    ours: Mapping[Cell, Outcome], other: Mapping[Cell, Outcome], equal: bool = False
) -> tuple[list[list[float]], list[list[float]]]:
    """Scores of both in the cells that both have, by task; the other's at our spend if equal."""
    groups: dict[str, tuple[list[float], list[float]]] = {}
    for cell in sorted(ours.keys() & other.keys()):
        pair = groups.setdefault(cell[0], ([], []))
        pair[0].append(_score(ours[cell]))
        pair[1].append(_score(other[cell], _runs(ours[cell]) if equal else math.inf))
    return [pair[0] for pair in groups.values()], [pair[1] for pair in groups.values()]


def _row(name: str, table: Table, ours: str | None, steered: bool,
         cells: int) -> dict[str, Any]:  # fmt: skip
    runs = table[name]
    handed = [trial for outcome in runs.values() for trial in outcome["trials"]]
    several = max(len(outcome["trials"]) for outcome in runs.values()) > 1
    chances: dict[str, Any] = {"chance": None, "chance_equal": None}
    if ours and name != ours and runs.keys() & table[ours].keys():
        for key, equal in (("chance", False), ("chance_equal", True)):
            pair = _paired(table[ours], runs, equal)
            chance = stats.probability_of_improvement(*pair, paired=True, n=RESAMPLES)
            chances[key] = asdict(chance)
    return {
        "name": name,
        "kind": "steered" if steered else "search" if several else "schedule",
        "cells": len(runs),
        "missing": cells - len(runs),
        "runs": _mean(runs, _runs),
        "test": _interval(_scores(runs)),
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
        groups: dict[str, list[tuple[stats.Array, stats.Array]]] = {}
        for cell in sorted(table[name]):
            if task in (None, cell[0]):
                groups.setdefault(cell[0], []).append(_trace(table[name][cell]))
        traces = [trace for group in groups.values() for trace in group if trace[0].size]
        if not traces:
            continue
        first, last = (max(float(t[0][i]) for t in traces) for i in (0, -1))
        single = all(t[0].size == 1 for t in traces)
        grid = [float(np.mean([t[0][0] for t in traces]))] if single else _grid(first, last)
        x = np.array(grid) + 1e-9
        scores = [np.array([best[np.maximum(np.searchsorted(spent, x), 1) - 1] if spent.size
                            else np.full(x.size, -np.inf) for spent, best in group])
                  for group in groups.values()]  # fmt: skip
        curves[name] = {"runs": grid} | _bands(scores)
    return curves


def _grid(first: float, last: float) -> list[float]:
    points = np.unique(np.round(np.geomspace(max(1, math.ceil(first)), max(1, last), 40)))
    return sorted({float(first), *(float(p) for p in points if first < p < last), float(last)})


def _bands(jobs: list[stats.Array]) -> dict[str, list[float]]:
    """`stats.iqm` and its stratified bootstrap at every column at once; jobs: (seeds, columns)."""

    def iqms(pooled: Any) -> stats.Array:
        cut = pooled.shape[-2] // 4
        ordered = np.sort(np.where(np.isnan(pooled), -np.inf, pooled), axis=-2)
        return np.asarray(ordered[..., cut : pooled.shape[-2] - cut, :].mean(axis=-2))

    rng = np.random.default_rng(0)
    draws = iqms(np.concatenate(
        [job[rng.integers(len(job), size=(RESAMPLES, len(job)))] for job in jobs], axis=1
    ))  # fmt: skip
    low = np.quantile(draws, 0.025, axis=0, method="lower")
    high = np.quantile(draws, 0.975, axis=0, method="higher")
    point = iqms(np.concatenate(jobs))
    return {"low": low.tolist(), "point": point.tolist(), "high": high.tolist()}


def _match(ours: Mapping[Cell, Outcome], search: Mapping[Cell, Outcome]) -> dict[str, Any]:
    """Trials to match in each task and in the median one."""
    found: dict[str, stats.TrialsToMatch] = {}
    for task in sorted({cell[0] for cell in ours} & {cell[0] for cell in search}):
        studies = [_whole(o["trials"]) for c, o in sorted(search.items()) if c[0] == task]
        studies = [study for study in studies if study]
        if studies:
            pools = [[np.array([t[k] for t in s], float) for s in studies]
                     for k in ("selection", "test")]  # fmt: skip
            found[task] = stats.trials_to_match(_scores(ours, task)[0], *pools, resamples=RESAMPLES)
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


def _harm(table: Table, ours: str | None) -> dict[str, Any] | None:
    if ours is None or REFERENCE not in table:
        return None
    got, base = _paired(table[ours], table[REFERENCE])
    if not got:
        return None
    regret = np.nan_to_num(np.concatenate(base)) - np.nan_to_num(np.concatenate(got))
    return {"rate": stats.harm_rate(got, base), "runs": sum(map(len, got)),
            "worst": float(regret.max())}  # fmt: skip


def _cost(
    summary: Mapping[str, Any], training: Sequence[Mapping[str, Any]]
) -> dict[str, float | None]:
    """Training cost of the agent, and after how many jobs it has paid for itself.

    Break-even: training / ((trials to match - 1) x seconds of a run), with the searcher that
    needs the fewest trials; None where steering saves nothing.
    """
    seconds = float(sum(line.get("seconds") or 0 for line in training)) if training else None
    finite = [(m["median"]["point"], m["median"]["n_max"], name)
              for name, m in summary["match"].items() if m["median"]["n_max"]]  # fmt: skip
    if not seconds or not finite:
        return {"training_seconds": seconds, "run_seconds": None, "jobs": None}
    worth, most, name = min(finite)
    row = next(row for row in summary["methods"] if row["name"] == name)
    run = row["seconds"] / row["runs"]
    saved = (min(worth, most) - 1) * run
    jobs = math.ceil(seconds / saved) if saved > 0 else None
    return {"training_seconds": seconds, "run_seconds": run, "jobs": jobs}


def traces(
    outcomes: Iterable[Outcome], summary: Mapping[str, Any], steered: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """What was done in steered runs, one per task (the seed of median score), then Trainer runs.

    Each: name, note, steps, rate, loss; decisions as (step, label, guard); the reference's loss.
    ``steered``: each a ``summary.json`` with its ``curve`` and its ``decisions``, the audit log.
    """
    runs = list(outcomes)
    found = []
    for task in (task["name"] for task in summary["tasks"]):
        mine = [o for o in runs if o["method"] == summary["steered"] and o["task"] == task]
        mine = sorted((o for o in mine if o["trials"]), key=_score)
        if not mine:
            continue
        chosen = mine[(len(mine) - 1) // 2]
        other = next((o["trials"][0]["curve"] for o in runs if o["method"] == REFERENCE
                      and _cell(o) == _cell(chosen) and o["trials"]), ())  # fmt: skip
        curve = chosen["trials"][0]["curve"]
        starts = [0, *(point["step"] for point in curve)]
        note = f"median of {len(mine)} runs; seed {chosen['seed']}, "
        note += f"started at {chosen['start_rate']:.3g}"
        found.append({
            "name": task, "note": note, "label": "selection loss",
            "steps": starts[1:], "rate": [p["rate"] for p in curve],
            "loss": [p["selection_loss"] for p in curve],
            "other": other and [[p[k] for p in other] for k in ("step", "selection_loss")],
            "decisions": [(s, p["decision"], p["guard"])
                          for s, p in zip(starts, curve, strict=False) if p["decision"]],
        })  # fmt: skip
    for run in steered:
        curve = run["curve"]
        measured = [p for p in curve if p.get("validation_loss") is not None]
        key = "validation_loss" if measured else "train_loss"
        found.append({
            "name": Path(str(run.get("folder") or run["task"])).name,
            "label": key.replace("_", " "), "note": f"Trainer run, {run.get('mode', 'steered')}",
            "steps": [p["step"] for p in curve], "rate": [p["rate"] for p in curve],
            "loss": [math.nan if p.get(key) is None else p[key] for p in curve],
            "other": [],
            "decisions": [(a["step"], _label(a), a.get("guard") or "") for a in run["decisions"]],
        })  # fmt: skip
    return found


def _label(entry: Mapping[str, Any]) -> str:
    applied = entry["applied"]
    multiplier = 1.0 if applied.get("multiplier") is None else float(applied["multiplier"])
    return ("rollback" if applied.get("rollback") else "keep" if multiplier == 1
            else f"x{multiplier:.2g}")  # fmt: skip


def styles(summary: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each method, the same in every figure and table."""
    found: dict[str, tuple[str, str]] = {}
    for kind, marks in (("steered", "oDH"), ("search", "s^vPX*"), ("schedule", "<>dph8")):
        names = [r["name"] for r in summary["methods"] if r["kind"] == kind]
        for i, name in enumerate(n for n in names if n != REFERENCE):
            found[name] = COLOURS[kind][i % len(COLOURS[kind])], marks[i % len(marks)]
        found |= {name: (SOFT, "o") for name in names if name == REFERENCE}
    return found


def figures(
    summary: Mapping[str, Any],
    runs: Sequence[Mapping[str, Any]] = (),
    training: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Picture]:
    """Every figure by name; ``runs`` are `traces`, ``training`` the lines of ``train.jsonl``."""
    style, drawn = styles(summary), dict[str, Picture]()
    if style:
        drawn["final"] = _picture("final", "Test accuracy when the whole budget is spent",
            "; ".join(f"{r['name']} {spread(r['test'])}" for r in summary["methods"]),
            partial(_draw_final, summary=summary, style=style),
            height=0.9 + 0.3 * len(style))  # fmt: skip
        for key, title, curves in (
            ("quality", "All tasks", summary["curves"]),
            *((f"quality-{task['name']}", f"{task['name']}, {task['role']}", task["curves"])
              for task in summary["tasks"]),
        ):  # fmt: skip
            ends = ", ".join(f"{m} {percent(c['point'][-1])} % after {c['runs'][-1]:.3g} runs"
                             for m, c in curves.items())  # fmt: skip
            drawn[key] = _picture(
                key,
                title,
                f"Test accuracy against runs spent: {ends}",
                partial(_draw_quality, curves=curves, style=style),
                legend=True,
            )
    if summary["match"]:
        rows = 1 + len(summary["tasks"])
        drawn["match"] = _picture("match", "Trials that one steered run is worth",
            "; ".join(f"{name}: {trials(m['median'])} in the median task"
                      for name, m in summary["match"].items()),
            partial(_draw_match, summary=summary, style=style), legend=True,
            height=0.9 + rows * (0.2 + 0.13 * len(summary["match"])))  # fmt: skip
    for run in runs:
        turns = [label for _, label, _ in run["decisions"] if label != "keep"]
        drawn[f"steered-{run['name']}"] = _picture(f"steered-{run['name']}", run["name"],
            f"{run['note']}. {len(run['decisions'])} decisions: {', '.join(turns) or 'all keep'}.",
            partial(_draw_trace, run=run), height=4.4)  # fmt: skip
    if training:
        drawn["training"] = _picture("training", "Return of an episode while the tuner learns",
            f"Mean return {training[0].get('return_mean', math.nan):.3g} at first, "
            f"{training[-1].get('return_mean', math.nan):.3g} at the end.",
            partial(_draw_training, lines=training))  # fmt: skip
    return drawn


def _picture(name: str, title: str, alt: str, draw: Any, *, height: float = 3.6,
             legend: bool = False) -> Picture:  # fmt: skip
    """Drawn once; the page's copy takes its text and line colours from the style sheet."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    look = {
        "svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10, "font.family": "sans-serif",
        "axes.edgecolor": LINE, "axes.labelcolor": INK, "text.color": INK, "xtick.color": LINE,
        "ytick.color": LINE, "xtick.labelcolor": SOFT, "ytick.labelcolor": SOFT,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.color": LINE, "grid.linewidth": 0.6, "axes.axisbelow": True, "legend.frameon": False,
    }  # fmt: skip
    with rc_context(look):
        figure = Figure(figsize=(5.6, height), layout="constrained")
        draw(figure)
        text, binary = io.StringIO(), io.BytesIO()
        figure.savefig(text, format="svg", transparent=True)
        if legend:
            entries = figure.axes[0].get_legend_handles_labels()
            figure.legend(*entries, loc="outside lower center", ncols=3, fontsize=8)
        figure.suptitle(title, fontsize=11, x=0.02, ha="left")
        figure.savefig(binary, format="png", dpi=160, facecolor="white")
    return Picture(title, alt, _inline(text.getvalue(), name, alt), binary.getvalue())


def _inline(svg: str, name: str, alt: str) -> str:
    """An SVG file as an element of a page: own names, no address, colours of the page."""
    prefix = re.sub(r"\W+", "-", name)
    svg = re.sub(r"<(metadata|style).*?</\1>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| (width|height)="[^"]*pt"', "", svg)
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r"(font:[^;\"]*?px)[^;\"]*|font-family:[^;\"]*;?", r"\1", svg)
    for colour, variable in ((INK, "ink"), (SOFT, "soft"), (LINE, "line")):
        svg = svg.replace(colour, f"var(--{variable})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(alt)}"', 1)


def _axis(axes: Any, *, runs: bool = False, rate: bool = False) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    plain = FuncFormatter(lambda value, _: f"{value:g}")
    if runs:
        if axes.get_xlim()[1] > 6:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(plain)
    if rate:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(plain)


def _draw_final(figure: Any, summary: Mapping[str, Any], style: Mapping[str, Any]) -> None:
    axes = figure.add_subplot()
    rows = summary["methods"][::-1]
    for y, row in enumerate(rows):
        low, point, high = (100 * row["test"][key] for key in ("low", "point", "high"))
        colour, mark = style[row["name"]]
        if row["name"] == summary["steered"]:
            axes.axvspan(low, high, color=colour, alpha=0.10, lw=0)
        axes.plot([low, high], [y, y], color=colour, lw=2.2, solid_capstyle="round")
        axes.plot([point], [y], mark, color=colour, ms=7)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], color=INK)
    axes.set(xlabel="test accuracy, %", ylim=(-0.6, len(rows) - 0.4))
    axes.grid(visible=False, axis="y")


def _draw_quality(figure: Any, curves: Mapping[str, Any], style: Mapping[str, Any]) -> None:
    axes = figure.add_subplot()
    singles = [name for name, curve in curves.items() if len(curve["runs"]) == 1]
    for name, curve in list(curves.items())[::-1]:
        colour, mark = style[name]
        low, point, high = (100 * np.array(curve[key]) for key in ("low", "point", "high"))
        if name not in singles:
            axes.fill_between(curve["runs"], low, high, color=colour, alpha=0.09, lw=0, step="post")
            axes.plot(curve["runs"], point, color=colour, marker=mark, ms=4, lw=1.6, label=name,
                      drawstyle="steps-post", markevery=max(1, len(point) // 6))  # fmt: skip
            continue
        # Side by side: most of them spend exactly one run.
        x = np.array(curve["runs"]) * 1.035 ** (singles.index(name) - (len(singles) - 1) / 2)
        mine = colour == MINE
        axes.errorbar(x, point, [point - low, high - point], fmt=mark, color=colour, label=name,
                      ms=8 if mine else 5, elinewidth=1.2, zorder=4 if mine else 3)  # fmt: skip
        if mine:
            axes.axhline(point[0], color=colour, lw=1, ls=(0, (4, 3)), zorder=1)
    ends = [100 * curve["point"][-1] for curve in curves.values()]
    floor, top = min(ends), max(100 * max(curve["high"]) for curve in curves.values())
    if all(map(math.isfinite, (floor, top))) and top > floor:
        axes.set_ylim(floor - 0.35 * (top - floor), top + 0.08 * (top - floor))
    axes.set(xlabel="runs spent", ylabel="test accuracy, %")
    _axis(axes, runs=True)


def _draw_match(figure: Any, summary: Mapping[str, Any], style: Mapping[str, Any]) -> None:
    axes = figure.add_subplot()
    names = [task["name"] for task in summary["tasks"]][::-1]
    for i, (search, match) in enumerate(summary["match"].items()):
        colour, mark = style[search]
        found = match["tasks"] | {"median task": match["median"]}
        for y, number in enumerate(found.get(name) for name in (*names, "median task")):
            if not number or not number["n_max"]:
                continue
            most, place = number["n_max"], y + 0.16 * ((len(summary["match"]) - 1) / 2 - i)
            low, point, high = (min(number[k], most * 1.15) for k in ("low", "point", "high"))
            axes.plot([low, high], [place, place], color=colour, lw=2, solid_capstyle="round")
            axes.plot([point], [place], mark, color=colour, ms=6, label=search if not y else None)
            if high > most:
                axes.plot([high], [place], ">", color=colour, ms=5)
    axes.set_xscale("log")
    axes.set_xlim(left=0.9)
    axes.set_yticks(range(len(names) + 1), [*names, "median task"], color=INK)
    axes.axhline(len(names) - 0.5, color=LINE, lw=1)
    axes.set(xlabel="trials (an arrow: more than were tried)", ylim=(-0.6, len(names) + 0.6))
    axes.grid(visible=False, axis="y")
    _axis(axes, runs=True)


def _draw_trace(figure: Any, run: Mapping[str, Any]) -> None:
    loss, rate = figure.subplots(2, sharex=True, height_ratios=(1.0, 1.15))
    if run["other"]:
        loss.plot(*run["other"], color=SOFT, lw=1.4, alpha=0.8, label=REFERENCE)
    measured = [(s, x) for s, x in zip(run["steps"], run["loss"], strict=True) if math.isfinite(x)]
    loss.plot(*zip(*measured, strict=True), color=MINE, lw=1.8, label="steered")
    loss.legend(fontsize=8, loc="upper right")
    loss.set_ylabel(run["label"])
    rate.step([0, *run["steps"]], [*run["rate"][:1], *run["rate"]], where="pre", color=INK, lw=1.3)
    rate.set(ylabel="learning rate", xlabel="step")
    for step, label, guard in run["decisions"]:
        after = next((r for s, r in zip(run["steps"], run["rate"], strict=True) if s > step), None)
        height = after if after is not None else run["rate"][-1]
        factor = re.fullmatch(r"x([\d.e+-]+)", label)
        up = factor is not None and float(factor[1]) > 1
        mark = "." if label == "keep" else "X" if label == "rollback" else "D"
        mark = mark if factor is None else "^" if up else "v"
        colour = "#8467c9" if label == "rollback" else SOFT if mark == "." else MINE
        rate.plot([step], [height], mark, color=colour, ms=8 if mark == "X" else 6)
        if label == "rollback":
            for axes in (loss, rate):
                axes.axvline(step, color=colour, lw=1, ls=":")
        if guard:
            rate.plot([step], [height], "o", color=CARE, ms=13, mfc="none", mew=1.8)
        if label != "keep":  # Beside the step that led here.
            rate.annotate(f"{label}{' (guard)' if guard else ''}", (step, height), fontsize=7.5,
                          xytext=(0, 9) if up else (5, 5), textcoords="offset points",
                          ha="center" if up else "left", color=INK)  # fmt: skip
    _axis(rate, rate=True)
    rate.margins(y=0.28)


def _draw_training(figure: Any, lines: Sequence[Mapping[str, Any]]) -> None:
    axes = figure.add_subplot()
    x = np.cumsum([line.get("decisions") or 0 for line in lines])
    low, mean, high = (
        np.array([line.get(key) for line in lines], dtype=float)
        for key in ("return_low", "return_mean", "return_high")
    )
    axes.fill_between(x, low, high, color=CALM, alpha=0.15, lw=0)
    axes.plot(x, mean, color=CALM, lw=1.8)
    axes.set(xlabel="decisions", ylabel="return (gain in log loss)")


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
) -> dict[str, Any]:
    """Write ``report.html``, ``summary.json`` and ``figures/*.png`` in a folder -> the summary."""
    runs = list(outcomes)
    summary = summarise(runs, training)
    pictures = figures(summary, traces(runs, summary, steered), training)
    for name, picture in pictures.items():
        file = re.sub(r"[^\w.-]+", "-", name)
        write_atomic(folder / "figures" / f"{file}.png", picture.png)
    page = render(summary, pictures, provenance(runs) | dict(facts or {}))
    write_atomic(folder / "report.html", page.encode())
    text = json.dumps(_finite(summary), indent=1, allow_nan=False) + "\n"
    write_atomic(folder / "summary.json", text.encode())
    return summary


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null; for trials to match, ``n_max`` tells which."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
