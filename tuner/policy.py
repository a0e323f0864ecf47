"""Policy: a learned tuner's answer to an observation."""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from envs.errors import BadArtifact, BadInput
from envs.files import write_atomic
from envs.observe import FEATURES, LIMIT, SIZE, VERSION
from envs.task import find
from tuner import artifact
from tuner.artifact import CLIP, FORMAT, Array, Golden, Table, refuse
from tuner.artifact import Manifest as Manifest

GOLDEN, TOLERANCE = 8, 1e-5  # pairs that `make` records; on each number of a continuous action
SATURATED = "rows"  # beyond the most that training saw a run of that kind reads no more of them
SLACK, SLACK_SHARE = 0.05, 0.1  # beyond the envelope: absolute, and as a share of its width
DEFAULT = Path(__file__).with_name("default.safetensors")  # what the package ships
PLACES = {feature.name: i for i, feature in enumerate(FEATURES)}


@dataclass(frozen=True, eq=False)
class Policy:
    """A deterministic policy: the manifest, the weights, the hash of the file they came from.

    Built by `load`, `from_bytes` or `make`, which check everything; a hand-made one is unchecked.
    """

    manifest: Manifest
    arrays: dict[str, Array]
    sha256: str = ""  # of the file's bytes; empty before saving

    def act(self, observation: ArrayLike) -> "int | Array":
        """(SIZE,) finite -> the best discrete action, first of ties; or (n,) float32 in [-1, 1].

        Raises `BadInput` on a wrong shape, NaN or an infinity.
        """
        scores = self.scores(observation)
        if self.manifest.actions.view == "discrete":
            return int(scores.argmax())
        return np.minimum(np.maximum(scores, -1.0), 1.0)

    def scores(self, observation: ArrayLike) -> Array:
        """(SIZE,) finite -> (actions,) float32: logits, action values, or continuous means."""
        network = self.manifest.network
        if isinstance(network, Table):
            values = self._known(_finite(observation))
            bins = [(each.edges, float(values[PLACES[each.feature]])) for each in network.bins]
            return self.arrays["table"][tuple(bisect_right(*each) for each in bins)].copy()
        values, last = self.normalised(observation), len(network.layers) - 2
        for i in range(last):
            values = self.arrays[f"layer{i}.weight"] @ values + self.arrays[f"layer{i}.bias"]
            values = np.tanh(values) if network.activation == "tanh" else np.maximum(values, 0)
        return self.arrays[f"layer{last}.weight"] @ values + self.arrays[f"layer{last}.bias"]

    def normalised(self, observation: ArrayLike) -> Array:
        """(SIZE,) finite -> (SIZE,) float32 in [-10, 10]: what the network sees of it."""
        mean, deviation, _, _ = self._ranges
        with np.errstate(over="ignore"):
            values = (self._known(_finite(observation)) - mean) / deviation
        return np.minimum(np.maximum(values, -CLIP), CLIP)

    def outside(self, observation: ArrayLike) -> list[str]:
        """Names of the features beyond what training saw and a margin; NaN is beyond.

        More training rows than it saw are not beyond it: they are taken as the most it saw.
        """
        values, (_, _, low, high) = self._known(_vector(observation)), self._ranges
        within = (values >= low) & (values <= high)
        return [] if within.all() else [FEATURES[i].name for i in np.flatnonzero(~within)]

    @cached_property
    def objectives(self) -> frozenset[str]:
        """What it was trained on, as in `envs.task.Objective`; empty where its file does not say.

        Data of one's own is a classification, as everywhere; so are the runs of a lesson alone.
        """
        if self.manifest.algorithm == "imitation":
            return frozenset({"classification"})
        config = self.manifest.provenance.get("config")
        given = config if isinstance(config, dict) else {}
        tasks = [each for key in ("tasks", "larger") for each in _listed(given.get(key))]
        return frozenset(map(_objective, tasks))

    def _known(self, values: Array) -> Array:
        """The values with those that saturate held at the top of the envelope."""
        place = PLACES[SATURATED]
        top = self.manifest.features[place].high
        if values[place] > top:
            values = values.copy()
            values[place] = top
        return values

    @cached_property
    def _ranges(self) -> tuple[Array, ...]:
        """mean, deviation, low and high less and plus the margin: (SIZE,) float32 each."""
        rows = [(each.mean, each.deviation, each.low, each.high) for each in self.manifest.features]
        mean, deviation, low, high = np.array(rows).T
        slack = SLACK + SLACK_SHARE * (high - low)
        return tuple(np.array((mean, deviation, low - slack, high + slack), np.float32))


