"""Training: the four Trainers of the loop, each with the tuner at its tiller."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from candidates import LENGTH
from rewards import HIGH, LOW, Pair
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from envs.knobs import Knobs
from envs.setups import AT_ONCE, arguments, coded, collator, judging, moved, quiet, silent
from envs.supervised import Regressor
from envs.task import Task
from envs.texts import Rated
from envs.workload import load_tokenizer, pretrained
from tuner.callback import TunerCallback

DECISIONS = 10  # of the tuner in a run
GROUP = 8  # answers to a prompt that are compared with one another


class Rater:
    """A model that was fitted to people's ratings: texts -> scores from -4 to 4."""

    def __init__(self, model: Regressor, tokenizer: Any) -> None:
        self.model, self._tokenizer = model, tokenizer

    def rate(self, texts: Sequence[str]) -> list[float]:
        """An empty text is neither good nor bad."""
        rows = [{"input_ids": ids, "labels": 0.0} for ids in _ids(self._tokenizer, texts)]
        collate = collator(self._tokenizer.pad_token_id)
        found: list[float] = []
        with judging(self.model) as device:
            for at in range(0, len(rows), AT_ONCE):
                batch = moved(collate(rows[at : at + AT_ONCE]), device)
                scores = self.model(batch["input_ids"], batch["attention_mask"])["logits"]
                found += scores.clamp(LOW, HIGH).tolist()
        return [score if text else 0.0 for score, text in zip(found, texts, strict=True)]


def load_rater(folder: Path) -> Rater:
    base = json.loads((folder / "rater.json").read_text())["base"]
    rater = _new_rater(base)
    rater.model.load_state_dict(load_file(folder / "model.safetensors"))
    return rater


def train_rater(
    folder: Path, *, base: str, rows: Sequence[Rated], held_out: Sequence[Rated], epochs: int,
    seed: int,
) -> dict[str, float]:  # fmt: skip
    """Regression on the mean ratings; returns how it does on texts it has not seen."""
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(seed)
    rater, batch = _new_rater(base), 32
    tokenizer = load_tokenizer(base)

    def coded_rows(part: Sequence[Rated]) -> Any:
        ids = _ids(tokenizer, [row.text for row in part])
        return _table([{"input_ids": i, "labels": r.mean} for i, r in zip(ids, part, strict=True)])

    steps = epochs * len(rows) // batch
    trainer = Trainer(
        model=rater.model,
        args=TrainingArguments(
            **_settings(folder, steps, batch, 1e-3, seed), remove_unused_columns=False
        ),
        data_collator=collator(tokenizer.pad_token_id),
        train_dataset=coded_rows(rows),
        eval_dataset=coded_rows(held_out[:256]),
    )
    silent(trainer).train()  # as it is: the judges are no part of the loop
    save_file(rater.model.state_dict(), folder / "model.safetensors")
    (folder / "rater.json").write_text(json.dumps({"base": base}))
    found = torch.tensor(rater.rate([row.text for row in held_out]))
    truth = torch.tensor([row.mean for row in held_out])
    return {
        "correlation": float(torch.corrcoef(torch.stack([found, truth]))[0, 1]),
        "mean absolute error": float((found - truth).abs().mean()),
    }


def imitate(
    folder: Path, *, base: str, shown: Sequence[tuple[str, str]], steps: int, seed: int
) -> None:  # fmt: skip
    """Supervised training on demonstrations: (prompt, answer)."""
    from trl import SFTConfig, SFTTrainer

    tokenizer = load_tokenizer(base)
    prompts = coded(tokenizer, [prompt + "\n" for prompt, _ in shown], 64)
    replies = coded(tokenizer, [answer + tokenizer.eos_token for _, answer in shown], 63)
    rows = [
        {"input_ids": a + b, "completion_mask": [0] * len(a) + [1] * len(b)}
        for a, b in zip(prompts, replies, strict=True)
    ]
    train, held_out = _divided(rows)
    with quiet(seed):
        trainer = SFTTrainer(
            model=pretrained(AutoModelForCausalLM, base, dtype=torch.float32),
            args=SFTConfig(
                **_settings(folder, steps, min(32, len(train)), 2e-3, seed),
                max_length=None,
                completion_only_loss=True,
            ),
            train_dataset=_table(train),
            eval_dataset=_table(held_out),
            processing_class=tokenizer,
        )
    _steer(trainer, folder)
    _save(trainer.model, tokenizer, folder)


class RewardModel:
    """A prompt and answers -> what they are worth, from 0 to 1.

    The chance of being preferred to an average answer: the model's output has no zero of its own.
    """

    def __init__(self, folder: Path) -> None:
        self._tokenizer = load_tokenizer(str(folder))
        self._model = pretrained(
            AutoModelForSequenceClassification, str(folder), num_labels=1, dtype=torch.float32
        )
        scale = folder / "average.json"
        self._average = json.loads(scale.read_text())["average"] if scale.exists() else 0.0

    def outputs(self, prompts: Sequence[str], texts: Sequence[str]) -> torch.Tensor:
        """(texts,) the model's outputs."""
        rows = [
            {"input_ids": ids, "labels": 0}
            for ids in _ids(self._tokenizer, list(map(_joined, prompts, texts)))
        ]
        collate, found = collator(self._tokenizer.pad_token_id), []
        with judging(self._model) as device:
            for at in range(0, len(rows), AT_ONCE):
                batch = moved(collate(rows[at : at + AT_ONCE]), device)
                batch.pop("labels")
                found.append(self._model(**batch)["logits"][:, 0])
        return torch.cat(found)

    def __call__(self, prompts: Sequence[str], texts: Sequence[str]) -> list[float]:
        """One number for each text."""
        return torch.sigmoid(self.outputs(prompts, texts) - self._average).tolist()


