"""Random histories for golden observations: the same ones on every machine."""

import math
from collections.abc import Iterator

import numpy as np

from envs.knobs import OPTIMIZERS, Decision
from envs.progress import Context, Progress

ODD = (math.nan, math.inf, -math.inf, 0.0, -1.0, 1e308, 5e-324, 1e30)


def cases(count: int = 60) -> Iterator[tuple[list[Progress], Context]]:
    """Histories of 1 to 14 reports: a third sane, a third with odd values, a third gone wild."""
    for number in range(count):
        rng = np.random.default_rng([3, number])
        odd = (0.0, 0.15, 0.6)[number % 3]
        context = Context(
            total=int(rng.integers(1, 500)), decisions=int(rng.integers(1, 30)),
            parameters=int(10 ** rng.uniform(0, 10)), rows=int(10 ** rng.uniform(0, 6)),
            classes=int(rng.integers(0, 60)), adapter=("full", "lora")[int(rng.integers(2))],
            optimizer=OPTIMIZERS[int(rng.integers(3))], start_rate=value(rng, odd / 3, 1e-3),
        )  # fmt: skip
        yield [report(rng, odd) for _ in range(int(rng.integers(1, 15)))], context


def value(rng: np.random.Generator, odd: float, scale: float = 1.0) -> float:
    """A log-normal number, or an odd one."""
    drawn, wild = scale * math.exp(rng.standard_normal()), ODD[int(rng.integers(len(ODD)))]
    return wild if rng.random() < odd else drawn


def report(rng: np.random.Generator, odd: float) -> Progress:
    """A random report."""
    decision = Decision(value(rng, odd), rollback=bool(rng.random() < 0.2))
    losses = tuple(value(rng, odd / 3) for _ in range(int(rng.integers(0, 8))))
    return Progress(
        step=int(rng.integers(0, 500)), rate=value(rng, odd, 1e-3), factor=value(rng, odd),
        losses=losses, validation=value(rng, odd), age=int(rng.choice([0, 0, 1, 3])),
        gradient=value(rng, odd), clipped=value(rng, odd), update=value(rng, odd, 1e-3),
        cosine=value(rng, odd) - 1, finite=True, decision=decision,
    )  # fmt: skip
