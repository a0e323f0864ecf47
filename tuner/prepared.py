"""A task of another objective than classification, run by its own Trainer."""

import math
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import IntervalStrategy

from envs import objectives
from envs.chance import every, put_back
from envs.files import full_disk, write_atomic
from envs.knobs import Knobs
from envs.snapshot import Snapshot, remember, statistics
from envs.task import Task
from envs.trainer_job import Setup
from tuner.callback import TunerCallback
from tuner.judge import best_check
from tuner.policy import Policy
from tuner.settings import ApplyConfig

TRAINED = "trained.safetensors"  # of a trial until one is chosen: what was in training, at its best


class Keeper(TrainerCallback):
    """Scores the model on the selection rows at every decision; keeps the best weights in memory.

    Comes after the tuner's callback, which may put weights back. No random number is used up.
    """

    def __init__(self, setup: Setup, interval: int) -> None:
        self._setup, self._interval = setup, interval
        self._log: list[dict[str, Any]] = []
        self._weights: Snapshot | None = None
        self.trained = _trained(setup)

    @property
    def best(self) -> dict[str, Any] | None:
        """Step and scores of the weights kept; None if none could be scored."""
        return best_check(self._log)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An update is done."""
        if state.global_step % self._interval and state.global_step < state.max_steps:
            return
        with put_back(every()):
            found = self._setup.score(self._setup.trainer, "selection")
        if math.isfinite(found.loss):
            scores = {"selection": found.metric, "selection_loss": found.loss}
            self._log.append({"step": state.global_step, **scores})
            if self.best == self._log[-1]:
                self._weights = remember([*self.trained.values()], self._weights)

    def put(self) -> None:
        """The best weights, back in the model."""
        if self._weights is not None:
            _put(self.trained, dict(zip(self.trained, self._weights, strict=True)))


def _trained(setup: Setup) -> dict[str, torch.Tensor]:
    model = setup.trainer.model
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return weights | statistics(model)


def _put(into: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in into.items():
            parameter.copy_(weights[name])


def run(
    task: Task,
    config: ApplyConfig,
    knobs: Knobs,
    folder: Path,
    policy: Policy | None,
    watch: TrainerCallback,
    judged: bool = False,
) -> dict[str, Any]:
    """One run, steered if there is a policy -> its ``model/`` and what it came to.

    The model is the last one, and judged on test; or, where trials are to be ``judged`` against
    each other, the best one by the selection rows, which `judge` is for. The tuner sees the task's
    cost on the validation rows, as in a comparison. Nothing is kept to resume from.
    """
    began = time.perf_counter()
    setup = objectives.prepare(task, config.seed, knobs)
    trainer = setup.trainer
    args = trainer.args
    args.output_dir = str(folder / "trainer")  # nothing is saved there
    args.logging_strategy, args.logging_steps = IntervalStrategy.STEPS, task.interval
    args.eval_strategy, args.eval_steps = IntervalStrategy.STEPS, task.interval
    args.eval_on_start = True
    trainer.evaluate = _evaluation(setup)
    if policy is not None:
        trainer.add_callback(
            TunerCallback(
                policy,
                mode=config.mode,
                advise=config.advise,
                decisions=task.decisions,
                classes=setup.classes,
                log=folder / "audit.jsonl",
                trainer=trainer,
            )
        )
    keeper = Keeper(setup, task.interval)
    if judged:
        trainer.add_callback(keeper)
    trainer.add_callback(watch)
    set_seed(config.seed)
    start = setup.score(trainer, "validation").loss
    trainer.train()
    keeper.put()
    final: dict[str, Any] = {"validation_loss": setup.score(trainer, "validation").loss}
    with full_disk(folder):
        trainer.save_model(str(folder / "model"))
    if judged:
        write_atomic(
            folder / TRAINED, save({k: w.detach().contiguous() for k, w in keeper.trained.items()})
        )
    else:
        final |= _tested(setup)
    curve = [
        {"step": row["step"], "train_loss": row["loss"]}
        for row in trainer.state.log_history
        if "loss" in row
    ]
    result = {
        "start": {"validation_loss": start},
        "final": final,
        "curve": curve,
        "seconds": round(time.perf_counter() - began, 1),
    }
    return result | ({"best": keeper.best} if judged else {})


def judge(task: Task, config: ApplyConfig, knobs: Knobs, folder: Path) -> dict[str, Any]:
    """What the model of a trial is worth on test."""
    setup = objectives.prepare(task, config.seed, knobs)
    _put(_trained(setup), load_file(folder / TRAINED))
    set_seed(config.seed)
    return _tested(setup)


def _tested(setup: Setup) -> dict[str, Any]:
    """The metric on test and, where a model writes, the marks that the field gives its texts."""
    found: dict[str, Any] = {"test": setup.score(setup.trainer, "test").metric}
    if setup.marks is not None:
        found["marks"] = dict(setup.marks(setup.trainer, "test"))
    return found


def _evaluation(setup: Setup) -> Any:
    """What takes the place of ``Trainer.evaluate``: the task's own cost on the validation rows."""
    trainer = setup.trainer

    def evaluate(*_: Any, **__: Any) -> dict[str, float]:
        metrics = {"eval_loss": setup.score(trainer, "validation").loss}
        trainer.log(dict(metrics))
        trainer.control = trainer.callback_handler.on_evaluate(
            trainer.args, trainer.state, trainer.control, metrics
        )
        return metrics

    return evaluate