def train_reward_model(
    folder: Path, *, base: str, pairs: Sequence[Pair], steps: int, seed: int
) -> dict[str, float]:
    """Bradley and Terry's loss on the pairs; returns the share of held-out pairs in order."""
    from trl import RewardConfig, RewardTrainer

    torch.manual_seed(seed)
    tokenizer = load_tokenizer(base)
    sides = {
        f"{side}_ids": _ids(tokenizer, [_joined(p.prompt, getattr(p, side)) for p in pairs])
        for side in ("chosen", "rejected")
    }
    rows = [
        {"prompt": pair.prompt, "pair": pair, "margin": pair.margin, "chosen_ids": c,
         "rejected_ids": r}
        for pair, c, r in zip(pairs, *sides.values(), strict=True)
    ]  # fmt: skip
    train, held_out = _divided(rows, key="prompt")
    unseen = [row["pair"] for row in held_out]
    for row in rows:
        del row["pair"], row["prompt"]
    with quiet(seed):
        trainer = RewardTrainer(
            model=pretrained(AutoModelForSequenceClassification, base, num_labels=1,
                             dtype=torch.float32),
            args=RewardConfig(
                **_settings(folder, steps, min(32, len(train)), 1e-3, seed), max_length=None
            ),
            train_dataset=_table(train),
            eval_dataset=_table(held_out),
            processing_class=tokenizer,
        )  # fmt: skip
    _steer(trainer, folder)
    _save(trainer.model, tokenizer, folder)
    fitted, prompts = RewardModel(folder), [pair.prompt for pair in pairs]
    both = [fitted.outputs(prompts, [getattr(p, side) for p in pairs])
            for side in ("chosen", "rejected")]  # fmt: skip
    (folder / "average.json").write_text(json.dumps({"average": float(torch.stack(both).mean())}))
    better, worse = (
        fitted.outputs([p.prompt for p in unseen], [getattr(p, side) for p in unseen])
        for side in ("chosen", "rejected")
    )
    return {"pairs": len(pairs), "held-out pairs in order": float((better > worse).float().mean())}


def optimise(
    folder: Path, *, start: Path, prompts: Sequence[str], reward: Path, steps: int, seed: int
) -> None:  # fmt: skip
    """Group-relative policy optimisation of what the reward model pays.

    It is tied to where it starts: of texts unlike those that people judged the reward model knows
    nothing.
    """
    from trl import GRPOConfig, GRPOTrainer

    worth = RewardModel(reward)

    def pay(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
        return worth([p.rstrip("\n") for p in prompts], [" ".join(c.split()) for c in completions])

    tokenizer = load_tokenizer(str(start))
    rows = [{"prompt": prompt + "\n"} for prompt in prompts]
    with quiet(seed):
        trainer = GRPOTrainer(
            model=pretrained(AutoModelForCausalLM, str(start), dtype=torch.float32),
            reward_funcs=pay,
            args=GRPOConfig(
                **_settings(folder, steps, 8 * GROUP, 3e-4, seed, max(1, steps // DECISIONS)),
                beta=0.1,
                num_generations=GROUP,
                max_completion_length=LENGTH,
                generation_kwargs={"min_new_tokens": 3},
            ),
            train_dataset=_table(rows[16:]),
            eval_dataset=_table(rows[:16]),
            processing_class=tokenizer,
        )
    _steer(trainer, folder, mode="careful")
    _save(trainer.model, tokenizer, folder)


def _steer(trainer: Any, folder: Path, mode: str = "explore") -> None:
    """The one line that steers a Trainer. ``classes``: a model with one output has none."""
    trainer.add_callback(
        TunerCallback(
            "default", mode=mode, trainer=trainer, log=folder / "tuner.jsonl", classes=2,
        )
    )  # fmt: skip
    silent(trainer).train()


def _settings(
    folder: Path, steps: int, batch: int, rate: float, seed: int, evaluate: int = 0
) -> dict[str, Any]:
    """Arguments of every Trainer here. evaluate: updates between its own evaluations, if any."""
    task = Task("feedback", steps=steps, interval=1, batch=batch, rows=batch)
    more: dict[str, Any] = {"output_dir": str(folder)}
    if evaluate:
        more |= {"eval_strategy": "steps", "eval_steps": evaluate, "logging_strategy": "steps",
                 "logging_steps": 1}  # fmt: skip
    return arguments(task, seed, Knobs(rate), **more)


def _divided(rows: list[dict[str, Any]], key: str = "") -> tuple[list[Any], list[Any]]:
    """A tenth of the rows (at least one, at most 128) is held out; with ``key``, whole groups."""
    if key:
        names = sorted({row[key] for row in rows})
        random.Random(0).shuffle(names)
        unseen = set(names[: max(1, len(names) // 10)])
        return [r for r in rows if r[key] not in unseen], [r for r in rows if r[key] in unseen]
    count = min(128, max(1, len(rows) // 10))
    return rows[count:], rows[:count]


def _joined(prompt: str, text: str) -> str:
    return f"{prompt}\n{text}"


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Never empty."""
    return [ids or [tokenizer.pad_token_id] for ids in coded(tokenizer, texts, 64)]


def _new_rater(base: str) -> Rater:
    encoder = pretrained(AutoModel, base, dtype=torch.float32)
    encoder.pooler = None  # not used; its weights would get no gradient
    task = Task("ratings", base, "regression")
    return Rater(Regressor(encoder, encoder.config.hidden_size, task), load_tokenizer(base))


def _table(rows: list[dict[str, Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(rows)


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
