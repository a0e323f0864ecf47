"""Raw outcomes of the benchmark, a cell a line, in results/outcomes.jsonl.gz.

Each line is ``{"suite": NAME, "about": ...}`` or ``{"suite": NAME, "outcome": ...}``. An outcome
has the scores, the knobs and the charges of every trial of a method in a cell, and what the cell
was: task, seed, start, and the sha256 of the code and the data. Left out is what no figure is made
of: curves within a trial. Beside the suites are the runs on the training tasks by which the best
fixed setting and the best list were chosen.
"""

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from baselines.ledger import Ledger
from envs.files import write_atomic
from tuner.benchmark import finished
from tuner.evaluate import shown
from tuner.suites import SUITES

Raw = Mapping[str, Any]  # a suite's description, and its ``outcomes``
CHOICE = "choice of fixed and list"


def gather(run: Path) -> dict[str, Raw]:
    """What a benchmark's folder has: its finished suites, and the choice of settings."""
    found: dict[str, Raw] = dict(finished(run, SUITES))
    if (path := run / "fixed.sqlite").is_file():
        purpose = "Settings on the training tasks, of which `fixed` and `list` were chosen."
        found[CHOICE] = {"purpose": purpose, "outcomes": shown(Ledger(path))}
    return found


def slim(outcome: Raw) -> dict[str, Any]:
    """An outcome without the curves of its trials, but for the selection loss at their ends."""
    trials = []
    for trial in outcome["trials"]:
        ends = [point["selection_loss"] for point in trial.get("curve", ())[-1:]]
        kept = {k: v for k, v in trial.items() if k != "curve"}
        trials.append({**kept, **({"last_loss": ends[0]} if ends else {})})
    return {**outcome, "trials": trials}


def save(path: Path, suites: Mapping[str, Raw]) -> None:
    """Write all suites; the same suites give the same bytes."""
    lines = []
    for name, suite in suites.items():
        about = {k: v for k, v in suite.items() if k != "outcomes"}
        lines.append({"suite": name, "about": about})
        lines += [{"suite": name, "outcome": slim(outcome)} for outcome in suite["outcomes"]]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomic(path, gzip.compress(text.encode(), mtime=0))


def load(path: Path) -> dict[str, Raw]:
    """The suites of a file; none where there is no file."""
    found: dict[str, Any] = {}
    for text in gzip.decompress(path.read_bytes()).decode().splitlines() if path.exists() else ():
        line = json.loads(text)
        if "about" in line:
            found[line["suite"]] = {**line["about"], "outcomes": []}
        else:
            found[line["suite"]]["outcomes"].append(line["outcome"])
    return found
