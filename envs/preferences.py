"""Preferences: reward models, DPO and KTO, which learn from pairs of answers, as Setups."""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from envs import examples
from envs.answers import answered, cut, prompts_of
from envs.errors import BadInput
from envs.job import Score, spread
from envs.knobs import Knobs
from envs.setups import (
    AT_ONCE,
    IGNORED,
    Batch,
    arguments,
    batches,
    coded,
    collator,
    decoder_of,
    judging,
    model_of,
    moved,
    quiet,
    silent,
    table,
    tokenizer_of,
)
from envs.task import Split, Task
from envs.trainer_job import Setup

BETA = 0.1  # of DPO and KTO: TRL's default


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
        prompts = prompts_of(tokenizer, task, [row.prompt for row in part])
        chosen, rejected = (
            coded(tokenizer, [p + getattr(row, side) for p, row in zip(prompts, part, strict=True)],
                  task.max_length)
            for side in ("chosen", "rejected")
        )  # fmt: skip
        found = [
            {"chosen_ids": c, "rejected_ids": r} for c, r in zip(chosen, rejected, strict=True)
        ]
        rows[split] = _apart(task, split, found, "_ids")
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
            train_dataset=table(rows["train"]),
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
            train_dataset=table(rows["train"]),
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
            train_dataset=table([single[index] for index in order]),
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


def _ordered(gaps: Tensor) -> Score:
    """Logits of "the first is preferred" -> their loss, and the share that is right."""
    cost, right = torch.stack(
        [functional.softplus(-gaps).mean(), (gaps > 0).to(gaps.dtype).mean()]
    ).tolist()
    return Score(cost, right)


def _policy(task: Task, seed: int) -> tuple[nn.Module, nn.Module | None]:
    """A language model and the frozen copy it is compared with; an adapter needs no copy."""
    model = decoder_of(task, seed)
    return model, None if task.adapter == "lora" else copy.deepcopy(model)


def _pairs(task: Task) -> tuple[Any, dict[Split, list[dict[str, str]]]]:
    """The tokenizer, and prompt, chosen and rejected answer as text, within the task's length."""
    tokenizer = tokenizer_of(task)
    if tokenizer.eos_token is None:
        raise BadInput(f"{task.model}: tokenizer: no end token; set tokenizer.eos_token, save it")
    half, rows = task.max_length // 2 - 1, {}
    for split, part in examples.load(task).rows.items():
        found = [
            {
                "prompt": cut(tokenizer, row.prompt, half) + "\n",
                "chosen": cut(tokenizer, row.chosen, half),
                "rejected": cut(tokenizer, row.rejected, half),
            }
            for row in part
        ]
        rows[split] = _apart(task, split, found)
    return tokenizer, rows


def _apart(task: Task, split: Split, rows: list[Any], kind: str = "") -> list[Any]:
    """The pairs whose answers differ, as far as the task's length lets them be read."""
    kept = [row for row in rows if row[f"chosen{kind}"] != row[f"rejected{kind}"]]
    if len(kept) < (task.batch if split == "train" else 1):
        raise BadInput(
            f"{task.dataset}: max_length: of {len(rows)} pairs of {split}, the answers of "
            f"{len(kept)} differ in what {task.max_length} tokens leave of them; raise it"
        )
    return kept


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
        found = answered(
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
