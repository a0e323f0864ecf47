"""Plots: the cost of a run-step against pack size, width and length, as small SVG files."""

import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

INK, SOFT, LINE = "#30343a", "#767c85", "#d8dce1"
COLOURS = {"Trainer": "#93703a", "TorchJob": "#2b7fb8", "Pack": "#d9482b",
           "Pack, eager": "#e9a23b"}  # fmt: skip
STYLE = {
    "svg.fonttype": "path", "svg.hashsalt": "steersman", "font.size": 9, "axes.edgecolor": LINE,
    "axes.labelcolor": INK, "xtick.color": SOFT, "ytick.color": SOFT, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": LINE, "grid.linewidth": 0.5,
}  # fmt: skip
BASE = {"width": 32, "tokens": 16, "batch": 16}  # where a plot does not vary it


class Point(NamedTuple):
    """One measured side: ms of a run-step with quartiles, and where it stands."""

    engine: str
    runs: int
    width: int
    tokens: int
    middle: float
    low: float
    high: float


class Plot(NamedTuple):
    """A finished plot, or why there is none yet."""

    name: str
    title: str
    missing: str | None


def points(results: Mapping[str, Any]) -> list[Point]:
    """Every full fine-tuning step of a shipped encoder among the results."""
    found = {}
    for case in results.values():
        for side in case["sides"].values():
            seconds = side.get("seconds")
            tiny = str(side.get("model", "")).startswith("tiny-")
            if not tiny or side.get("adapter") != "full" or not isinstance(seconds, Mapping):
                continue
            if side["batch"] != BASE["batch"] or side["trainable_layers"] is not None:
                continue
            if side["pooling"] != "first":
                continue
            place = (side["engine"], side["runs"], side["width"], side["tokens"])
            low, high = seconds["quartiles"]
            found[place] = Point(*place, *(1e3 * x for x in (seconds["median"], low, high)))
    return sorted(found.values())


def draw(results: Mapping[str, Any], folder: Path) -> list[Plot]:
    """Draw what can be drawn into the folder; a plot without two points is missing."""
    known = points(results)
    at_width = [p for p in known if p.width == BASE["width"]]
    return [
        _one("pack-size", "runs in the pack", at_width, folder, lambda p: p.runs,
             lambda p: p.tokens == BASE["tokens"], "Pack"),
        _one("width", "width of the encoder", _best(known), folder, lambda p: p.width,
             lambda p: p.tokens == BASE["tokens"]),
        _one("length", "tokens in a row", _best(at_width), folder, lambda p: p.tokens,
             lambda p: True),
    ]  # fmt: skip


def _best(known: Iterable[Point]) -> list[Point]:
    """Of several pack sizes at one place, the fastest."""
    found: dict[tuple[str, int, int], Point] = {}
    for point in known:
        place = (point.engine, point.width, point.tokens)
        if place not in found or point.middle < found[place].middle:
            found[place] = point
    return list(found.values())


def _one(
    name: str,
    label: str,
    known: Iterable[Point],
    folder: Path,
    across: Callable[[Point], int],
    here: Callable[[Point], bool],
    varying: str | None = None,
) -> Plot:
    """One plot, a line for each engine. varying: the engine that must have two points."""
    title = f"Cost of a run-step against the {label}"
    lines: dict[str, list[Point]] = {}
    for point in known:
        if here(point):
            lines.setdefault(point.engine, []).append(point)
    most = len(lines.get(varying, ())) if varying else max(map(len, lines.values()), default=0)
    path = folder / f"{name}.svg"
    if most < 2:
        path.unlink(missing_ok=True)
        return Plot(name, title, "not measured")
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(4.6, 3.0))
        for engine, row in lines.items():
            row.sort(key=across)
            _line(axes, engine, row, across, varying is not None and len(row) == 1)
        places = sorted({across(p) for row in lines.values() for p in row})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(places, [str(x) for x in places])
        axes.minorticks_off()
        _ticks(axes, [p for row in lines.values() for p in row])
        axes.set_xlabel(label)
        axes.set_ylabel("ms a run-step, one core (log scale)")
        axes.legend(frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
    path.write_bytes(b"\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + b"\n")
    return Plot(name, title, None)


def _line(
    axes: Any, engine: str, row: list[Point], across: Callable[[Point], int], level: bool
) -> None:
    """Medians with quartiles; an engine measured at one place alone is a level to compare with."""
    colour = COLOURS[engine]
    if level:
        axes.axhline(row[0].middle, color=colour, linestyle="--", linewidth=1, label=engine)
        return
    middle = [p.middle for p in row]
    errors = [[p.middle - p.low for p in row], [p.high - p.middle for p in row]]
    axes.errorbar([across(p) for p in row], middle, errors, color=colour, marker="o",
                  markersize=4, linewidth=1.4, capsize=2, label=engine)  # fmt: skip


def _ticks(axes: Any, every: list[Point]) -> None:
    """Round numbers on a logarithmic axis, as plain decimals."""
    low, high = min(p.low for p in every) * 0.8, max(p.high for p in every) * 1.25
    round_ones = [m * 10.0**e for e in range(-3, 5) for m in (1, 1.5, 2, 3, 4, 5, 7)]
    axes.set_ylim(low, high)
    shown = [t for t in round_ones if low <= t <= high]
    axes.set_yticks(shown, [f"{t:g}" for t in shown])
