"""Figures of a comparison: its numbers as a reader sees them, drawn or in words."""

import html
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from baselines import stats

Outcome = Mapping[str, Any]
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


def traces(
    outcomes: Iterable[Outcome],
    summary: Mapping[str, Any],
    steered: Sequence[Mapping[str, Any]],
    score: Callable[[Outcome], float],
) -> list[dict[str, Any]]:
    """What was done in steered runs, one per task (the seed of median score), then Trainer runs.

    Each: name, note, steps, rate, loss; decisions as (step, label, guard); the reference's loss.
    ``steered``: each a ``summary.json`` with its ``curve`` and its ``decisions``, the audit log.
    ``score`` of an outcome is what the median is taken of.
    """
    runs = list(outcomes)
    cell = ("task", "seed", "start_rate")  # the same for every method
    found = []
    for task in (task["name"] for task in summary["tasks"]):
        mine = [o for o in runs if o["method"] == summary["steered"] and o["task"] == task]
        mine = sorted((o for o in mine if o["trials"]), key=score)
        if not mine:
            continue
        chosen = mine[(len(mine) - 1) // 2]
        other = next((o["trials"][0]["curve"] for o in runs if o["method"] == summary["reference"]
                      and o["trials"] and all(o[k] == chosen[k] for k in cell)), ())  # fmt: skip
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
        for i, name in enumerate(n for n in names if n != summary["reference"]):
            lap, colours = i // len(COLOURS[kind]), COLOURS[kind]  # a second lap has other marks
            found[name] = colours[i % len(colours)], marks[(i + lap) % len(marks)]
        found |= {name: (SOFT, "o") for name in names if name == summary["reference"]}
    return found


def draw_all(
    summary: Mapping[str, Any],
    runs: Sequence[Mapping[str, Any]] = (),
    training: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Picture]:
    """Every figure by name; ``runs`` are `traces`, ``training`` the lines of ``train.jsonl``."""
    style, drawn = styles(summary), dict[str, Picture]()
    if style:
        drawn["final"] = picture("final", "Test accuracy when the whole budget is spent",
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
            drawn[key] = picture(
                key,
                title,
                f"Test accuracy against runs spent: {ends}",
                partial(draw_quality, curves=curves, style=style),
                legend=True,
            )
    if summary["match"]:
        rows = 1 + len(summary["tasks"])
        drawn["match"] = picture("match", "Trials that one steered run is worth",
            "; ".join(f"{name}: {trials(m['median'])} in the median task"
                      for name, m in summary["match"].items()),
            partial(draw_match, summary=summary, style=style), legend=True,
            height=0.9 + rows * (0.2 + 0.13 * len(summary["match"])))  # fmt: skip
    for run in runs:
        turns = [label for _, label, _ in run["decisions"] if label != "keep"]
        drawn[f"steered-{run['name']}"] = picture(f"steered-{run['name']}", run["name"],
            f"{run['note']}. {len(run['decisions'])} decisions: {', '.join(turns) or 'all keep'}.",
            partial(_draw_trace, run=run, reference=summary["reference"]), height=4.4)  # fmt: skip
    if training:
        drawn["training"] = picture("training", "Return of an episode while the tuner learns",
            f"Mean return {training[0].get('return_mean', math.nan):.3g} at first, "
            f"{training[-1].get('return_mean', math.nan):.3g} at the end.",
            partial(_draw_training, lines=training))  # fmt: skip
    return drawn


def look(name: str) -> dict[str, Any]:
    """How a figure of that name is drawn."""
    return {
        "svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10, "font.family": "sans-serif",
        "axes.edgecolor": LINE, "axes.labelcolor": INK, "text.color": INK, "xtick.color": LINE,
        "ytick.color": LINE, "xtick.labelcolor": SOFT, "ytick.labelcolor": SOFT,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.color": LINE, "grid.linewidth": 0.6, "axes.axisbelow": True, "legend.frameon": False,
    }  # fmt: skip


def picture(name: str, title: str, alt: str, draw: Any, *, height: float = 3.6,
             legend: bool = False) -> Picture:  # fmt: skip
    """Drawn once; the page's copy takes its text and line colours from the style sheet."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(look(name)):
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


def draw_quality(figure: Any, curves: Mapping[str, Any], style: Mapping[str, Any]) -> None:
    """The best so far against runs spent; single runs side by side at what they cost."""
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


def draw_match(figure: Any, summary: Mapping[str, Any], style: Mapping[str, Any]) -> None:
    """Trials to match in each task and in the median one."""
    axes = figure.add_subplot()
    names = [task["name"] for task in summary["tasks"]][::-1]
    step = min(0.16, 0.8 / max(1, len(summary["match"])))
    for i, (search, match) in enumerate(summary["match"].items()):
        colour, mark = style[search]
        found = match["tasks"] | {"median task": match["median"]}
        for y, number in enumerate(found.get(name) for name in (*names, "median task")):
            if not number or not number["n_max"]:
                continue
            most, place = number["n_max"], y + step * ((len(summary["match"]) - 1) / 2 - i)
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


def _draw_trace(figure: Any, run: Mapping[str, Any], reference: str | None) -> None:
    loss, rate = figure.subplots(2, sharex=True, height_ratios=(1.0, 1.15))
    if run["other"]:
        loss.plot(*run["other"], color=SOFT, lw=1.4, alpha=0.8, label=reference)
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
