"""The judge of one of several steered runs: its checkpoints on the selection split."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from envs.job import judge
from envs.workload import Tokens

WEIGHTS = "model.safetensors"  # in a checkpoint of the Trainer, and in its saved model


class Judge(TrainerCallback):
    """Scores each planned checkpoint before it is saved; the best one so far is never deleted.

    Comes after the tuner's callback, which may put weights back. What it knows is part of the
    Trainer's state, so that a resumed run knows it too; no random number is used up.
    """

    def __init__(self, rows: Tokens) -> None:
        self._rows = rows

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An update is done; one at which a signal alone asks for a checkpoint is not judged."""
        if state.global_step % state.save_steps and state.global_step < state.max_steps:
            return
        found = judge(kwargs["model"], self._rows)
        if math.isfinite(found.loss):
            row = {"selection": found.metric, "selection_loss": found.loss}
            state.log_history.append(row | {"step": state.global_step})
        if best := best_check(state.log_history):
            state.best_global_step = best["step"]  # The Trainer keeps that checkpoint.


def best_check(log: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Step and scores of the best checkpoint in a Trainer's log: by metric, then by loss."""
    checks = [dict(row) for row in log if "selection" in row]
    return max(checks, key=lambda row: (row["selection"], -row["selection_loss"]), default=None)


def read_model(module: nn.Module, folder: Path) -> nn.Module:
    """The module with a checkpoint's weights."""
    module.load_state_dict(load_file(folder / WEIGHTS))
    return module
