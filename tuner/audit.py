"""The audit log: every decision on disk before it is carried out, and taken again from there."""

import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from envs.errors import BadInput, RunFailed
from envs.knobs import Actions, Decision, Knobs, decode
from envs.progress import Context
from tuner.artifact import CLIP
from tuner.guard import NO_SWITCH, GuardState, limits_of, rule

logger = logging.getLogger(__name__)


class Pilot(Protocol):
    """What `Helm` asks of a policy; `tuner.policy.Policy` has it.

    It may have ``objectives``, too: what it was trained on, as in `envs.task.Objective`.
    """

    @property
    def manifest(self) -> Any:
        """``actions`` and ``decisions``, and ``features`` with a mean and a deviation each."""

    @property
    def sha256(self) -> str:
        """Of the artifact."""

    def act(self, observation: ArrayLike) -> "int | NDArray[np.float32]":
        """An observation's action."""

    def outside(self, observation: ArrayLike) -> list[str]:
        """Names of the features out of the range of training."""


class Audit:
    """A file of JSON lines, one a decision, on disk before the decision is carried out."""

    def __init__(self, path: Path) -> None:
        self.path, self.lines = path, 0

    def start(self) -> None:
        """Begin a new file; one that is there is kept as ``<name>.old``."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                os.replace(self.path, self.path.with_name(self.path.name + ".old"))
            self.path.touch()
        except OSError as error:
            problem = f"cannot be written: {error.strerror or error}; choose another file"
            raise BadInput(f"{self.path}: log: {problem}") from error
        self.lines = 0

    def cut(self, lines: int) -> None:
        """Keep the first so many lines: those that the checkpoint knows of."""
        content = self.path.read_bytes() if self.path.exists() else b""
        kept = content.split(b"\n")[:-1][:lines]
        if len(kept) < lines:
            logger.warning("%s: %d of %d lines are missing", self.path, lines - len(kept), lines)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "r+b" if content else "wb") as file:
            file.truncate(sum(len(line) + 1 for line in kept))
            os.fsync(file.fileno())
        self.lines = lines

    def append(self, record: dict[str, Any]) -> None:
        """Add a line, and wait until the disk has it."""
        with open(self.path, "ab") as file:
            file.write((json.dumps(record, allow_nan=False) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        self.lines += 1


def replay(path: str | Path, policy: Pilot) -> list[str]:
    """Take every decision of an audit log again; what differs, in words, a line each."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise RunFailed(f"{path}: not an audit log: {error}") from error
    found, guard = [], GuardState()
    for record in records:
        where, actions = f"step {record['step']}", policy.manifest.actions
        if record["sha256"] != policy.sha256:
            found.append(f"{where}: sha256: decided by another policy, {record['sha256'][:12]!r}")
        if record["proposed"] is None:
            continue  # the tuner failed here
        observation = np.array(record["observation"], np.float32)
        action = policy.act(observation)
        if (now := proposal(action, actions)) != record["proposed"]:
            found.append(f"{where}: proposed: {record['proposed']} in the log, {now} now")
        evidence = dict(record["evidence"])
        if evidence["strange"] != (strange := policy.outside(observation)):
            found.append(f"{where}: out of range: {evidence['strange']} in the log, {strange} now")
        turns = tuple(evidence.pop("turns", ()))
        evidence.pop("opened", None)
        if (mode := evidence.pop("mode")) == "advise":
            continue
        switch = NO_SWITCH not in record["guard"]
        limits = replace(limits_of(mode), switch=switch, turns=turns)
        guard, ruling = rule(guard, decode(action, actions), limits, **evidence)
        rate, decision = evidence["rate"], ruling.decision
        if decision.optimizer is None:
            knobs = ruling.turn(Knobs(rate=rate), Context(1, 1, 1, 1, 2, "full", "adamw", rate))
            wanted = applied(decision, knobs, evidence["start"])
            if wanted != record["applied"]:
                found.append(f"{where}: applied: {record['applied']} in the log, {wanted} now")
        if ruling.guard != record["guard"]:
            found.append(f"{where}: guard: {record['guard']!r} in the log, {ruling.guard!r} now")
    return found


def applied(decision: Decision, knobs: Knobs, start: float) -> dict[str, Any]:
    """What a decision came to. start: the user's peak rate."""
    turned = {"turns": [list(turn) for turn in decision.turns]} if decision.turns else {}
    return turned | {
        "multiplier": knobs.rate / start,
        "rate": knobs.rate,
        "rollback": decision.rollback,
        "optimizer": decision.optimizer,
    }


def proposal(action: Any, actions: Actions) -> Any:
    """A discrete action in words; a continuous one as numbers."""
    if actions.view == "discrete":
        return actions.label(int(action))
    return np.asarray(action, np.float64).tolist()


def reason(policy: Any, observation: NDArray[np.float32], actions: Actions) -> str:
    """How clear the choice was, in a few words."""
    scores = getattr(policy, "scores", None)
    if scores is None or actions.view != "discrete":
        return ""
    values = np.asarray(scores(observation), np.float64)
    order = np.argsort(-values, kind="stable")
    if len(order) < 2:
        return "the only action"
    lead = values[order[0]] - values[order[1]]
    return f"ahead of {actions.label(int(order[1]))} by {lead:.3g}"


def lead(policy: Any, observation: NDArray[np.float32], actions: Actions) -> float | None:
    """Log odds of the likeliest action over *keep*; None where a policy has no odds."""
    scores = getattr(policy, "scores", None)
    algorithm = getattr(policy.manifest, "algorithm", "")
    if scores is None or algorithm not in ("ppo", "imitation") or actions.view != "discrete":
        return None
    values = scores(observation)
    return float(values.max() - values[actions.keep])


def normalised(policy: Pilot, observation: NDArray[np.float32]) -> list[float]:
    """The observation as the policy's network sees it; empty for a policy without a normaliser."""
    features = getattr(policy.manifest, "features", ())
    if not features:
        return []
    mean, deviation = np.array([(f.mean, f.deviation) for f in features], np.float32).T
    return np.clip((observation - mean) / deviation, -CLIP, CLIP).tolist()
