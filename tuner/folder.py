"""What a run folder holds, as items to mirror."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from baselines.ledger import Ledger
from envs.errors import SteersmanError

POINTS = 2000  # of one curve
Number = tuple[str, float, int]  # name, value, step


@dataclass(frozen=True)
class Item:
    """One MLflow run to be. ``files``: name -> content; ``data``: name, digest, context."""

    key: str
    name: str
    kind: str
    done: bool = False  # nothing will be added
    params: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, Any] = field(default_factory=dict)
    numbers: Sequence[Number] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)
    data: Sequence[tuple[str, str, str]] = ()

    @property
    def version(self) -> str:
        """Tells whether anything changed since it was sent."""
        files = {name: sha256_of(content) for name, content in self.files.items()}
        return sha256_of(repr((self.params, self.tags, self.numbers, files, self.data)).encode())


def gather(folder: Path) -> list[Item]:
    """The runs a folder stands for: itself, its training, each steered run, each outcome."""
    config = read_json(folder / "config.json")
    summary = read_json(folder / "summary.json")
    names = ["config.json", "summary.json", "report.html"]
    pictures = [f"figures/{path.name}" for path in sorted(folder.glob("figures/*.png"))]
    scores = [(f"{name}.{row['name']}", row[name]["point"]) for row in summary.get("methods", ())
              for name in ("test", "chance", "chance_equal") if row.get(name)]  # fmt: skip
    scores += [
        (f"match.{name}", m["median"]["point"]) for name, m in summary.get("match", {}).items()
    ]
    items = [Item("folder", folder.name, "folder", tags={"mlflow.note.content":
                  summary.get("verdict", "")},
                  numbers=[(name, math.inf if x is None else x, 0) for name, x in scores],
                  files=_files(folder, names + pictures))]  # fmt: skip
    if lines := _lines(folder / "train.jsonl"):
        items.append(_training(folder, lines, config.get("train", {})))
    for path in sorted(folder.glob("steered/*/")):
        items += _steered(path)
    if (folder / "ledger.sqlite").is_file():
        items += [_outcome(*row) for row in Ledger(folder / "ledger.sqlite").outcomes()]
    return items


def _training(folder: Path, lines: list[dict[str, Any]], config: Mapping[str, Any]) -> Item:
    files = _files(folder, ["policy.safetensors", "train.jsonl"])
    data: Mapping[str, str] = {}
    tags = {}
    if "policy.safetensors" in files:
        from tuner import policy

        files["policy/policy.safetensors"] = files["policy.safetensors"]
        try:
            manifest = policy.from_bytes(files["policy.safetensors"], "policy.safetensors").manifest
            data = manifest.provenance.get("data") or {}  # type: ignore[assignment]
            tags = {"steersman.sha256": sha256_of(files["policy.safetensors"]),
                    "steersman.algorithm": manifest.algorithm}  # fmt: skip
        except SteersmanError:
            del files["policy/policy.safetensors"]  # Never offer what would not load.
    return Item(
        f"train-{sha256_of(json.dumps(lines[0]).encode())[:16]}", "training", "training",
        params=_flat(config), tags=tags, files=files, numbers=_numbers(lines, "iteration"),
        data=[(name, digest, "training") for name, digest in data.items()],
    )  # fmt: skip


def _steered(folder: Path) -> list[Item]:
    curve, audit = _lines(folder / "curve.jsonl"), _lines(folder / "audit.jsonl")
    if not (curve or audit):
        return []
    summary = read_json(folder / "summary.json")
    decisions = [(line["step"], line.get("proposed"), line["applied"].get("multiplier"),
                  line["applied"].get("rollback"), line["applied"].get("rate"), line.get("guard"),
                  line.get("reason")) for line in audit]  # fmt: skip
    numbers = _numbers(curve, "step") + _numbers(
        [{"step": row[0]} | {f"decision.{k}": v for k, v in zip(
            ("multiplier", "rollback", "rate"), row[2:5], strict=True)} for row in decisions],
        "step",
    )  # fmt: skip
    final = dict(summary.get("final", {}))
    numbers += [(f"final.{k}", float(v), 0) for k, v in (final | final.get("marks", {})).items()
                if isinstance(v, int | float)]  # fmt: skip
    columns = ("step", "proposed", "multiplier", "rollback", "rate", "guard", "reason")
    files = _files(folder, ["audit.jsonl", "curve.jsonl", "summary.json"])
    first = json.dumps((audit or curve)[0]).encode() + folder.name.encode()
    return [Item(f"steered-{sha256_of(first)[:16]}", f"steered {folder.name}", "steered",
                 params=_flat({k: v for k, v in summary.items() if k != "final"}),
                 tags=_TABLE if decisions else {}, numbers=numbers,
                 files=files | _table("decisions", columns, decisions))]  # fmt: skip


def _outcome(key: str, cell: Mapping[str, Any], outcome: Mapping[str, Any]) -> Item:
    """A method on a task with a seed: its chosen trial's curve by step, all trials by number."""
    trials = outcome["trials"]
    best = max(trials, key=lambda trial: float(trial["selection"]), default=None)
    numbers: list[Number] = [
        (name, float(outcome[name]), 0) for name in ("spent", "seconds", "run_cost")
    ] + [("trials", len(trials), 0)]
    params: dict[str, Any] = _flat({k: cell[k] for k in ("method", "task") if k in cell})
    params |= {k: outcome[k] for k in ("seed", "start_rate", "budget")} | {"role": outcome.get(
        "role", "")}  # fmt: skip
    decisions: list[tuple[Any, ...]] = []
    for number, trial in enumerate(trials if len(trials) > 1 else (), 1):
        numbers += [(f"trial.{k}", float(trial[k]), number)
                    for k in ("selection", "test", "selection_loss", "steps")]  # fmt: skip
        numbers.append(("trial.rate", float(trial["knobs"]["rate"]), number))
    if best is not None:
        names = ("rate", "train_loss", "selection_loss", "selection", "validation_loss")
        numbers += [(name, float(p[name]), p["step"]) for p in best["curve"] for name in names
                    if not (name == "validation_loss" and math.isnan(p[name]))]  # fmt: skip
        numbers += [(f"final.{k}", float(best[k]), 0)
                    for k in ("selection", "selection_loss", "test", "test_loss")]  # fmt: skip
        params |= _flat({"knobs": best["knobs"]})
        rate = best["knobs"]["rate"]
        for point in best["curve"] if outcome.get("steered") else ():
            multiplier, rate = point["rate"] / rate, point["rate"]
            numbers.append(("decision.multiplier", multiplier, point["step"]))
            decisions.append((point["step"], point["decision"], multiplier, rate, point["guard"]))
    columns = ("state", "selection", "test", "selection_loss", "test_loss", "steps", "spent")
    rows = [(*(trial[k] for k in columns), *trial["knobs"].values()) for trial in trials]
    heads = (*columns, *(trials[0]["knobs"] if trials else ()))
    files = _table("trials", heads, rows) | _table(
        "decisions", ("until step", "decision", "multiplier", "rate", "guard"), decisions
    )
    digests = cell.get("data", {})
    task = cell.get("task", {})
    return Item(
        key, f"{outcome['method']} {outcome['task']} seed {outcome['seed']}", "outcome", True,
        params, {"method": outcome["method"], "steered": bool(outcome.get("steered"))}
        | (_TABLE if decisions else {}), numbers, files,
        [(str(task.get(k)), str(digests[d]), context) for k, d, context in
         (("dataset", "rows", "training"), ("model", "model", "model")) if d in digests],
    )  # fmt: skip


_TABLE = {"mlflow.loggedArtifacts": json.dumps([{"path": "decisions.json", "type": "table"}])}


def _table(name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, bytes]:
    """The form in which MLflow's pages show a table; no file for no rows."""
    sound = [[None if isinstance(v, float) and not math.isfinite(v) else v for v in row]
             for row in rows]  # fmt: skip
    table = {"columns": columns, "data": sound}
    return {f"{name}.json": json.dumps(table).encode()} if rows else {}


def _numbers(lines: Sequence[Mapping[str, Any]], clock: str) -> list[Number]:
    """All numbers of a JSONL file by its step; a long one is thinned by a power of two."""
    stride = 1 << max(0, math.ceil(math.log2(max(1, len(lines)) / POINTS)))
    return [(name, float(value), int(line[clock])) for line in lines[::stride]
            for name, value in line.items()
            if name != clock and isinstance(value, int | float)]  # fmt: skip


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _files(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds an object; nothing where there is no such file."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that may still be growing."""
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line]


def sha256_of(content: bytes) -> str:
    """As hex digits."""
    return hashlib.sha256(content).hexdigest()
