import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.reward import CEILING, PENALTY, crash, gain, potential

losses = st.one_of(st.floats(), st.floats(1e-6, 1e3))
several = st.lists(st.tuples(losses, losses, losses), min_size=1, max_size=6)


def by_hand(loss, start):
    if not (math.isfinite(loss) and math.isfinite(start) and start > 0):
        return -CEILING
    fall = math.log(start) - math.log(max(loss, 1e-4))
    return max(-CEILING, math.copysign(math.sqrt(abs(fall)), fall))


@given(several)
def test_many_runs_are_paid_as_each_is(rows):
    before, after, start = np.array(rows, dtype=np.float64).T
    for row, one in zip(rows, potential(after, start), strict=True):
        assert potential(row[1], row[2]) == one == pytest.approx(by_hand(row[1], row[2]))
    paid = gain(before, after, start)
    assert paid.tolist() == [gain(*row) for row in rows]
    assert np.all(np.isfinite(paid))
    assert crash(before, start).tolist() == [crash(b, s) for b, _, s in rows]


def test_one_run_is_paid_a_plain_number():
    assert type(potential(0.5, 1.0)) is float
    assert type(gain(0.5, 0.4, 1.0)) is float
    assert crash(1.0, 1.0) == -CEILING - PENALTY
