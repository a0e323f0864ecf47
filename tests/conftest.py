import os
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


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A folder that pip takes packages from, and nothing else; with a cache of its own."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("STEERSMAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder
