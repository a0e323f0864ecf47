"""Inputs: the tasks that benchmarks run on, from shipped data with its real vocabulary."""

from typing import Any

from envs import workload
from envs.task import Task, find

STEPS = 500  # of a run; a measurement stays within it
CLASSES = 5  # of the news


def full_rows(width: int = 32, batch: int = 16, tokens: int = 16, **changes: Any) -> Task:
    """News cut to that many tokens, every row full, for the shipped encoder of that width.

    Read at the first token, as the heads of transformers' own classifiers do.
    """
    task = find(
        "bbc", model=f"tiny-{width}", batch=batch, max_length=tokens, rows=1000,
        **{"steps": STEPS, "interval": 10, "pooling": "first", **changes},
    )  # fmt: skip
    assert (workload.load(task).rows["train"].lengths == tokens).mean() > 0.99
    return task


def minilm(**changes: Any) -> Task:
    """MiniLM-L6 on the same news, 16 rows of 32 tokens: `steersman fetch` gets both.

    Without dropout: a pack draws it otherwise than a plain loop. Read at the first token.
    """
    return find("bbc/minilm-l6", **{"steps": STEPS, "dropout": 0.0, "pooling": "first", **changes})
