"""Evaluation: what held-out judges make of a policy's answers to held-out prompts."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from candidates import AT_ONCE, answers

from envs.setups import IGNORED, collator, judging, moved, token_nats

SAMPLES = 4  # answers to each prompt

Judge = Callable[[Sequence[str]], list[float]]


def evaluate(
    model: Any, start: Any, tokenizer: Any, prompts: Sequence[str], judges: Mapping[str, Judge]
) -> dict[str, Any]:
    """Sampled answers; the random numbers are always the same.

    Per judge the mean score of each prompt's answers; ``repeats``, the share of words that the
    same answer has had before; ``vocabulary``, the different words of all answers; ``nats`` a
    token under the model that the loop began with: high is strange to it.
    """
    columns = [answers(model, tokenizer, prompts, seed=1000 + n) for n in range(SAMPLES)]
    texts = [text for column in columns for text in column]
    scores = {name: np.array(judge(texts)).reshape(SAMPLES, -1) for name, judge in judges.items()}
    return {
        "scores": {name: found.mean(0).round(4).tolist() for name, found in scores.items()},
        "repeats": repeats(texts),
        "vocabulary": len({word for text in texts for word in words(text)}),
        "words": float(np.mean([len(words(text)) for text in texts])),
        "nats": nats(start, tokenizer, list(prompts) * SAMPLES, texts),
        "examples": list(zip(prompts[:8], texts[:8], strict=True)),
    }


def words(text: str) -> list[str]:
    """Its words in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def repeats(texts: Sequence[str]) -> float:
    """The share of all words that their text has had before."""
    found = [words(text) for text in texts]
    return sum(len(each) - len(set(each)) for each in found) / max(1, sum(map(len, found)))


def nats(model: Any, tokenizer: Any, prompts: Sequence[str], texts: Sequence[str]) -> float:
    """Mean nats a token of the texts after their prompts."""
    asked = tokenizer([prompt + "\n" for prompt in prompts])["input_ids"]
    replied = tokenizer([text + tokenizer.eos_token for text in texts])["input_ids"]
    rows = [
        {"input_ids": a + b, "labels": [IGNORED] * len(a) + b}
        for a, b in zip(asked, replied, strict=True)
    ]
    collate, total, count = collator(tokenizer.pad_token_id), 0.0, 0
    with judging(model) as device:
        for at in range(0, len(rows), AT_ONCE):
            batch = moved(collate(rows[at : at + AT_ONCE]), device)
            labels = batch.pop("labels")[:, 1:]
            lost, _, tokens = token_nats(model(**batch)["logits"][:, :-1], labels)
            total, count = total + float(lost), count + int(tokens)
    return total / count


def interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float, float]:
    """The mean, and the ends of its 95 % bootstrap interval over prompts."""
    found = np.asarray(values)
    index = np.random.default_rng(0).integers(0, len(found), (draws, len(found)))
    low, high = np.percentile(found[index].mean(1), [2.5, 97.5])
    return float(found.mean()), float(low), float(high)


def gain(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """How much higher the second is, prompt by prompt; likewise."""
    return interval(np.subtract(after, before).tolist())
