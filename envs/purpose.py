"""Purpose: which objective a Trainer trains for, and which of them are alike."""

from typing import Any, get_args

from envs.head import unwrapped
from envs.task import Objective

_TAUGHT = {"reward": "reward", "dpo": "dpo", "cpo": "dpo", "orpo": "dpo", "kto": "kto",
           "sft": "sft", "grpo": "grpo", "rloo": "grpo"}  # by TRL's configuration  # fmt: skip
WEIGHED = ("dpo", "kto", "grpo")  # whose Trainers have a beta that weighs KL or the preference
_NAMED = {
    "TokenClassifi": "tokens",
    "Classifi": "classification",
    "MultipleChoice": "classification",
    "CausalLM": "causal",
    "LMHead": "causal",
    "ConditionalGeneration": "translation",
    "EncoderDecoder": "translation",
}


def objective_of(args: Any, model: Any) -> str:
    """What a Trainer's arguments and model say of its objective, as in `envs.task.Objective`.

    TRL's trainers are told by the name of their configuration, a subclass's by its bases'; others
    by their model: its ``objective``, or the name of its class. What says nothing is "own".
    """
    names = {cls.__name__.lower() for cls in type(args).__mro__}
    if told := next((kind for name, kind in _TAUGHT.items() if f"{name}config" in names), None):
        return told
    inner = unwrapped(model)
    if getattr(inner, "objective", None) in get_args(Objective):
        return str(inner.objective)
    name, config = type(inner).__name__, getattr(inner, "config", None)
    found = next((kind for word, kind in _NAMED.items() if word in name), "own")
    problem = getattr(config, "problem_type", None)
    single = problem is None and getattr(config, "num_labels", 2) == 1
    rates = found == "classification" and (problem == "regression" or single)
    return "regression" if rates else found


def kind(objective: str) -> str:
    """The objective that stands for all with the same loss on the same kind of model."""
    return {"sft": "causal", "headlines": "translation"}.get(objective, objective)
