"""What the demonstration's tuner is worth on tasks it has never seen; run `make demo` first."""

import argparse
import json
from pathlib import Path

from record import record

from tuner import policy

parser = argparse.ArgumentParser(description=__doc__, epilog="example: python benchmarks/demo.py")
parser.add_argument("--run", type=Path, default=Path("runs/demo"))
arguments = parser.parse_args()

summary = json.loads((arguments.run / "summary.json").read_text())
rows = {row["name"]: row for row in summary["methods"]}
trained = policy.load(arguments.run / "policy.safetensors")
figures = {
    "what": "a tuner trained within the demonstration, on held-out tasks, from starting rates "
    "misjudged by up to 1.5 decades",
    "bar": "probability of improvement over keeping the rate at least 0.8",
    "steered_is_better": {name: row["chance"] for name, row in rows.items() if row.get("chance")},
    "trials_to_match": summary["match"],
    "test_accuracy": {name: row["test"] for name, row in rows.items()},
    "harm": summary["harm"],
    "training": {key: trained.manifest.provenance[key] for key in ("episodes", "seconds")},
    "tasks": [task["name"] for task in summary["tasks"]],
    "policy_sha256": trained.sha256,
}
print(json.dumps(figures["steered_is_better"], indent=1))
print(record("demo", figures, seeds=summary["seeds"]))
