"""Page: docs/performance.md with its plots, from results/*.json alone.

    python benchmarks/page.py

Nothing is measured here; a figure that the results lack is called "not measured".
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from claims import CLAIMS, Claim
from plots import draw
from record import RESULTS

DOCS = Path(__file__).parent.parent / "docs"
UNITS = {"x": "x", "share": " %", "points": " points", "a second": " a second", "ms": " ms"}
HEAD = """# Performance

`make bench` (with `DACBENCH=` an interpreter that has dacbench) measures everything here;
`python benchmarks/page.py` makes this page of `benchmarks/results/speed.json` alone. Every side of
a comparison runs in a fresh process with one thread; the sides take turns, round after round and in
alternating order, so that whatever else the machine does hits all alike. A figure is worked out
within each round; given are its median over the rounds and, in brackets, its quartiles. Times on a
processor are processor time of the one thread, which leaves out what other programs took; on a GPU
they are of the wall clock.
"""
ROOFLINE = """## Where the time of a packed step goes

The floors of one update of one run: its matrix products at the rate that batched products of
those sizes reach here, and the bytes it must move. The bytes are those of AdamW (nine trips for
each weight that the run's rows can reach) and of the activations (out and back, forward and
backward); how long they take lies between the speed of memory and that of the cache, according to
how much of the pack stays near. The rest is what the best pack takes beyond its products and its
bytes at the speed of the cache: waiting for memory, small operations (norms, softmax, GELU,
masks), traffic that could be avoided, and Python.
"""

TRUNK = """## Frozen trunk

MiniLM-L6 with all but its last layer and head frozen. A decision is 6 updates and the scores of
128 and 256 rows, as an environment asks for them.
"""
MEMORY = """## Memory

Peak of a fresh process over three intervals, each with two scores, less what it had after loading
libraries, texts and encoder.
"""
ELSEWHERE = """## Measured elsewhere

`make bench` also runs `env_overhead.py`, `callback_overhead.py` and `demo.py` of this folder. Not
part of it, as it takes minutes: `python benchmarks/surrogate_transfer.py`, whether what is learned
on the surrogate is worth anything on real runs.
"""


def page(results: Mapping[str, Any], docs: Path) -> str:
    """The page's text; its plots are written to ``docs/performance``."""
    parts = [HEAD, "## Figures", figures(results), machines(results), "## Cost of a run-step"]
    for plot in draw(results, docs / "performance"):
        picture = f"![{plot.title}](performance/{plot.name}.svg)"
        parts.append(f"{plot.title}: {plot.missing}." if plot.missing else picture)
    parts += ["Bars are quartiles. The head reads the first token; width 32 and 16 rows of 16 "
              "tokens where not varied; of several pack sizes the fastest is drawn.",
              costs(results), ROOFLINE, roofline(results), trunk(results),
              memory(results), dacbench(results), ELSEWHERE]  # fmt: skip
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def figures(results: Mapping[str, Any]) -> str:
    """The table of claims: bar, figure, how it was measured."""
    known = {name: figure for case in results.values() for name, figure in case["figures"].items()}
    rows = []
    for claim in CLAIMS.values():
        figure = known.get(claim.name)
        shown = "not measured" if figure is None else number(claim, figure)
        rows.append((claim.what, bound(claim), shown, claim.how))
    return table(("what", "bar", "figure", "how"), rows)


def bound(claim: Claim) -> str:
    """A bar in words."""
    if claim.bar is None:
        return ""
    side = "at least" if claim.better == "higher" else "at most"
    return f"{side} {100 * claim.bar if claim.unit == 'share' else claim.bar:,g}{UNITS[claim.unit]}"


def number(claim: Claim, figure: Mapping[str, Any]) -> str:
    """A figure with its quartiles, and a word if it misses its bar."""
    low, high = figure["quartiles"]
    middle, low, high = (amount(claim, x) for x in (figure["median"], low, high))
    shown = f"{middle}{UNITS[claim.unit]} ({low} to {high})"
    return shown if claim.holds(figure["median"]) is not False else f"**{shown}: missed**"


def amount(claim: Claim, value: float) -> str:
    """A value in the claim's unit, which is left out."""
    if claim.unit == "share":
        return f"{100 * value:.1f}"
    if claim.unit == "points":
        return f"{value:.1f}"
    if claim.unit == "a second":
        return f"{value:,.0f}"
    if claim.unit == "ms":
        return f"{value:.2g}"
    return f"{value:.3g}" if abs(value - 1) > 0.1 else f"{value:.3f}"


def machines(results: Mapping[str, Any]) -> str:
    """What each case was measured on."""
    rows = []
    for name, case in results.items():
        hardware, versions, load = case["hardware"], case["versions"], case["load"]
        device = hardware["gpu"] or hardware["cpu"]
        known = ", ".join(f"{key} {versions[key]}" for key in ("python", "torch", "transformers"))
        busy = f"{load['before']:g} to {load['after']:g} of {hardware['cores']}"
        rows.append((name, device, busy, str(case["rounds"]), known))
    if not rows:
        return ""
    return table(("case", "machine", "load (other work included)", "rounds", "versions"), rows)


def costs(results: Mapping[str, Any]) -> str:
    """Every measured step, in ms."""
    rows = []
    for case in results.values():
        for side in case["sides"].values():
            if "engine" not in side or not isinstance(side.get("seconds"), Mapping):
                continue
            low, high = side["seconds"]["quartiles"]
            trained = side["adapter"] if side["adapter"] != "full" else "all"
            layers = side["trainable_layers"]
            trained = f"head and {layers} layer" if layers is not None else trained
            time = f"{ms(side['seconds']['median'])} ({ms(low)} to {ms(high)})"
            rows.append((side["engine"], str(side["runs"]), side["model"], trained,
                         f"{side['batch']} x {side['tokens']}", side["pooling"], time))  # fmt: skip
    head = ("engine", "runs", "model", "trained", "rows x tokens", "head reads", "ms a run-step")
    return table(head, rows) if rows else "Steps: not measured."


