"""Show: the evaluations as a table and as a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation import gain, interval
from rich.console import Console
from rich.table import Table

NAMES = {"rater": "the rater that was asked", "second": "a second rater, never asked"}
COLORS = {"rater": "#2a6f97", "second": "#c8553d"}


def table(found: Sequence[dict[str, Any]]) -> str:
    """One line a round; the first is the start."""
    grid = Table(title="Held-out prompts: mean score, 95 % interval over prompts")
    for title in ("", *NAMES.values(), "gain on the start", "repeats", "vocabulary", "nats"):
        grid.add_column(title, justify="right")
    for place, each in enumerate(found):
        first, scores = found[0]["scores"]["rater"], each["scores"]
        cells = [_interval(interval(scores[name])) for name in NAMES]
        cells.append(_interval(gain(first, scores["rater"])) if place else "")
        cells += [f"{each['repeats']:.2f}", f"{each['vocabulary']:,}", f"{each['nats']:.2f}"]
        grid.add_row(f"round {place}" if place else "start", *cells)
    console = Console(width=120)
    with console.capture() as capture:
        console.print(grid)
    return capture.get()


def plot(found: Sequence[dict[str, Any]], out: Path) -> None:
    """``reward.svg`` and ``reward.png``: the judges' mean scores, and what they do not see."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(8.4, 3.6), width_ratios=(3, 2), layout="constrained"
    )
    rounds = range(len(found))
    for place, (name, label) in enumerate(NAMES.items()):
        points = [interval(each["scores"][name]) for each in found]
        means = [mean for mean, _, _ in points]
        arms = [[m - low for m, low, _ in points], [high - m for m, _, high in points]]
        at = [n + 0.06 * (place - 0.5) for n in rounds]
        left.errorbar(at, means, arms, color=COLORS[name], marker="os"[place], markersize=5,
                      linewidth=1.6, capsize=3, label=label)  # fmt: skip
    left.set_ylabel("mean score (−4 to 4)")
    left.set_title("What judges make of the answers", fontsize=11, loc="left")
    left.legend(frameon=False, fontsize=9)
    right.plot(rounds, [each["repeats"] for each in found], color="#555555", marker="D",
               markersize=5, linewidth=1.6)  # fmt: skip
    right.set_ylim(bottom=0)
    right.set_ylabel("share of words")
    right.set_title("Words said before in the answer", fontsize=11, loc="left")
    for axes in (left, right):
        axes.set_xticks(list(rounds), ["start", *(str(n) for n in rounds if n)])
        axes.set_xlabel("round")
        axes.spines[["top", "right"]].set_visible(False)
    for kind in ("svg", "png"):
        figure.savefig(out / f"reward.{kind}", dpi=130)
    pyplot.close(figure)


def _interval(value: tuple[float, float, float]) -> str:
    return "{:+.2f} ({:+.2f} to {:+.2f})".format(*value)
