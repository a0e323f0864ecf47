"""Raw outcomes of the benchmark's suites, a cell a line, in results/outcomes.jsonl.gz.

Each line is ``{"suite": NAME, "about": ...}`` or ``{"suite": NAME, "outcome": ...}``. An outcome
has the scores, the knobs and the charges of every trial of a method in a cell, and what the cell
was: task, seed, start, and the sha256 of the code and the data. Left out is what no figure is made
of: curves within a trial.
"""

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from envs.files import write_atomic

Raw = Mapping[str, Any]  # a suite's description, and its ``outcomes``


def slim(outcome: Raw) -> dict[str, Any]:
    """An outcome without the curves of its trials."""
    trials = [{k: v for k, v in trial.items() if k != "curve"} for trial in outcome["trials"]]
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
