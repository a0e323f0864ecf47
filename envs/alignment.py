"""Alignment: TRL's trainers, from reward models to rewards, as Setups."""

import copy
import functools
import math
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from envs import examples, texts
from envs.errors import BadInput
from envs.job import Score, spread
from envs.knobs import Knobs
from envs.rows import plain_key
from envs.setups import (
    AT_ONCE,
    IGNORED,
    Batch,
    arguments,
    batches,
    coded,
    collator,
    judging,
    model_of,
    moved,
    quiet,
    silent,
    tokenizer_of,
)
from envs.supervised import judge_tokens, likelihood
from envs.task import Split, Task
from envs.trainer_job import Setup

BETA = 0.1  # of DPO and KTO: TRL's default
GROUP = 4  # completions of a prompt that GRPO compares
COMPLETION = 12  # tokens that GRPO lets the model write
Reward = Callable[..., Sequence[float]]
"""Called with ``completions=[...]``, and more by name -> a number from 0 to 1 for each."""


def reward(task: Task, seed: int, knobs: Knobs) -> Setup:
    """A model whose one output is higher for the preferred answer.

    Cost: Bradley-Terry loss in nats a pair (0.69 knows nothing). Metric: share of pairs in the
    right order.
    """
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    tokenizer = tokenizer_of(task)
    rows = {}
    for split, part in examples.load(task).rows.items():
        chosen, rejected = (
            coded(tokenizer, [f"{row.prompt}\n{getattr(row, side)}" for row in part],
                  task.max_length)
            for side in ("chosen", "rejected")
        )  # fmt: skip
        rows[split] = [
            {"chosen_ids": c, "rejected_ids": r} for c, r in zip(chosen, rejected, strict=True)
        ]
    model = model_of(task, seed, AutoModelForSequenceClassification, ("score", "classifier"),
                     num_labels=1)  # fmt: skip
    with quiet(seed):
        trainer = RewardTrainer(
            model=model,
            args=RewardConfig(
                **arguments(task, seed, knobs),
                max_length=None,
                disable_dropout=False,  # the task says how much
            ),
            train_dataset=_table(rows["train"]),
            processing_class=tokenizer,
        )
    ready = {
        split: [trainer.data_collator(part[at : at + AT_ONCE])
                for at in range(0, len(part), AT_ONCE)]
        for split, part in rows.items()
    }  # fmt: skip

    def score(trainer: Any, split: Split) -> Score:
        gaps = []
        with judging(trainer.model) as device:
            for batch in ready[split]:
                logits = trainer.model(**moved(batch, device))["logits"].squeeze(-1)
                chosen, rejected = logits.chunk(2)
                gaps.append(chosen - rejected)
            return _ordered(torch.cat(gaps))

    return Setup(silent(trainer), score, len(rows["train"]))


def dpo(task: Task, seed: int, knobs: Knobs) -> Setup:
    """Direct preference optimisation (Rafailov et al. 2023).

    Cost: its loss in nats a pair (0.69 at the start). Metric: share of pairs in the right order.
    """
    from trl import DPOConfig, DPOTrainer

    tokenizer, rows = _pairs(task)
    model, reference = _policy(task, seed)
    with quiet(seed):
        trainer = DPOTrainer(
            model=model,
            ref_model=reference,
            args=DPOConfig(**arguments(task, seed, knobs), beta=BETA, max_length=task.max_length),
            train_dataset=_table(rows["train"]),
            processing_class=tokenizer,
        )
    judge = _Judge(tokenizer, rows, task.max_length)

    def score(trainer: Any, split: Split) -> Score:
        chosen, rejected, _ = judge.ratios(trainer, split)
        return _ordered(BETA * (chosen - rejected))

    return Setup(silent(trainer), score, len(rows["train"]))


