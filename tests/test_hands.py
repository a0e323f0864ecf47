import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.errors import BadInput
from envs.hands import decode_many, turn_many
from envs.knobs import OPTIMIZERS, ROLLBACK_FACTOR, Actions, Knobs, decode, exchange, turn

VIEWS = {
    "discrete": Actions(),
    "few": Actions(multipliers=(0.3, 1.0), rollback=False),
    "switching": Actions(optimizers=OPTIMIZERS),
    "continuous": Actions("continuous", span=1.5),
    "continuous, no rollback": Actions("continuous", rollback=False),
}
SIZE = 150_000


@pytest.mark.parametrize("view", VIEWS)
def test_many_actions_ask_for_what_each_asks_for(view):
    actions = VIEWS[view]
    space = actions.space()
    space.seed(0)
    given = np.array([space.sample() for _ in range(50)])
    decided = decode_many(given, actions, 50)
    for i, action in enumerate(given):
        one = decode(action, actions)
        assert decided.rollback[i] == one.rollback
        assert decided.change[i] == pytest.approx(
            ROLLBACK_FACTOR if one.rollback else one.multiplier, rel=1e-15
        )
        assert decided.optimizer[i] == (OPTIMIZERS.index(one.optimizer) if one.optimizer else -1)


@given(st.lists(st.integers(0, VIEWS["switching"].size - 1), min_size=1, max_size=12))
def test_the_rates_of_any_sequence_are_those_of_turn(sequence):
    actions = VIEWS["switching"]
    knobs, start = Knobs(1e-3), 1e-3
    rate, first, optimizer = np.array([1e-3]), np.array([1e-3]), np.array([0])
    for action in sequence:
        low, high = start / 30, start * 30
        decision = decode(action, actions)
        turned = turn(knobs, decision, low=low, high=high, parameters=SIZE)
        start *= exchange(knobs.optimizer, turned.optimizer, SIZE, "full")
        knobs = turned
        decided = decode_many(np.array([action]), actions, 1)
        new = np.where(decided.optimizer < 0, optimizer, decided.optimizer)
        names = (OPTIMIZERS[optimizer[0]], OPTIMIZERS[new[0]])
        share = np.array([exchange(*names, SIZE, "full")])
        rate = turn_many(rate, decided, first / 30, first * 30, share)
        first, optimizer = first * share, new
        assert rate[0] == pytest.approx(knobs.rate, rel=1e-12)
        assert OPTIMIZERS[optimizer[0]] == knobs.optimizer


@pytest.mark.parametrize(
    ("view", "bad"),
    [("discrete", bad) for bad in ([0], [0, 8], [-1, 0], [0.0, 1.0], [[0], [1]], ["a", "b"])]
    + [("continuous", bad) for bad in ([0, 0], [[0, 2.0], [0, 0]], [[0, math.nan], [0, 0]])],
)
def test_an_invalid_action_is_refused(view, bad):
    with pytest.raises(BadInput, match=r"^action: .*give") as error:
        decode_many(bad, VIEWS[view], 2)
    assert "\n" not in str(error.value)
