"""A task of another objective than classification, run by its own Trainer."""

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import IntervalStrategy

from envs import objectives
from envs.knobs import Knobs
from envs.task import Task
from envs.trainer_job import Setup
from tuner.callback import TunerCallback
from tuner.policy import Policy
from tuner.settings import ApplyConfig


def run(
    task: Task,
    config: ApplyConfig,
    knobs: Knobs,
    folder: Path,
    policy: Policy | None,
    watch: TrainerCallback,
) -> dict[str, Any]:
    """One run, steered if there is a policy -> its ``model/`` and what it came to.

    The last model is judged on test by the task's own metric and, where it writes, by the marks
    that the field gives its texts. The tuner sees the task's cost on the validation rows, as in a
    comparison. Nothing is kept to resume from.
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
    trainer.add_callback(watch)
    set_seed(config.seed)
    start = setup.score(trainer, "validation").loss
    trainer.train()
    final: dict[str, Any] = {
        "validation_loss": setup.score(trainer, "validation").loss,
        "test": setup.score(trainer, "test").metric,
    }
    trainer.save_model(str(folder / "model"))
    if setup.marks is not None:
        final["marks"] = dict(setup.marks(trainer, "test"))
    curve = [
        {"step": row["step"], "train_loss": row["loss"]}
        for row in trainer.state.log_history
        if "loss" in row
    ]
    return {
        "start": {"validation_loss": start},
        "final": final,
        "curve": curve,
        "seconds": round(time.perf_counter() - began, 1),
    }


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
