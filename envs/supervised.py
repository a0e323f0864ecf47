"""Supervised objectives: ratings, tags, next words, translations and headlines, as Setups."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from envs import examples, workload
from envs.errors import BadInput
from envs.job import Score
from envs.knobs import Knobs
from envs.setups import (
    IGNORED,
    Batch,
    arguments,
    batches,
    coded,
    collator,
    decoder_of,
    initial_seed,
    judging,
    model_of,
    moved,
    quiet,
    silent,
    token_nats,
    tokenizer_of,
)
from envs.task import Split, Task
from envs.trainer_job import Setup


class Regressor(nn.Module):
    """An encoder, the mean or the first of its token states, and one linear output."""

    objective = "regression"
    base_model_prefix = workload.PREFIX

    def __init__(self, encoder: nn.Module, width: int, task: Task) -> None:
        super().__init__()
        self.encoder, self.pooling = encoder, task.pooling
        self.head = _head(width, 1)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """input_ids, attention_mask: (batch, length); labels: (batch,) -> squared error, values."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        found = self.head(workload.pool(states, attention_mask, self.pooling))[:, 0]
        if labels is None:
            return {"logits": found}
        return {"loss": functional.mse_loss(found, labels), "logits": found}


class Tagger(nn.Module):
    """An encoder and a linear layer on each token's state."""

    objective = "tokens"
    base_model_prefix = workload.PREFIX

    def __init__(self, encoder: nn.Module, width: int, tags: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = _head(width, tags)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """input_ids, attention_mask: (batch, length) -> logits (batch, length, tags)."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        return {"logits": self.head(states)}


def _head(width: int, outputs: int) -> nn.Linear:
    head = nn.Linear(width, outputs)
    nn.init.normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def regression(task: Task, seed: int, knobs: Knobs) -> Setup:
    """The mean of the raters' scores, standardised by the training rows.

    Cost: mean squared error in variances of the training ratings. Metric: R squared, at least -1.
    """
    data, tokenizer = examples.load(task), tokenizer_of(task)
    target = torch.tensor([row.mean for row in data.rows["train"]], dtype=torch.float64)
    center, spread = float(target.mean()), float(target.std(correction=0))
    if not spread > 1e-6:
        raise BadInput(f"{task.dataset}: scores: all training texts are rated alike")

    def row(example: Any, ids: list[int]) -> dict[str, Any]:
        return {"input_ids": ids, "labels": (example.mean - center) / spread}

    rows = {
        split: list(map(row, part, coded(tokenizer, [r.text for r in part], task.max_length)))
        for split, part in data.rows.items()
    }

    def score(trainer: Any, split: Split) -> Score:
        found, wanted = [], []
        with judging(trainer.model) as device:
            for batch in ready[split]:
                result = trainer.model(**moved(batch, device))
                found.append(result["logits"])
                wanted.append(batch["labels"].to(device))
            values, truth = torch.cat(found), torch.cat(wanted)
            error = functional.mse_loss(values, truth)
            share = error / truth.var(correction=0).clamp(min=1e-6)
            cost, r2 = torch.stack([error, 1 - share.nan_to_num(2.0).clamp(max=2.0)]).tolist()
        return Score(cost, r2)

    with workload.seeded(initial_seed(seed)):
        encoder = workload.backbone(task)
        module = Regressor(encoder, encoder.config.hidden_size, task)
    collate = collator(tokenizer.pad_token_id)
    ready = batches(rows, collate)
    return _setup(task, seed, knobs, _dropout(module, task), rows["train"], collate, score)


def tokens(task: Task, seed: int, knobs: Knobs) -> Setup:
    """A tag for each word, read at its last token, which a one-way model has seen it up to.

    Cost: mean cross-entropy in nats a word. Metric: share of words with the right tag.
    """
    data, tokenizer = examples.load(task), tokenizer_of(task)
    number = {tag: index for index, tag in enumerate(data.classes)}

    def row(example: Any) -> dict[str, Any]:
        code = tokenizer(
            list(example.words), is_split_into_words=True, truncation=True,
            max_length=task.max_length,
        )  # fmt: skip
        words = code.word_ids()
        labels = [
            number.get(example.tags[word], IGNORED) if word is not None and word != after
            else IGNORED
            for word, after in zip(words, [*words[1:], None], strict=True)
        ]  # fmt: skip
        return {"input_ids": code["input_ids"], "labels": labels}

    rows = {split: [row(example) for example in part] for split, part in data.rows.items()}
    for split, part in rows.items():
        if all(label == IGNORED for each in part for label in each["labels"]):
            raise BadInput(f"{task.dataset}: {split}: no word has a tag of the training rows")
    with workload.seeded(initial_seed(seed)):
        encoder = workload.backbone(task)
        module = Tagger(encoder, encoder.config.hidden_size, len(data.classes))
    collate = collator(tokenizer.pad_token_id)
    ready = batches(rows, collate)

    def score(trainer: Any, split: Split) -> Score:
        nats, hits = judge_tokens(trainer.model, ready[split], shift=False)
        return Score(nats, hits)

    setup = _setup(
        task, seed, knobs, _dropout(module, task), rows["train"], collate, score, loss=_token_loss
    )
    return Setup(setup.trainer, setup.score, setup.rows, len(data.classes))


def causal(task: Task, seed: int, knobs: Knobs) -> Setup:
    """The next token of a text. Cost: mean nats a token. Metric: one over the perplexity.

    Marks: chrF (0 to 100) of greedy continuations of a text's first half against its second, and
    the share of their word pairs that are not repeated (distinct-2).
    """
    data, tokenizer = examples.load(task), tokenizer_of(task)
    end = tokenizer.eos_token or ""
    rows = {
        split: [
            {"input_ids": ids, "labels": list(ids)}
            for ids in coded(tokenizer, [text + end for text in part], task.max_length)
        ]
        for split, part in data.rows.items()
    }
    for split, part in rows.items():
        if all(len(each["labels"]) < 2 for each in part):
            raise BadInput(f"{task.dataset}: {split}: no text has two tokens; give longer ones")
    collate = collator(tokenizer.pad_token_id)
    ready = batches(rows, collate)

    def score(trainer: Any, split: Split) -> Score:
        nats, _ = judge_tokens(trainer.model, ready[split], shift=True)
        return Score(nats, likelihood(nats))

    def written(trainer: Any, split: Split) -> dict[str, float]:
        from sacrebleu.metrics import CHRF

        found, wanted = [], []
        with judging(trainer.model) as device:
            for row in rows[split]:
                half = len(row["input_ids"]) // 2
                if half:
                    begun = torch.tensor([row["input_ids"][:half]], device=device)
                    ids = trainer.model.generate(
                        input_ids=begun, attention_mask=torch.ones_like(begun), do_sample=False,
                        max_new_tokens=len(row["input_ids"]) - half,
                        pad_token_id=tokenizer.pad_token_id,
                    )  # fmt: skip
                    found.append(tokenizer.decode(ids[0, half:], skip_special_tokens=True))
                    wanted.append(
                        tokenizer.decode(row["input_ids"][half:], skip_special_tokens=True)
                    )
        pairs = [pair for text in found for pair in pairwise(text.split())]
        chrf = float(CHRF().corpus_score(found, [wanted]).score)
        return {"chrF": chrf, "distinct-2": len(set(pairs)) / max(1, len(pairs))}

    model = decoder_of(task, seed)
    setup = _setup(task, seed, knobs, model, rows["train"], collate, score)
    return replace(setup, marks=written)


def judge_tokens(model: nn.Module, ready: Sequence[Batch], *, shift: bool) -> tuple[float, float]:
    """Mean cross-entropy in nats, and share of hits, over all labelled tokens of the batches.

    shift: the model's outputs are for the next token, as a causal language model's are.
    """
    sums: list[Tensor] = []
    with judging(model) as device:
        for batch in ready:
            here = moved(batch, device)
            labels = here.pop("labels")
            if not shift and "decoder_input_ids" not in here:
                logits = model(**here)["logits"]
            else:
                logits = model(**here, use_cache=False)["logits"]
            if shift:
                logits, labels = logits[:, :-1], labels[:, 1:]
            sums.append(torch.stack([part.double() for part in token_nats(logits, labels)]))
        nats, hits, count = torch.stack(sums).sum(0).tolist()
    return nats / max(count, 1), hits / max(count, 1)


def likelihood(nats: float) -> float:
    """One over the perplexity of a mean cross-entropy: in [0, 1], and 0 for a diverged run."""
    return math.exp(-nats) if nats == nats else 0.0


def translation(task: Task, seed: int, knobs: Knobs) -> Setup:
    """A verse in another language.

    Cost: mean nats a target token. Metric: one over the perplexity. Marks: chrF and BLEU (0 to
    100, sacrebleu) of greedy translations.
    """

    def marks(found: list[str], wanted: list[str]) -> dict[str, float]:
        from sacrebleu.metrics import BLEU, CHRF

        judges = {"chrF": CHRF(), "BLEU": BLEU()}
        return {n: float(j.corpus_score(found, [wanted]).score) for n, j in judges.items()}

    return _pairs(task, seed, knobs, lambda row: (row.source, row.target), marks)


def headlines(task: Task, seed: int, knobs: Knobs) -> Setup:
    """The title of an article.

    Cost: mean nats a title token. Metric: one over the perplexity. Marks: ROUGE-L (F1, 0 to 1) of
    greedy titles.
    """

    def marks(found: list[str], wanted: list[str]) -> dict[str, float]:
        from rouge_score.rouge_scorer import RougeScorer

        judge = RougeScorer(["rougeL"], use_stemmer=False)
        each = [judge.score(w, f)["rougeL"].fmeasure for f, w in zip(found, wanted, strict=True)]
        return {"ROUGE-L": sum(each) / len(each)}

    read = 16 * task.max_length  # letters: more than are read, and whole articles take seconds
    return _pairs(task, seed, knobs, lambda row: (row.body[:read], row.title), marks)


Marks = Callable[[list[str], list[str]], dict[str, float]]


def _pairs(
    task: Task, seed: int, knobs: Knobs, parts: Callable[[Any], tuple[str, str]], marks: Marks
) -> Setup:
    """Sequence to sequence: an encoder-decoder, or two copies of an encoder with new bridges."""
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    data, tokenizer = examples.load(task), tokenizer_of(task)
    start = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    stop = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    model = _bridged(task, seed, start, stop, tokenizer.pad_token_id)
    start = model.config.decoder_start_token_id
    wanted = {split: [parts(row)[1] for row in part] for split, part in data.rows.items()}
    rows = {}
    for split, part in data.rows.items():
        sources = coded(tokenizer, [parts(row)[0] for row in part], task.max_length)
        bare = coded(tokenizer, wanted[split], task.max_length - 1, add_special_tokens=False)
        rows[split] = [
            {"input_ids": ids, "labels": [*target, stop]}
            for ids, target in zip(sources, bare, strict=True)
        ]
    plain = collator(tokenizer.pad_token_id)

    def collate(part: Sequence[dict[str, Any]]) -> Batch:
        batch = plain(part)
        shifted = batch["labels"].roll(1, 1)
        shifted[:, 0] = start
        batch["decoder_input_ids"] = shifted.masked_fill(shifted == IGNORED, tokenizer.pad_token_id)
        return batch

    ready = batches(rows, collate)

    def score(trainer: Any, split: Split) -> Score:
        nats, _ = judge_tokens(trainer.model, ready[split], shift=False)
        return Score(nats, likelihood(nats))

    def written(trainer: Any, split: Split) -> dict[str, float]:
        found: list[str] = []
        with judging(trainer.model) as device:
            for batch in ready[split]:
                ids = trainer.model.generate(
                    input_ids=batch["input_ids"].to(device),
                    attention_mask=batch["attention_mask"].to(device),
                    max_new_tokens=task.max_length, do_sample=False, num_beams=1,
                )  # fmt: skip
                found += tokenizer.batch_decode(ids, skip_special_tokens=True)
        return marks(found, wanted[split])

    setup = _setup(
        task, seed, knobs, model, rows["train"], collate, score,
        Seq2SeqTrainer, Seq2SeqTrainingArguments, _token_loss,
    )  # fmt: skip
    return replace(setup, marks=written)


def _token_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Mean cross-entropy of the labelled tokens, of all micro-batches of an update."""
    nats, _, count = token_nats(outputs["logits"], labels)
    return nats / (count if num_items_in_batch is None else num_items_in_batch)


def _bridged(task: Task, seed: int, start: int, stop: int, pad: int) -> Any:
    from transformers import AutoConfig, AutoModelForSeq2SeqLM, EncoderDecoderModel

    if task.trainable_layers is not None:
        raise BadInput("task: trainable_layers: not for an encoder-decoder; give None")
    config = workload.pretrained(AutoConfig, task.model)
    if config.is_encoder_decoder:
        return model_of(task, seed, AutoModelForSeq2SeqLM)

    class Both:
        """What loads an encoder twice."""

        @staticmethod
        def from_pretrained(path: str, **options: Any) -> Any:
            both = EncoderDecoderModel.from_encoder_decoder_pretrained(
                path, path,
                **{f"{side}_{name}": value for side in ("encoder", "decoder")
                   for name, value in options.items()},
            )  # fmt: skip
            for each in (both.config, both.generation_config):
                each.decoder_start_token_id, each.eos_token_id, each.pad_token_id = start, stop, pad
            return both

    return model_of(task, seed, Both, new=("crossattention", "transform"))


def _dropout(module: nn.Module, task: Task) -> nn.Module:
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = task.dropout
    return module


def _setup(
    task: Task,
    seed: int,
    knobs: Knobs,
    model: nn.Module,
    rows: list[dict[str, Any]],
    collate: Callable[[Sequence[dict[str, Any]]], Batch],
    score: Callable[[Any, Split], Score],
    trainer: Any = None,
    config: Any = None,
    loss: Any = None,
) -> Setup:
    from transformers import Trainer, TrainingArguments

    with quiet(seed):
        made = (trainer or Trainer)(
            model=model,
            args=(config or TrainingArguments)(
                **arguments(task, seed, knobs, remove_unused_columns=False, label_names=["labels"])
            ),
            train_dataset=rows,
            data_collator=collate,
            compute_loss_func=loss,
        )
    return Setup(silent(made), score, len(rows))
