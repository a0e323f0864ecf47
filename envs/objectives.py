"""Objectives: the ready Trainer of every task that is not plain classification."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from envs import preferences, supervised, writing
from envs.errors import lookup
from envs.examples import Data, load
from envs.knobs import Knobs
from envs.setups import arguments
from envs.task import OBJECTIVE_TASKS, Objective, Task
from envs.trainer_job import Setup

__all__ = ["CARDS", "MAKERS", "TASKS", "Data", "arguments", "load", "prepare"]

TASKS = OBJECTIVE_TASKS


@dataclass(frozen=True)
class Card:
    """What an objective is trained by and judged by."""

    trainer: str  # the class
    library: str  # it is from
    cost: str  # never negative; what the tuner lowers
    metric: str  # higher is better; read on test
    marks: tuple[str, ...] = ()  # what the field gives the texts it writes, once it is trained


_ORDER, _LIKELY = "pairs in the right order", "one over perplexity"
CARDS: Mapping[Objective, Card] = {
    "classification": Card("Trainer", "transformers", "nats a text", "accuracy"),
    "regression": Card("Trainer", "transformers", "squared error, in variances", "R squared"),
    "tokens": Card("Trainer", "transformers", "nats a word", "accuracy of words"),
    "causal": Card("Trainer", "transformers", "nats a token", _LIKELY, ("chrF", "distinct-2")),
    "translation": Card(
        "Seq2SeqTrainer", "transformers", "nats a target token", _LIKELY, ("chrF", "BLEU")
    ),
    "headlines": Card(
        "Seq2SeqTrainer", "transformers", "nats a title token", _LIKELY, ("ROUGE-L",)
    ),
    "reward": Card("RewardTrainer", "trl", "Bradley-Terry nats a pair", _ORDER),
    "dpo": Card("DPOTrainer", "trl", "DPO nats a pair", _ORDER),
    "kto": Card("KTOTrainer", "trl", "KTO loss, 0 to 1", _ORDER),
    "sft": Card("SFTTrainer", "trl", "nats a reply token", _LIKELY),
    "grpo": Card("GRPOTrainer", "trl", "1 - mean reward", "mean reward"),
}
"""Every objective that has a task; the Trainer is the one that `prepare` makes."""

MAKERS: Mapping[str, Callable[[Task, int, Knobs], Setup]] = {
    "regression": supervised.regression,
    "tokens": supervised.tokens,
    "causal": supervised.causal,
    "translation": supervised.translation,
    "headlines": supervised.headlines,
    "reward": preferences.reward,
    "dpo": preferences.dpo,
    "kto": preferences.kto,
    "sft": writing.sft,
    "grpo": writing.grpo,
}


def prepare(task: Task, seed: int, knobs: Knobs) -> Setup:
    """The Trainer of the task's objective, and how its weights are judged.

    The seed draws new weights, the order of the data and dropout; the caller's random states are
    untouched. Dropout and generation inside ``train()`` draw from the global states of whoever
    runs it. Raises `BadInput` before any training.
    """
    return lookup(MAKERS, task.objective, "objective with a Trainer")(task, seed, knobs)
