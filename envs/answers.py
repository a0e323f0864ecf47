"""Answers: a prompt and what follows it, cut to a length and coded as one text."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from envs.setups import coded
from envs.task import Task


def prompts_of(tokenizer: Any, task: Task, prompts: Sequence[str]) -> list[str]:
    """Prompts that leave half of the task's length to the answer, and end a line."""
    return [cut(tokenizer, prompt, task.max_length // 2 - 1) + "\n" for prompt in prompts]


def cut(tokenizer: Any, text: str, length: int) -> str:
    """The beginning of a text, at most ``length`` tokens of it."""
    code = tokenizer(text, truncation=True, max_length=max(0, length), add_special_tokens=False,
                     return_offsets_mapping=True)  # fmt: skip
    ends = [end for _, end in code["offset_mapping"]]
    return text[: max(ends, default=0)]


def answered(
    tokenizer: Any, prompts: Sequence[str], answers: Sequence[str]
) -> list[tuple[list[int], list[int]]]:
    """Token ids of each prompt and of its answer, which are coded as one text, as TRL does.

    So what a tokenizer puts around a text is there once; the answer begins where the prompt's own
    code ends or, as at a separator, departs from it.
    """
    both = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    alone, whole = (coded(tokenizer, part, 10**6) for part in (prompts, both))
    found = []
    for prompt, ids in zip(alone, whole, strict=True):
        pairs = zip(prompt, ids, strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        found.append((ids[:same], ids[same:]))
    return found
