"""Ablations: what takes a policy's place to show what it owes to learning and to its eyes.

Each is a value that makes a `Pilot` for one run: a pilot may remember its run, a value does not.
All of them steer through the same `Helm` and the same guard as a policy. In mode careful that lets
a policy act only where it clearly prefers to; the shuffled one is held to the same, and those that
prefer nothing, random actions and the rule, act whenever they wish.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from envs.dials import Turn
from envs.knobs import Actions, plain
from envs.surrogate import SurrogateVectorEnv
from tuner.audit import Pilot
from tuner.policy import PLACES, Policy

Action = int | NDArray[np.float32]
Observation = NDArray[np.float32]

EPISODES = 64  # simulated runs whose observations `Shuffled` deals out
_HALF = float(np.log10(0.5))  # decades


@dataclass(frozen=True)
class Manifest:
    """The part of a policy's manifest that `Helm` reads."""

    actions: Actions
    features: tuple[()] = ()
    algorithm: str = ""  # whose scores a pilot has


@dataclass
class Stand:
    """A pilot for one run whose actions a function chooses; no observation is strange to it."""

    manifest: Manifest
    choose: Callable[[Observation], Action]
    sha256: str = ""
    strange: Callable[[ArrayLike], list[str]] = field(default=lambda observation: [])
    objectives: frozenset[str] = frozenset()  # none: it has a say everywhere
    scores: Callable[[ArrayLike], NDArray[np.floating[Any]]] | None = None  # of the last choice

    def act(self, observation: ArrayLike) -> Action:
        """(SIZE,) -> an action."""
        return self.choose(np.asarray(observation, np.float32))

    def outside(self, observation: ArrayLike) -> list[str]:
        """Names of the features out of the range of training."""
        return self.strange(observation)


@dataclass(frozen=True)
class RandomActions:
    """Each action is drawn from all of the action set, evenly: what the guard alone is worth."""

    actions: Actions

    def describe(self) -> dict[str, Any]:
        """What tells it from another."""
        return {"policy": "random-actions", "actions": plain(self.actions)}

    def pilot(self, seed: int, number: int = 0) -> Pilot:
        """For run ``number`` of the cell with that seed."""
        rng = np.random.default_rng([seed, number, 2])

        def choose(observation: Observation) -> Action:
            if self.actions.view == "discrete":
                return int(rng.integers(self.actions.size))
            return rng.uniform(-1.0, 1.0, self.actions.size).astype(np.float32)

        return Stand(Manifest(self.actions), choose)


@dataclass(frozen=True)
class Shuffled:
    """The policy, blind: at each decision it is given an observation of another run, at any time.

    Dealt are the observations of `EPISODES` simulated runs that the same policy steers
    (`SurrogateVectorEnv`, its default settings, seeds 0 on), each time one of all of them, evenly.
    What the policy's network sees is thus as in training, all features belong together, and it
    acts about as often in each way; but nothing ties its actions to the run. If state is used,
    this is worse than the policy. The guard sees the real run.
    """

    policy: Policy

    def describe(self) -> dict[str, Any]:
        """What tells it from another: the artifact, and the pool."""
        return {"policy": "shuffled", "of": self.policy.sha256, "episodes": EPISODES}

    def pilot(self, seed: int, number: int = 0) -> Pilot:
        """For run ``number`` of the cell with that seed."""
        rng, seen = np.random.default_rng([seed, number, 3]), pool(self.policy)
        dealt = seen[0]

        def choose(observation: Observation) -> Action:
            nonlocal dealt
            dealt = seen[rng.integers(len(seen))]
            return self.policy.act(dealt)

        manifest = self.policy.manifest
        return Stand(
            Manifest(manifest.actions, algorithm=manifest.algorithm), choose, self.policy.sha256,
            self.policy.outside, self.policy.objectives, lambda _: self.policy.scores(dealt),
        )  # fmt: skip


def pool(policy: Policy) -> Observation:
    """(decisions of all episodes, SIZE): what a policy sees while it steers simulated runs."""
    manifest = policy.manifest
    runs = SurrogateVectorEnv(EPISODES, actions=manifest.actions, decisions=manifest.decisions)
    seen = [runs.reset(seed=0)[0]]
    for _ in range(manifest.decisions - 1):
        actions = np.array([policy.act(observation) for observation in seen[-1]])
        seen.append(runs.step(actions)[0])
    return np.concatenate(seen)


@dataclass(frozen=True)
class Opened:
    """Runs are opened as the policy opens them, and then left alone: what that alone is worth."""

    actions: Actions

    def describe(self) -> dict[str, Any]:
        """What tells it from another."""
        return {"policy": "opened", "actions": plain(self.actions)}

    def pilot(self, seed: int, number: int = 0) -> Pilot:
        """For one run; it draws nothing."""
        keep: Action = self.actions.keep
        if self.actions.view == "continuous":
            keep = np.zeros(self.actions.size, np.float32)
        return Stand(Manifest(self.actions), lambda observation: keep)


@dataclass(frozen=True)
class Rule:
    """What a person might write in place of a policy.

    Walk the rate to the rule of thumb for this size (``rate_vs_reference``), a decade a decision
    at most. Once there, halve it when the validation loss has got worse in two intervals in a row;
    otherwise keep. Worse: by more than ``tolerance``, in nats of its logarithm.
    """

    near: float = 0.05  # decades from the reference rate that count as there
    tolerance: float = 0.0
    opens: tuple[Turn, ...] = ()  # what it opens runs with

    def describe(self) -> dict[str, Any]:
        """What tells it from another."""
        return {"policy": "rule"} | asdict(self)

    def pilot(self, seed: int, number: int = 0) -> Pilot:
        """For one run; it draws nothing."""
        there, worse = False, 0

        def choose(observation: Observation) -> Action:
            nonlocal there, worse
            off = float(observation[PLACES["rate_vs_reference"]])
            rise = float(observation[PLACES["validation_vs_previous"]])
            worse = worse + 1 if rise > self.tolerance else 0
            there = there or abs(off) <= self.near
            if not there:
                return _decades(-off)
            if worse >= 2:
                worse = 0
                return _decades(_HALF)
            return _decades(0.0)

        actions = Actions("continuous", rollback=False, opens=self.opens)
        return Stand(Manifest(actions), choose)


def _decades(move: float) -> NDArray[np.float32]:
    """The continuous action that moves the rate by so many decades, one at most."""
    return np.array([min(max(move, -1.0), 1.0)], np.float32)


Ablation = RandomActions | Shuffled | Opened | Rule