def make(*, arrays: Mapping[str, Array], **fields: Any) -> Policy:
    """A policy from the fields of `Manifest`, but those that are worked out here.

    Give ``algorithm, features, network, actions, decisions, start_decades, provenance`` as plain
    values, numpy's, or the classes of `tuner.artifact`. Raises `BadArtifact` on all `load` refuses.
    """
    here = {
        "format": FORMAT,
        "observation": VERSION,
        "golden": [{"observation": [0.0] * SIZE, "action": 0}] * 3,
        "payload_sha256": "0" * 64,
    }
    with _named("policy"):
        try:
            text = json.dumps(fields | here, default=_plain, allow_nan=False)
        except (TypeError, ValueError) as error:
            refuse("manifest", f"cannot be written as JSON ({error})", "give plain finite values")
        manifest = artifact.parse(text.encode())
        weights = {name: np.array(array, np.float32) for name, array in arrays.items()}
        artifact.check_arrays(manifest, weights)
        golden = tuple(_golden(Policy(manifest, weights)))
        manifest = manifest.model_copy(update={"golden": golden})
        manifest = artifact.seal(manifest, weights)
    return replace(from_bytes(to_bytes(Policy(manifest, weights)), "policy"), sha256="")


def to_bytes(policy: Policy) -> bytes:
    """The file's content; the same policy gives the same bytes."""
    return artifact.encode(policy.manifest, policy.arrays)


def from_bytes(data: bytes, source: str) -> Policy:
    """The policy in a file's content; `BadArtifact` naming ``source`` on anything wrong with it."""
    with _named(source):
        policy = Policy(*artifact.decode(data), hashlib.sha256(data).hexdigest())
        limit = 0 if policy.manifest.actions.view == "discrete" else TOLERANCE
        for i, pair in enumerate(policy.manifest.golden):
            expected, found = map(np.atleast_1d, (pair.action, policy.act(pair.observation)))
            if found.shape != expected.shape or abs(found - expected).max() > limit:
                problem = f"acts {found.tolist()}, not {pair.action} as where it was made"
                refuse(f"golden.{i}", problem, artifact.RETRAIN)
        return policy


def save(policy: Policy, path: str | os.PathLike[str]) -> str:
    """Write the policy, whole or not at all; returns the file's SHA-256, to pin it by."""
    with _named(os.fspath(path)):
        data = to_bytes(policy)
    digest = from_bytes(data, os.fspath(path)).sha256  # never write what would not load
    write_atomic(Path(path), data)
    return digest


def load(path: str | os.PathLike[str], sha256: str | None = None) -> Policy:
    """The policy in a file, which must have the hash ``sha256`` if one is given.

    Runs no code from the file. Raises `BadArtifact`: ``<file>: <field>: <problem>; <fix>``.
    """
    source = os.fspath(path)
    with _named(source):
        data = artifact.read(source)
        if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256.lower():
            refuse("sha256", f"is {found}, not {sha256[:64]!r}", "get the file that was asked for")
    return from_bytes(data, source)


@contextmanager
def _named(source: str) -> Iterator[None]:
    """Put the file's name before a refusal."""
    try:
        yield
    except (BadArtifact, RecursionError) as error:
        problem = error if isinstance(error, BadArtifact) else f"header: too deep; {artifact.AGAIN}"
        name = "".join(c if c.isprintable() else "?" for c in source[-200:]) or "''"
        raise BadArtifact(f"{name}: {problem}") from None


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _objective(task: object) -> str:
    """Of a task as a configuration names it: by name, or by its fields."""
    if isinstance(task, dict):
        return str(task.get("objective", "classification"))
    with suppress(BadInput):
        return find(str(task)).objective
    return "classification"


def _vector(values: ArrayLike) -> Array:
    try:
        with np.errstate(over="ignore"):
            found = np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError):
        found = np.empty(0, np.float32)
    if found.shape != (SIZE,):
        raise BadInput(f"observation: not {SIZE} numbers; give what envs.observe.observe returns")
    return found


def _finite(observation: ArrayLike) -> Array:
    values = _vector(observation)
    if not (finite := np.isfinite(values)).all():
        name = FEATURES[int(finite.argmin())].name
        raise BadInput(f"observation: {name}: is not finite; leave this decision out")
    return values


def _golden(policy: Policy) -> list[Golden]:
    """Pairs from the envelope; of a choice, the clearest ones, different actions first."""
    low, high = np.array([(each.low, each.high) for each in policy.manifest.features]).T
    drawn = np.random.default_rng(0).uniform(low, high, (64, SIZE)).round(3).clip(-LIMIT, LIMIT)
    if policy.manifest.actions.view == "discrete":
        scores = np.array([np.sort(policy.scores(each)) for each in drawn], dtype=float)
        drawn = drawn[np.argsort(scores[:, -2:].min(1) - scores[:, -1], kind="stable")[:32]]
        first = np.unique([policy.act(each) for each in drawn], return_index=True)[1]
        drawn = np.concatenate((drawn[first], drawn))
    pairs = []
    for each in drawn[:GOLDEN]:
        action = policy.act(each)
        kept = action if isinstance(action, int) else tuple(action.astype(float).round(6).tolist())
        pairs.append(Golden(observation=tuple(each.tolist()), action=kept))
    return pairs


def _plain(value: object) -> object:
    """A numpy value as plain numbers; an instance as a dict of its fields."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else vars(value)
