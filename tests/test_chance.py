"""A job's random states are its own, and everybody else's are put back."""

import random

import numpy as np
import pytest
import torch

from envs.chance import RandomState, put_back


def drawn():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_a_job_draws_what_its_seed_says_whoever_else_draws():
    numpy_alone = np.random.RandomState(7)
    alone = random.Random(3), torch.Generator().manual_seed(3)
    wanted = [(alone[0].random(), numpy_alone.rand(), float(torch.rand((), generator=alone[1])))
              for _ in range(4)]  # fmt: skip
    job, other = RandomState(3, [], 7), RandomState(4, [torch.device("cpu")])
    found = []
    for _ in range(4):
        drawn()
        with other.lent():
            drawn()
        with job.lent():
            found.append(drawn())
    assert found == wanted
    with job.copied():
        once = drawn()
    with job.lent():
        assert drawn() == once


def seed_and_fail():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    raise ValueError("no")


@pytest.mark.parametrize("inside", [RandomState(0, []).lent, RandomState(0, []).copied,
                                    lambda: put_back([torch.device("cpu")])])  # fmt: skip
def test_the_callers_states_are_put_back_whatever_happens(inside):
    with put_back([]):
        wanted = drawn()
    with pytest.raises(ValueError, match="no"), inside():
        seed_and_fail()
    assert drawn() == wanted


def test_a_seed_of_64_bits_is_one():
    found = []
    for seed in (2**63 - 1, 2**31):
        with RandomState(seed, []).lent():
            found.append(drawn())
    assert len({value for draw in found for value in draw}) == 6
