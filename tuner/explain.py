"""Explain: what a policy does, in tables a person reads."""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import RenderableType
from rich.table import Table

from envs.dials import label
from envs.errors import BadInput
from envs.knobs import Actions
from envs.observe import FEATURES, LIMIT
from tuner import artifact
from tuner.policy import Policy

NAMES = [feature.name for feature in FEATURES]
GRID: dict[str, tuple[tuple[str, float], ...]] = {
    "progress": (("start", 0.0), ("early", 0.2), ("middle", 0.5), ("late", 0.8)),
    "validation_vs_previous": (("falling", -0.1), ("flat", 0.0), ("rising", 0.1)),
    "validation_vs_best": (("at its best", 0.0), ("off its best", 0.1), ("far off", 0.5)),
    "rate_vs_reference": (("rate too low", -1.0), ("rate as usual", 0.0), ("rate too high", 1.0)),
}
SAMPLES = 2000
LOGS = ("audit.jsonl", "tuner.jsonl")  # of `steersman apply`, and of a Trainer of one's own


def explain_policy(policy: Policy) -> Iterator[RenderableType]:
    """What it is, what it does by situation, and which features move it."""
    yield _facts(policy)
    if isinstance(policy.manifest.network, artifact.Table):
        yield from _decision_table(policy)
    else:
        yield from _situations(policy)
    yield _sensitivities(policy)


def explain_run(policy: Policy, folder: Path) -> Iterator[RenderableType]:
    """Each decision of a finished steered run, with what the policy saw."""
    path = next((folder / name for name in LOGS if (folder / name).is_file()), None)
    if path is None:
        raise BadInput(f"{folder}: no {' or '.join(LOGS)}; give the folder of a steered run")
    table = Table(title=f"decisions of {folder.name}", box=None, header_style="bold")
    for column in ("step", "what stood out", "wished", "applied", "rate", "guard"):
        table.add_column(column)
    foreign = 0
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            entry = json.loads(line)
            applied, normalised = entry["applied"], np.array(entry["normalised"], dtype=float)
            cells = (
                str(entry["step"]),
                _standing_out(normalised, np.array(entry["observation"], dtype=float)),
                str(entry["proposed"]),
                "rollback"
                if applied["rollback"]
                else ", ".join(label((name, amount)) for name, amount in applied.get("turns", ()))
                or f"x{applied['multiplier']:.3g}",
                f"{applied['rate']:.3g}",
                str(entry["guard"]),
            )
        except (ValueError, LookupError, TypeError, AttributeError):
            raise BadInput(f"{path}: line {number}: is not a decision; is it whole?") from None
        foreign += entry.get("sha256") not in ("", policy.sha256)
        table.add_row(*cells)
    yield table
    if foreign:
        yield f"{foreign} decisions were made by another policy than this one."


def action_label(actions: Actions, action: Any) -> str:
    """An action of either view in words."""
    if actions.view == "discrete":
        return actions.label(int(action))
    rollback = actions.rollback and action[1] > 0.5
    return "rollback" if rollback else f"x{10 ** (actions.span * float(action[0])):.2g}"


