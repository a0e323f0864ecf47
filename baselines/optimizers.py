"""Optimizers: contestants that promise to need no schedule, or no rate.

Their packages are extras: ``pip install 'steersman[benchmark]'``. A run of theirs is a plain
`TorchJob` wherever the comparison computes it, and so never part of a pack.
"""

import importlib.util
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from typing import Any, ClassVar

import torch
from torch import nn

from baselines.method import Arena, Method, finish
from envs import optim
from envs.errors import BadInput
from envs.job import TorchJob
from envs.knobs import Knobs


@dataclass(frozen=True)
class ScheduleFree:
    """Schedule-free AdamW from the starting rate, after a short warm-up.

    Defazio et al. 2024 (The Road Less Scheduled, arXiv 2405.15682). The weights that are judged
    and kept are the average ones, those of the optimizer's ``eval()``.
    """

    warmup: float = 0.05  # share of the steps, as in the authors' AlgoPerf entry
    name: ClassVar[str] = "schedule-free"
    runs: ClassVar[int] = 1
    alone: ClassVar[bool] = True

    def __post_init__(self) -> None:
        need(self.name, "schedulefree")

    def describe(self) -> dict[str, Any]:
        """Its settings and its package's version."""
        return asdict(self) | {"version": version("schedulefree")}

    def run(self, arena: Arena) -> None:
        """One run."""
        knobs = Knobs(arena.start_rate, "constant", self.warmup)
        finish(arena, arena.open(knobs, partial(TorchJob, optimizer=schedule_free)))


@dataclass(frozen=True)
class Prodigy:
    """Prodigy, which estimates the rate; half a cosine to zero, as its authors advise.

    Mishchenko & Defazio 2023 (arXiv 2306.06101). The starting rate is not used: the rate in its
    trials is a factor of the estimate, 1.
    """

    name: ClassVar[str] = "prodigy"
    runs: ClassVar[int] = 1
    alone: ClassVar[bool] = True

    def __post_init__(self) -> None:
        need(self.name, "prodigyopt")

    def describe(self) -> dict[str, Any]:
        """Its package's version."""
        return {"version": version("prodigyopt")}

    def run(self, arena: Arena) -> None:
        """One run."""
        knobs = Knobs(1.0, "cosine")
        finish(arena, arena.open(knobs, partial(TorchJob, optimizer=prodigy)))


def need(name: str, package: str) -> None:
    """Raise `BadInput` if a method's package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise BadInput(f"{name}: needs a package; pip install {package}")


def schedule_free(parameters: list[nn.Parameter], knobs: Knobs) -> torch.optim.Optimizer:
    """A fresh `schedulefree.AdamWScheduleFree`."""
    made: torch.optim.Optimizer = import_module("schedulefree").AdamWScheduleFree(
        optim.group(parameters, knobs), lr=knobs.rate
    )
    return made


def prodigy(parameters: list[nn.Parameter], knobs: Knobs) -> torch.optim.Optimizer:
    """A fresh `prodigyopt.Prodigy`."""
    made: torch.optim.Optimizer = import_module("prodigyopt").Prodigy(
        optim.group(parameters, knobs), lr=knobs.rate, safeguard_warmup=True
    )
    return made


OPTIMIZERS: dict[str, type[Method]] = {"schedule-free": ScheduleFree, "prodigy": Prodigy}
"""Contestants of this kind, by name."""
