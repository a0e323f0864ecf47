from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import settings

settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")  # a change fails the tests, not a draw or a busy machine

torch.set_num_threads(1)  # on tensors this small, more threads only wait for each other


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("data") / "words.csv")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("model") / "bert")


@pytest.fixture
def tiny_task(tiny_data, tiny_model):
    """A task that trains for real in a fraction of a second: ``tiny_task(steps=8)``."""
    base = tiny.task(tiny_data, tiny_model)
    return lambda **changes: replace(base, **changes)
