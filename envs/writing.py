"""Writing: replies learned from demonstrations (SFT) or from their pay (GRPO), as Setups."""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from envs import examples, texts
from envs.answers import answered, prompts_of
from envs.errors import BadInput
from envs.job import Score
from envs.knobs import Knobs
from envs.rows import plain_key
from envs.setups import (
    AT_ONCE,
    IGNORED,
    arguments,
    batches,
    collator,
    decoder_of,
    judging,
    quiet,
    silent,
    table,
    tokenizer_of,
)
from envs.supervised import judge_tokens, likelihood
from envs.task import Split, Task
from envs.trainer_job import Setup

GROUP = 4  # completions of a prompt that GRPO compares
COMPLETION = 12  # tokens that GRPO lets the model write
Reward = Callable[..., Sequence[float]]
"""Called with ``completions=[...]``, and more by name -> a number from 0 to 1 for each."""


def sft(task: Task, seed: int, knobs: Knobs) -> Setup:
    """Replies to statements, learned from demonstrations; the statement itself is not learned.

    Cost: mean nats a token of the replies. Metric: one over the perplexity.
    """
    from trl import SFTConfig, SFTTrainer

    tokenizer = tokenizer_of(task)
    end = tokenizer.eos_token or ""
    rows: dict[Split, list[dict[str, Any]]] = {}
    for split, part in examples.load(task).rows.items():
        prompts = prompts_of(tokenizer, task, [row.statement for row in part])
        rows[split] = [
            {
                "input_ids": (prompt + reply)[: task.max_length],
                "completion_mask": ([0] * len(prompt) + [1] * len(reply))[: task.max_length],
            }
            for prompt, reply in answered(tokenizer, prompts, [row.reply + end for row in part])
        ]
    model = decoder_of(task, seed)
    with quiet(seed):
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                **arguments(task, seed, knobs), max_length=None, completion_only_loss=True
            ),
            train_dataset=table(rows["train"]),
            processing_class=tokenizer,
        )
    ready = batches(
        {
            split: [
                {
                    "input_ids": row["input_ids"],
                    "labels": [
                        token if counts else IGNORED
                        for token, counts in zip(
                            row["input_ids"], row["completion_mask"], strict=True
                        )
                    ],
                }
                for row in part
            ]
            for split, part in rows.items()
        },
        collator(tokenizer.pad_token_id),
    )

    def score(trainer: Any, split: Split) -> Score:
        nats, _ = judge_tokens(trainer.model, ready[split], shift=True)
        return Score(nats, likelihood(nats))

    return Setup(silent(trainer), score, len(rows["train"]))


def grpo(task: Task, seed: int, knobs: Knobs, *, judge: Reward | None = None) -> Setup:
    """Group-relative policy optimisation (Shao et al. 2024): replies that are paid more.

    judge: pays a reply from 0 to 1; `kindness` unless another is given. Cost: 1 minus the mean
    pay of one sampled reply to each statement of the split, the random numbers always the same.
    Metric: the mean pay.
    """
    from trl import GRPOConfig, GRPOTrainer

    if task.batch % GROUP:
        raise BadInput(
            f"task: batch: {task.batch} is no multiple of the {GROUP} completions of a prompt; "
            f"give one"
        )
    pay = _checked(judge or kindness)
    pay(completions=["one", "two"], prompts=["", ""])  # a bad one is refused before the run
    tokenizer = tokenizer_of(task)
    prompts = {
        split: prompts_of(tokenizer, task, [row.statement for row in part])
        for split, part in examples.load(task).rows.items()
    }
    model = decoder_of(task, seed)
    with quiet(seed):
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=pay,
            args=GRPOConfig(
                **arguments(task, seed, knobs),
                num_generations=GROUP,
                max_completion_length=COMPLETION,
            ),
            train_dataset=table([{"prompt": prompt} for prompt in prompts["train"]]),
            processing_class=tokenizer,
        )

    def score(trainer: Any, split: Split) -> Score:
        found: list[float] = []
        cuda = range(torch.cuda.device_count())
        with judging(trainer.model) as device, torch.random.fork_rng(devices=cuda):
            torch.manual_seed(0)
            for at in range(0, len(prompts[split]), AT_ONCE):
                part = prompts[split][at : at + AT_ONCE]
                code = tokenizer(part, return_tensors="pt", padding=True, padding_side="left")
                ids = code["input_ids"].to(device)
                try:
                    written = trainer.model.generate(
                        input_ids=ids, attention_mask=code["attention_mask"].to(device),
                        generation_config=trainer.generation_config,
                    )[:, ids.shape[1] :]  # fmt: skip
                except RuntimeError as error:
                    if "probability tensor" not in str(error):
                        raise
                    return Score(math.nan, 0.0)  # the run has diverged: nothing can be drawn
                replies = tokenizer.batch_decode(written, skip_special_tokens=True)
                found += pay(completions=replies, prompts=part)
        mean = sum(found) / len(found)
        return Score(1 - mean, mean)

    return Setup(silent(trainer), score, len(prompts["train"]))


def kindness(completions: Sequence[str], **_: Any) -> list[float]:
    """The mean rating of a text's words, from -4 … 4 to 0 … 1; a word nobody rated counts 0.

    A word's rating is the mean of the ratings of the training texts it occurs in.
    """
    lexicon = _lexicon()

    def rated(text: str) -> float:
        words = re.findall(r"\w+", plain_key(text))
        return sum(lexicon.get(word, 0.0) for word in words) / max(1, len(words))

    return [0.5 + rated(text) / (2 * texts.RATING) for text in completions]


@functools.cache
def _lexicon(least: int = 5) -> dict[str, float]:
    sums: dict[str, list[float]] = {}
    for row in texts.ratings()["train"]:
        for word in set(re.findall(r"\w+", plain_key(row.text))):
            sums.setdefault(word, []).append(row.mean)
    return {word: sum(all_) / len(all_) for word, all_ in sums.items() if len(all_) >= least}


def _checked(judge: Reward) -> Reward:
    """The same judge, but what it must not return is told in one sentence.

    TRL itself takes None and NaN for "no reward" and goes on.
    """

    @functools.wraps(judge)
    def pay(completions: Sequence[str], **more: Any) -> list[float]:
        name = getattr(judge, "__name__", type(judge).__name__)
        found: Any = judge(completions=completions, **more)
        try:
            values = [float(value) for value in found]
        except (TypeError, ValueError):
            raise BadInput(
                f"grpo: reward {name}: returned {str(found)[:60]}; return a number for each text"
            ) from None
        if len(values) != len(completions):
            raise BadInput(
                f"grpo: reward {name}: returned {len(values)} numbers for {len(completions)} "
                "texts; return one for each"
            )
        for value in values:
            if not (math.isfinite(value) and 0 <= value <= 1):
                raise BadInput(f"grpo: reward {name}: {value} is out of range; return 0 to 1")
        return values

    return pay
