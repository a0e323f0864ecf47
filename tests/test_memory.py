"""Memory: what a computation takes is counted, what was there before is not."""

import torch

from envs import memory


def test_peak_counts_what_lives_at_the_same_time():
    given = torch.randn(100_000)

    def chain():
        values = given * 1
        for _ in range(10):
            values = values + 1  # the one before it is gone then
        return values

    def heap():
        return [given + i for i in range(10)]

    assert memory.peak(chain) == 800_000
    assert memory.peak(heap) == 4_000_000
    assert memory.peak(lambda: [given[i:] for i in range(10)]) == 0  # views