def ms(seconds: float) -> str:
    """Three significant digits of ms."""
    return f"{1e3 * seconds:.3g}"


def roofline(results: Mapping[str, Any]) -> str:
    """The floors at each width beside the measured steps."""
    if "roofline" not in results:
        return "Roofline: not measured."
    sides = results["roofline"]["sides"]
    machine = sides["machine"]
    speed, cache = (machine[key]["median"] for key in ("copy_256_mb", "copy_1_mb"))
    lines = [
        f"One thread of this machine: {machine['sgemm_1024']['median']:.0f} GFLOP/s in a product "
        f"of two matrices of 1024 by 1024; {speed:.1f} GB/s (read and written) copying 256 MB, "
        f"{cache:.1f} GB/s copying 1 MB."
    ]
    rows = []
    for side in sides.values():
        if "flop" not in side:
            continue
        flop, moved = _value(side["flop"]), _value(side["bytes"])
        rates = [side[key]["median"] for key in ("bmm_square", "bmm_wide", "bmm_attention")]
        compute = 1e3 * flop / (1e9 * min(rates[:2]))
        memory, near = (1e3 * moved / (1e9 * gb) for gb in (speed, cache))
        best = fastest(results, side["width"], "Pack")
        alone = fastest(results, side["width"], "TorchJob")
        rest = "not measured" if best is None else f"{1e3 * best - compute - near:.2f}"
        rows.append((
            str(side["width"]), f"{flop / 1e6:.0f}", f"{moved / 1e6:.1f}",
            " / ".join(f"{rate:.0f}" for rate in rates), f"{compute:.2f}",
            f"{memory:.2f} / {near:.2f}",
            "not measured" if best is None else ms(best), rest,
            "not measured" if alone is None else ms(alone),
        ))  # fmt: skip
    head = ("width", "MFLOP", "MB", "bmm GFLOP/s: square / wide / attention", "products, ms",
            "bytes, ms: memory / cache", "best pack, ms", "the rest, ms",
            "TorchJob, ms")  # fmt: skip
    return "\n\n".join([*lines, table(head, rows)])


def fastest(results: Mapping[str, Any], width: int, engine: str) -> float | None:
    """Seconds of a run-step of 16 rows of 16 tokens; None if it was not measured."""
    found = [
        side["seconds"]["median"]
        for case in results.values()
        for side in case["sides"].values()
        if side.get("engine") == engine and side.get("model") == f"tiny-{width}"
        and (side["batch"], side["tokens"]) == (16, 16) and side["adapter"] == "full"
        and side["pooling"] == "first"
    ]  # fmt: skip
    return min(found, default=None)


def dacbench(results: Mapping[str, Any]) -> str:
    """What was compared with DACBench."""
    if "dacbench" not in results:
        return "DACBench: not measured."
    sides = results["dacbench"]["sides"]
    rows = [
        (name, side["model"], f"{_value(side['parameters']):,.0f}",
         f"{side['updates_a_step']} updates, {side['evaluated_rows_a_step']} rows evaluated",
         f"{_value(side['bare_ms_an_update']):.2f}", f"{_value(side['ratio']):.3f}x")
        for name, side in sides.items()
    ]  # fmt: skip
    version = sides["dacbench-epochs"]["dacbench"]
    text = (
        f"## DACBench\n\nDACBench {version} steps its SGD environment as shipped (torchvision's "
        "data set, PyTorch's loader) on random images in a temporary folder; its model is an "
        "encoder of the size of ours whose tokens are pixels. Each bare loop makes the same "
        "updates and evaluates the same number of rows in the same batches, from memory. "
        "Processor time, by turns in one process."
    )
    head = ("side", "model", "parameters", "a step is", "bare loop, ms an update", "over it")
    return f"{text}\n\n{table(head, rows)}"


def trunk(results: Mapping[str, Any]) -> str:
    """Every way to fine-tune the last layer, in ms."""
    if "trunk" not in results:
        return "Frozen trunk: not measured."
    sides = results["trunk"]["sides"]
    rows = [
        (side["engine"], str(side["runs"]), side["pooling"], ms(_value(side["seconds"])),
         ms(_value(side["decision"])),
         f"{_value(side['prepared']):.1f}" if "prepared" in side else "")
        for side in sides.values()
    ]  # fmt: skip
    head = ("engine", "runs", "head reads", "ms an update of a run", "ms a decision of a run",
            "s once for all runs")  # fmt: skip
    return f"{TRUNK}\n{table(head, rows)}"


def memory(results: Mapping[str, Any]) -> str:
    """What packs take beside what was predicted."""
    if "memory" not in results:
        return "Memory: not measured."
    rows = [
        (str(side["width"]), str(side["runs"]),
         f"{_value(side['megabytes']):.1f}", f"{_value(side['predicted']):.1f}",
         f"{100 * (_value(side['megabytes']) / _value(side['predicted']) - 1):+.1f} %")
        for side in results["memory"]["sides"].values()
    ]  # fmt: skip
    head = ("width", "runs", "MB taken", "MB predicted", "apart")
    return f"{MEMORY}\n{table(head, rows)}"


def _value(entry: Any) -> float:
    return float(entry["median"] if isinstance(entry, Mapping) else entry)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Write the page."""
    path = RESULTS / "speed.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    (DOCS / "performance.md").write_text(page(results, DOCS))
    print(DOCS / "performance.md")


if __name__ == "__main__":
    main()
