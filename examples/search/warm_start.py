"""A search that begins where one steered run ended, beside the same search from nothing.

python examples/search/warm_start.py runs/demo/policy.safetensors
"""

import sys
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution

from envs.job import TorchJob
from envs.knobs import SHAPES, Knobs
from envs.task import Task, find
from tuner.sampler import SteersmanSampler, find_start, warm_start

SPACE = {
    "learning_rate": FloatDistribution(1e-6, 1e-1, log=True),
    "head_rate": FloatDistribution(0.3, 30.0, log=True),  # times that, for the new head
    "schedule": CategoricalDistribution(SHAPES),
    "weight_decay": FloatDistribution(1e-5, 0.1, log=True),
}
NAMES = {"rate": "learning_rate", "head_rate": "head_rate", "shape": "schedule"}  # ours -> these


def accuracy(task: Task, params: dict[str, Any]) -> float:
    decay, head = params["weight_decay"], params["head_rate"]
    knobs = Knobs(params["learning_rate"], params["schedule"], weight_decay=decay, head_rate=head)
    job = TorchJob(task, seed=0, knobs=knobs)
    job.advance(task.steps)
    return job.evaluate("selection").metric


def main(policy: Any, task: Task | None = None, trials: int = 10) -> dict[str, optuna.Study]:
    task = task or find("bbc", steps=60, interval=6)
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    found = find_start(policy, task)  # one steered run
    print(f"found: rate {found[0].rate:.2g}, accuracy {found[0].score:.3f}")

    warm = SteersmanSampler(found, names=NAMES, seed=0)
    cold = optuna.samplers.TPESampler(seed=0)
    studies = {}
    for name, sampler in (("warm", warm), ("cold", cold)):
        study = studies[name] = optuna.create_study(direction="maximize", sampler=sampler)
        if name == "warm":
            warm_start(study, found, NAMES, SPACE)
        for _ in range(trials):
            trial = study.ask(SPACE)
            study.tell(trial, accuracy(task, trial.params))
        values = [trial.value for trial in study.trials]
        best = " ".join(f"{max(values[: count + 1]):.3f}" for count in range(trials))
        print(f"{name}: best accuracy after each trial: {best}")
    return studies


if __name__ == "__main__":
    main(*sys.argv[1:2] or ["runs/demo/policy.safetensors"])
