"""Chance: the global random states of Python, NumPy and torch, put back, or a job's own."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def every() -> list[torch.device]:
    """All devices that have a random state beside the processor's."""
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]


@contextmanager
def put_back(devices: Sequence[torch.device]) -> Iterator[None]:
    """What is used up inside, or seeded, is put back. Devices not named are not looked at."""
    before = _read(devices)
    try:
        yield
    finally:
        _write(before, devices)


class RandomState:
    """The random states of one job: dropout and Trainers draw from the global ones."""

    def __init__(
        self, seed: int, devices: Sequence[torch.device], numpy_seed: int | None = None
    ) -> None:
        """numpy_seed: of 32 bits; None: the seed's."""
        self._devices = [device for device in devices if device.type == "cuda"]
        low = seed % 2**32 if numpy_seed is None else numpy_seed
        self._states: list[Any] = [
            random.Random(seed).getstate(),
            np.random.RandomState(low).get_state(),
            torch.Generator().manual_seed(seed).get_state(),
            *(torch.Generator(d).manual_seed(seed).get_state() for d in self._devices),
        ]

    @contextmanager
    def lent(self) -> Iterator[None]:
        """The global states are the job's inside, and what they were outside."""
        with put_back(self._devices):
            _write(self._states, self._devices)
            try:
                yield
            finally:
                self._states = _read(self._devices)

    @contextmanager
    def copied(self) -> Iterator[None]:
        """Likewise, but what is used up inside is given back."""
        states = self._states
        with self.lent():
            yield
        self._states = states


def _read(devices: Sequence[torch.device]) -> list[Any]:
    cuda = [torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"]
    return [random.getstate(), np.random.get_state(), torch.get_rng_state(), *cuda]


def _write(states: Sequence[Any], devices: Sequence[torch.device]) -> None:
    python, numpy, cpu, *cuda = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    for device, state in zip((d for d in devices if d.type == "cuda"), cuda, strict=True):
        torch.cuda.set_rng_state(state, device)
