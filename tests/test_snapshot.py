"""Snapshots: what belongs to the weights that are kept, and where the copy lies."""

import pytest
import torch
from torch import nn

from envs.job import finite
from envs.snapshot import remember, statistics


class OnGpu:
    """A stand-in for a weight on a GPU; a copy of it is where it went."""

    device, nbytes = torch.device("cuda", 0), 100

    def detach(self):
        return self

    def to(self, place, copy):
        assert copy
        return torch.device(place)


@pytest.mark.parametrize(("free", "place"), [(399, "cpu"), (400, "cuda:0")])
def test_a_copy_goes_to_the_host_where_a_gpu_has_no_room_for_two(monkeypatch, free, place):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**9))
    assert remember([OnGpu(), OnGpu()]) == [torch.device(place)] * 2


def test_running_statistics_are_those_that_training_changes():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    model.register_buffer("table", torch.ones(3))
    assert [*statistics(model)] == ["0.running_mean", "0.running_var"]
    assert statistics(nn.Linear(2, 2)) == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_weights_are_finite_in_any_precision(dtype):
    weights = [torch.full((400,), 5e4, dtype=dtype), torch.ones(3)]  # a norm of a million
    assert finite(weights)
    for value in (float("inf"), float("nan")):
        weights[0][7] = value
        assert not finite(weights)
