"""Hands: actions decoded and rates turned for many runs at once, as `envs.knobs` does for one."""

import functools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from envs.errors import BadInput
from envs.knobs import (
    OPTIMIZERS,
    RATE_CEILING,
    RATE_FLOOR,
    ROLLBACK_FACTOR,
    Actions,
    Decision,
    decode,
)

Array = NDArray[np.float64]


class Decisions(NamedTuple):
    """What the actions of n runs ask for: arrays (n,)."""

    change: Array  # what the rate is multiplied by, a rollback's factor included
    rollback: NDArray[np.bool_]
    optimizer: NDArray[np.intp]  # place in `OPTIMIZERS`; -1 keeps the one in use


def decode_many(action: object, actions: Actions, count: int) -> Decisions:
    """Actions of ``count`` runs -> what they ask for. Raises `BadInput` if one is not valid."""
    given = np.asarray(action)
    if actions.view == "joint":
        if given.shape[:1] != (count,):
            raise BadInput(f"action: {len(given)} given; give one for each of {count} environments")
        return _columns([decode(each, actions) for each in given])
    if actions.view == "continuous":
        return _steer(given, actions, count)
    if given.shape != (count,) or given.dtype.kind not in "iu":
        raise BadInput(
            f"action: {given.dtype} of shape {given.shape} is not a whole number for each of "
            f"{count} environments; give integers from 0 to {actions.size - 1}"
        )
    if given.min() < 0 or given.max() >= actions.size:
        wrong = int(given[(given < 0) | (given >= actions.size)][0])
        raise BadInput(f"action: {wrong} is out of range; give 0 to {actions.size - 1}")
    return Decisions(*(column[given] for column in _table(actions)))


def turn_many(
    rate: Array, decided: Decisions, low: Array, high: Array, share: Array | float = 1.0
) -> Array:
    """The rates after the decisions, each kept in [low, high].

    share: `envs.knobs.exchange` for the runs whose optimizer is switched, 1 for the others.
    """
    wished = np.maximum(rate * decided.change * share, np.maximum(low * share, RATE_FLOOR))
    return np.asarray(np.minimum(wished, np.minimum(high * share, RATE_CEILING)))


@functools.lru_cache(maxsize=16)
def _table(actions: Actions) -> Decisions:
    """Each discrete action's decision."""
    return _columns([decode(index, actions) for index in range(actions.size)])


def _columns(decided: list[Decision]) -> Decisions:
    return Decisions(
        np.array([ROLLBACK_FACTOR if d.rollback else d.multiplier for d in decided]),
        np.array([d.rollback for d in decided]),
        np.array([OPTIMIZERS.index(d.optimizer) if d.optimizer else -1 for d in decided]),
    )


def _steer(given: NDArray[Any], actions: Actions, count: int) -> Decisions:
    """Continuous actions, (count, actions.size) in [-1, 1]."""
    if given.shape != (count, actions.size) or given.dtype.kind not in "fiu":
        raise BadInput(
            f"action: {given.dtype} of shape {given.shape} is not a vector for each of {count} "
            f"environments; give ({count}, {actions.size}) numbers in [-1, 1]"
        )
    if not np.all(np.abs(given) <= 1.0):
        raise BadInput("action: one is outside [-1, 1] or not a number; give numbers in [-1, 1]")
    rollback = given[:, 1] > 0.5 if actions.rollback else np.zeros(count, dtype=np.bool_)
    change = 10.0 ** (actions.span * given[:, 0].astype(np.float64))
    kept = np.full(count, -1)
    return Decisions(np.where(rollback, ROLLBACK_FACTOR, change), rollback, kept)