def kto(task: Task, seed: int, knobs: Knobs) -> Setup:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024): each answer alone is good or bad.

    Cost: its loss (0.5 at the start, 0 to 1). Metric: share of pairs in the right order.
    """
    from trl import KTOConfig, KTOTrainer

    tokenizer, rows = _pairs(task)
    model, reference = _policy(task, seed)
    single = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in rows["train"]
        for side in ("chosen", "rejected")
    ]
    # TRL reads these rows in order, for it pairs neighbours to estimate the divergence.
    order = torch.randperm(
        len(single), generator=torch.Generator().manual_seed(spread(seed, 3)[0])
    ).tolist()
    with quiet(seed):
        trainer = KTOTrainer(
            model=model,
            ref_model=reference,
            args=KTOConfig(**arguments(task, seed, knobs), beta=BETA, max_length=task.max_length),
            train_dataset=_table([single[index] for index in order]),
            processing_class=tokenizer,
        )
    judge = _Judge(tokenizer, rows, task.max_length)

    def score(trainer: Any, split: Split) -> Score:
        chosen, rejected, crossed = judge.ratios(trainer, split, crossed=True)
        divergence = crossed.mean().clamp(min=0)
        good = torch.sigmoid(BETA * (divergence - chosen))
        bad = torch.sigmoid(BETA * (rejected - divergence))
        cost, right = torch.stack(
            [torch.cat([good, bad]).mean(), (chosen > rejected).to(good.dtype).mean()]
        ).tolist()
        return Score(cost, right)

    return Setup(silent(trainer), score, len(single))


def sft(task: Task, seed: int, knobs: Knobs) -> Setup:
    """Replies to statements, learned from demonstrations; the statement itself is not learned.

    Cost: mean nats a token of the replies. Metric: one over the perplexity.
    """
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = tokenizer_of(task)
    end = tokenizer.eos_token or ""
    rows: dict[Split, list[dict[str, Any]]] = {}
    for split, part in examples.load(task).rows.items():
        prompts = _prompts(tokenizer, task, [row.statement for row in part])
        rows[split] = [
            {
                "input_ids": (prompt + reply)[: task.max_length],
                "completion_mask": ([0] * len(prompt) + [1] * len(reply))[: task.max_length],
            }
            for prompt, reply in _answered(tokenizer, prompts, [row.reply + end for row in part])
        ]
    model = model_of(task, seed, AutoModelForCausalLM)
    with quiet(seed):
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                **arguments(task, seed, knobs), max_length=None, completion_only_loss=True
            ),
            train_dataset=_table(rows["train"]),
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
    from transformers import AutoModelForCausalLM
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
        split: _prompts(tokenizer, task, [row.statement for row in part])
        for split, part in examples.load(task).rows.items()
    }
    model = model_of(task, seed, AutoModelForCausalLM)
    with quiet(seed):
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=pay,
            args=GRPOConfig(
                **arguments(task, seed, knobs),
                num_generations=GROUP,
                max_completion_length=COMPLETION,
            ),
            train_dataset=_table([{"prompt": prompt} for prompt in prompts["train"]]),
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


def _ordered(gaps: Tensor) -> Score:
    """Logits of "the first is preferred" -> their loss, and the share that is right."""
    cost, right = torch.stack(
        [functional.softplus(-gaps).mean(), (gaps > 0).to(gaps.dtype).mean()]
    ).tolist()
    return Score(cost, right)


def _table(rows: list[dict[str, Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(rows)


def _policy(task: Task, seed: int) -> tuple[nn.Module, nn.Module | None]:
    """A language model and the frozen copy it is compared with; an adapter needs no copy."""
    from transformers import AutoModelForCausalLM

    model = model_of(task, seed, AutoModelForCausalLM)
    return model, None if task.adapter == "lora" else copy.deepcopy(model)


def _prompts(tokenizer: Any, task: Task, prompts: Sequence[str]) -> list[str]:
    """Prompts that leave half of the task's length to the answer, and end a line."""
    return [_cut(tokenizer, prompt, task.max_length // 2 - 1) + "\n" for prompt in prompts]


def _cut(tokenizer: Any, text: str, length: int) -> str:
    code = tokenizer(text, truncation=True, max_length=length, return_offsets_mapping=True,
                     add_special_tokens=False)  # fmt: skip
    ends = [end for _, end in code["offset_mapping"]]
    return text[: max(ends, default=0)]


def _answered(
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


def _pairs(task: Task) -> tuple[Any, dict[Split, list[dict[str, str]]]]:
    """The tokenizer, and prompt, chosen and rejected answer as text, within the task's length."""
    tokenizer = tokenizer_of(task)
    if tokenizer.eos_token is None:
        raise BadInput(f"{task.model}: tokenizer: no end token; set tokenizer.eos_token, save it")
    half, rows = task.max_length // 2 - 1, {}
    for split, part in examples.load(task).rows.items():
        found = [
            {
                "prompt": _cut(tokenizer, row.prompt, half) + "\n",
                "chosen": _cut(tokenizer, row.chosen, half),
                "rejected": _cut(tokenizer, row.rejected, half),
            }
            for row in part
        ]
        rows[split] = [row for row in found if row["chosen"] != row["rejected"]]
        if not rows[split]:
            raise BadInput(
                f"{task.dataset}: {split}: no two answers differ in their first {half} tokens; "
                "raise max_length"
            )
    return tokenizer, rows


class _Judge:
    """Log-probabilities of answers, relative to the reference model's, which are computed once."""

    def __init__(
        self, tokenizer: Any, rows: dict[Split, list[dict[str, str]]], length: int
    ) -> None:
        self._tokenizer, self._rows, self._length = tokenizer, rows, length
        self._known: dict[tuple[Split, str], tuple[list[Batch], Tensor]] = {}

    def ratios(
        self, trainer: Any, split: Split, crossed: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(rows,) log ratios of the chosen, the rejected and, if asked, another row's answers."""
        sides = ("chosen", "rejected", *(["crossed"] if crossed else []))
        found = [self._ratio(trainer, split, side) for side in sides]
        return found[0], found[1], found[-1]

    def _ratio(self, trainer: Any, split: Split, side: str) -> Tensor:
        if (split, side) not in self._known:
            ready = self._batches(split, side)
            own = trainer.ref_model
            without = nullcontext() if own is not None else trainer.model.disable_adapter()
            with without:
                known = _log_likelihood(trainer.model if own is None else own, ready)
            self._known[split, side] = ready, known
        ready, known = self._known[split, side]
        return _log_likelihood(trainer.model, ready) - known

    def _batches(self, split: Split, side: str) -> list[Batch]:
        rows, end = self._rows[split], self._tokenizer.eos_token
        sides = ("chosen", "rejected") if side == "crossed" else (side,)
        found = _answered(
            self._tokenizer,
            [row["prompt"] for row in rows for _ in sides],
            [row[name] + end for row in rows for name in sides],
        )
        answers = [answer for _, answer in found]
        if side == "crossed":  # from half the rows away: those of one prompt are neighbours
            away = len(rows) // 2 * 2
            answers = answers[away:] + answers[:away]
        whole = [
            {
                "input_ids": (prompt + answer)[: self._length],
                "labels": ([IGNORED] * len(prompt) + answer)[: self._length],
            }
            for (prompt, _), answer in zip(found, answers, strict=True)
        ]
        return batches({"test": whole}, collator(self._tokenizer.pad_token_id))["test"]


def _log_likelihood(model: nn.Module, ready: Sequence[Batch]) -> Tensor:
    """Of each row's labelled tokens: (rows,) nats, never positive."""
    found = []
    with judging(model) as device:
        for batch in ready:
            here = moved(batch, device)
            labels = here.pop("labels")[:, 1:]
            logits = model(**here, use_cache=False)["logits"][:, :-1]
            nats = functional.cross_entropy(
                logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED
            )
            found.append(-nats.sum(1))
    return torch.cat(found)