def _facts(policy: Policy) -> Table:
    manifest, origin = policy.manifest, policy.manifest.provenance
    config = origin.get("config")
    tasks = config.get("tasks") if isinstance(config, dict) else None
    table = Table(box=None, show_header=False)
    rows = {
        "algorithm": manifest.algorithm,
        "trained on": ", ".join(map(str, tasks)) if isinstance(tasks, list) else "",
        "objectives": ", ".join(sorted(policy.objectives)),
        "episodes": origin.get("episodes", ""),
        "cost": f"{origin.get('seconds', 0)} s",
        "opens runs with": ", ".join(map(label, manifest.actions.opens)) or "nothing",
        "decisions a run": manifest.decisions,
        "starting rates": f"within {manifest.start_decades:g} decades of the usual",
        "sha256": policy.sha256,
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def _decision_table(policy: Policy) -> Iterator[Table]:
    """The table itself: rows are all features but the first, columns the first one's bins."""
    network, actions = policy.manifest.network, _actions(policy)
    assert isinstance(network, artifact.Table)
    values = policy.arrays["table"]
    first, *others = network.bins
    unseen = values.min()
    title = f"what it does, by {first.feature} across (. was never met: it keeps the rate)"
    table = Table(title=title, box=None, header_style="bold")
    for other in others:
        table.add_column(other.feature.replace("_", " "))
    for interval in _intervals(first.edges):
        table.add_column(interval)
    names = [_intervals(other.edges) for other in others]
    for place in itertools.product(*(range(len(each)) for each in names)):
        cells = [names[i][j] for i, j in enumerate(place)]
        for column in range(len(first.edges) + 1):
            row = values[(column, *place)]
            met = (np.delete(row, actions.keep) > unseen).any() or row[actions.keep] > unseen + 1
            cells.append(actions.label(int(row.argmax())) if met else ".")
        if set(cells[len(others) :]) != {"."}:
            table.add_row(*cells)
    yield table


def _situations(policy: Policy) -> Iterator[Table]:
    """The action on a grid of situations, all other features at their training mean."""
    middle = _ranges(policy)[0]
    rows, slopes, columns, rates = GRID.values()
    for rate_name, rate in rates:
        table = Table(title=f"what it does: {rate_name}", box=None, header_style="bold")
        table.add_column("progress")
        table.add_column("validation loss")
        for name, _ in columns:
            table.add_column(name)
        for (row_name, progress), (slope_name, slope) in itertools.product(rows, slopes):
            cells = [row_name, slope_name]
            for _, off in columns:
                seen = middle.copy()
                for name, value in zip(GRID, (progress, slope, off, rate), strict=True):
                    seen[NAMES.index(name)] = value
                seen[NAMES.index("schedule")] = 1.0 - progress
                cells.append(action_label(_actions(policy), policy.act(seen)))
            table.add_row(*cells)
        yield table


def _sensitivities(policy: Policy) -> Table:
    """Share of decisions that change when one feature alone is shuffled between situations."""
    rng = np.random.default_rng(0)
    mean, deviation, low, high = _ranges(policy)
    drawn = rng.normal(mean, deviation, (SAMPLES, len(NAMES)))
    drawn = np.clip(drawn, np.maximum(low, -LIMIT), np.minimum(high, LIMIT)).astype(np.float32)
    plain = _labels(policy, drawn)
    table = Table(title="what moves it", box=None, header_style="bold")
    table.add_column("feature")
    table.add_column("unit")
    table.add_column("decisions changed", justify="right")
    changed = {}
    for i, name in enumerate(NAMES):
        shuffled = drawn.copy()
        shuffled[:, i] = rng.permutation(shuffled[:, i])
        found = _labels(policy, shuffled)
        changed[name] = np.mean([a != b for a, b in zip(plain, found, strict=True)])
    for i in np.argsort([-changed[name] for name in NAMES], kind="stable"):
        if changed[NAMES[i]] > 0:
            table.add_row(NAMES[i], FEATURES[i].unit, f"{changed[NAMES[i]]:.0%}")
    return table


def _labels(policy: Policy, observations: NDArray[Any]) -> list[str]:
    actions = _actions(policy)
    return [action_label(actions, policy.act(seen)) for seen in observations]


def _actions(policy: Policy) -> Actions:
    return policy.manifest.actions


def _ranges(policy: Policy) -> NDArray[np.float32]:
    """(4, features): mean, deviation, low and high of each feature in training."""
    rows = [(f.mean, f.deviation, f.low, f.high) for f in policy.manifest.features]
    return np.array(rows, dtype=np.float32).T


def _intervals(edges: Sequence[float]) -> list[str]:
    middle = [f"{a:g} to {b:g}" for a, b in itertools.pairwise(edges)]
    return [f"below {edges[0]:g}", *middle, f"{edges[-1]:g} up"]


def _standing_out(normalised: NDArray[np.float64], raw: NDArray[np.float64]) -> str:
    order = np.argsort(-np.abs(normalised), kind="stable")[:3]
    return ", ".join(f"{NAMES[i]} {raw[i]:+.2f}" for i in order)
