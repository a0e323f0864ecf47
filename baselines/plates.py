"""Plates: the pictures of a suite's evidence, as SVG files."""

import io
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from baselines.figures import INK, LINE, MINE, SOFT, draw_match, draw_quality, look, styles

Evidence = Mapping[str, Any]  # of one suite, as `baselines.evidence.measure` makes it
Style = Mapping[str, tuple[str, str]]


class Plate(NamedTuple):
    """A finished picture."""

    title: str
    svg: bytes


def draw(suite: Evidence) -> dict[str, Plate]:
    """Every picture that the figures of a suite suffice for, by name."""
    style, drawn = styles(suite), dict[str, Plate]()
    legend = 0.22 * -(-len(style) // 3)
    if any(match["median"]["n_max"] for match in suite["match"].values()):
        rows = 1 + len(suite["tasks"])
        drawn["match"] = _plate(
            "Trials that one steered run is worth",
            partial(draw_match, summary=suite, style=style),
            0.9 + rows * (0.2 + 0.08 * len(suite["match"])) + 0.22 * -(-len(suite["match"]) // 3),
            legend=True,
        )
    if suite["match"]:
        drawn["quality"] = _plate(
            "Test accuracy against spent budget",
            partial(draw_quality, curves=suite["curves"], style=style),
            3.4 + legend,
            legend=True,
        )
    if suite["normalised"]:
        drawn["profiles"] = _plate(
            "Performance profiles",
            partial(draw_profiles, scores=suite["normalised"], style=style),
            3.4 + legend,
            legend=True,
        )
    if suite["ranks"]:
        drawn["ranks"] = _plate(
            "Mean ranks, and who does not differ",
            partial(draw_ranks, ranks=suite["ranks"], style=style),
            0.9 + 0.26 * len(suite["ranks"]["methods"]),
        )
    return drawn


def _plate(
    title: str, paint: Callable[[Any], None], height: float, *, legend: bool = False
) -> Plate:
    """Drawn alike whenever it is drawn: no date, names from the title."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    with rc_context(look(title)):
        figure = Figure(figsize=(5.6, height), layout="constrained")
        paint(figure)
        if legend:
            entries = figure.axes[0].get_legend_handles_labels()
            figure.legend(*entries, loc="outside lower center", ncols=3, fontsize=8)
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None})
    short = re.sub(rb"(\d+\.\d\d)\d+", rb"\1", buffer.getvalue())  # hundredths of a point
    lines = (line.rstrip() for line in short.splitlines())
    return Plate(title, b"\n".join(lines) + b"\n")


def draw_profiles(figure: Any, scores: Evidence, style: Style) -> None:
    """Shares of runs above each normalised score (Agarwal et al. 2021)."""
    axes = figure.add_subplot()
    for name, profile in reversed(list(scores["profiles"].items())):
        colour, mark = style[name]
        mine = colour == MINE
        axes.plot(scores["taus"], [100 * share for share in profile], color=colour, marker=mark,
                  ms=4, markevery=10, lw=2.4 if mine else 1.2, label=name,
                  zorder=4 if mine else 3)  # fmt: skip
    axes.set(xlabel="normalised score (0: the user's own schedule, 1: the oracle)",
             ylabel="runs above it, %", ylim=(0, 101))  # fmt: skip


def draw_ranks(figure: Any, ranks: Evidence, style: Style) -> None:
    """Best on top; a bar at the right joins methods that do not differ."""
    axes = figure.add_subplot()
    names = list(ranks["methods"])
    for y, name in enumerate(names):
        colour, mark = style[name]
        axes.plot([1, ranks["methods"][name]], [y, y], color=LINE, lw=1)
        axes.plot([ranks["methods"][name]], [y], mark, color=colour, ms=7)
    for i, group in enumerate(ranks["cliques"] or []):
        places = [names.index(name) for name in group]
        x = len(names) + 0.4 + 0.25 * (i % 8)
        axes.plot([x, x], [min(places), max(places)], color=INK, lw=2.2, solid_capstyle="round")
    axes.set_yticks(range(len(names)), names, color=INK)
    few = "" if ranks["cliques"] is not None else ",\ntoo few to tell methods apart"
    axes.set(xlabel=f"mean rank over {ranks['blocks']} cells, 1 is the best{few}", xlim=(0.8, None),
             ylim=(len(names) - 0.4, -0.6))  # fmt: skip
    axes.axvline((1 + len(names)) / 2, color=SOFT, lw=0.8, ls=":")
    axes.grid(visible=False, axis="y")
