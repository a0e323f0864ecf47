"""Speed: every case in fresh processes, by turns; the figures go to results/speed.json.

    python benchmarks/speed.py [--only NAME ...] [--rounds N] [--dacbench-python PATH]

Cases that are not measured keep the figures they have. `page.py` makes a page of them.
"""

import argparse
import os
from collections.abc import Sequence

import harness
import torch
from cases import cases
from claims import CLAIMS
from harness import Broken, Case
from record import merge
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

SEED = 0  # of every run; the rounds repeat it, so that they differ by the machine alone


def measure(case: Case, count: int, progress: Progress) -> list[str]:
    """Measure one case and write it. Returns its figures in words."""
    bar = progress.add_task(case.name, total=count * len(case.sides), side="")
    load = os.getloadavg()[0]
    found = harness.rounds(
        case, count, before=lambda name: progress.update(bar, side=name),
        after=lambda: progress.advance(bar),
    )  # fmt: skip
    progress.update(bar, side="")
    content = harness.summary(case, found)
    content["load"] = {"before": round(load, 2), "after": round(os.getloadavg()[0], 2)}
    merge("speed", case.name, content, seeds=[SEED])
    return [told(name, figure["median"]) for name, figure in content["figures"].items()]


def told(name: str, value: float) -> str:
    """A figure in a line, with its bar."""
    claim = CLAIMS[name]
    held = claim.holds(value)
    verdict = "" if held is None else (" [green]holds[/]" if held else " [red]fails[/]")
    bound = "" if claim.bar is None else f" (bar {claim.bar:g})"
    return f"{claim.what}: {value:g} {claim.unit}{bound}{verdict}"


def chosen(every: Sequence[Case], names: Sequence[str] | None) -> list[Case]:
    """The cases of those names, or all of them."""
    known = {case.name: case for case in every}
    unknown = set(names or ()) - set(known)
    if unknown:
        raise SystemExit(f"no case {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    return [known[name] for name in names] if names else list(every)


def main() -> int:
    """Measure what is asked for; 1 if a case broke."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=description, epilog=rest.strip())
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these cases")
    parser.add_argument("--rounds", type=int, help="of each case, instead of its own number")
    parser.add_argument("--dacbench-python", metavar="PATH", help="interpreter that has dacbench")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console, broken = Console(), 0
    columns = (TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn(), TextColumn("{task.fields[side]}"))  # fmt: skip
    with Progress(*columns, console=console) as progress:
        for case in chosen(cases(options.dacbench_python), options.only):
            if case.missing:
                console.print(f"{case.name}: skipped. {case.missing}", soft_wrap=True)
                continue
            try:
                lines = measure(case, options.rounds or case.rounds, progress)
            except Broken as error:
                broken = 1
                console.print(f"{case.name}: {error}", style="red", markup=False)
                continue
            for line in lines:
                console.print(line)
    return broken


if __name__ == "__main__":
    raise SystemExit(main())
