"""Learning: what share of the time of PPO's training goes into anything but fine-tuning."""

import functools
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from inputs import full_rows

from envs.packed import Pack
from tuner.curriculum import TrainConfig, iteration_seed, opened, plan_of
from tuner.train import make_agent, survey

VERBS = ("__init__", "open", "close", "advance", "apply", "evaluate", "snapshot", "restore")


class Clock:
    """Seconds spent inside the methods it was put around."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, owner: type, verbs: tuple[str, ...]) -> None:
        """Time these methods of a class from now on."""
        for verb in verbs:
            setattr(owner, verb, self._timed(getattr(owner, verb)))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.process_time()
            try:
                return method(*arguments, **options)
            finally:
                self.seconds += time.process_time() - began

        return timed


def outside(
    envs: int = 16, iterations: int = 2, width: int = 32, compiled: bool = False
) -> dict[str, Any]:
    """The share of PPO's iterations, rollouts and updates alike, spent outside the packs.

    One iteration warms up and is not counted; nor is the survey, which learns nothing.
    """
    task = asdict(full_rows(width, steps=50, interval=5, pooling="mean"))
    config = TrainConfig(
        tasks=(task,), envs=envs, workers=0, surrogate=0.0, budget="", iterations=iterations + 1,
        compile=compiled,
    )  # fmt: skip
    clock, whole, decisions = Clock(), 0.0, 0
    clock.around(Pack, VERBS)
    with opened(config, plan_of(config)) as curriculum:
        recorder = curriculum.envs("tasks")
        agent = make_agent(config, recorder, survey(recorder, config.seed))
        for number in range(iterations + 1):
            if number == 1:
                clock.seconds = whole = 0.0
                recorder.forget()
            began = time.process_time()
            agent.learn(recorder, iteration_seed(config.seed, number), 0.0)
            whole += time.process_time() - began
        decisions = recorder.decisions
    return {
        "share": 1 - clock.seconds / whole, "seconds": whole, "decisions_a_second":
        decisions / whole, "agent": "ppo", "envs": envs, "pack": config.pack, "compiled": compiled,
        "updates_a_decision": config.interval, "width": width, "decisions": decisions,
    }  # fmt: skip
