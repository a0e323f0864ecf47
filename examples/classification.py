"""Kinds of questions, told by an encoder with a classification head: with and without the tuner.

python examples/classification.py
"""

import argparse

from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from envs import catalog
from tuner import TunerCallback

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=catalog.model_path("tiny-32"), help="a folder or a hub id")
parser.add_argument("--rate", type=float, default=7e-4, help="learning rate; a decade too low")
parser.add_argument("--steps", type=int, default=100, help="updates")
args = parser.parse_args()

data = catalog.load("trec6")  # fetched on first use by: steersman fetch trec6
tokenizer = AutoTokenizer.from_pretrained(args.model)


def rows(split, most=1000):
    part = data[split]
    coded = tokenizer(list(part.texts[:most]), truncation=True, max_length=32)["input_ids"]
    return [{"input_ids": c, "labels": int(n)} for c, n in zip(coded, part.labels, strict=False)]


def accuracy(found):
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}


for name in ("unsteered", "steered"):
    set_seed(0)
    trainer = Trainer(
        model=AutoModelForSequenceClassification.from_pretrained(
            args.model, num_labels=len(data["train"].classes), dtype="float32"
        ),
        args=TrainingArguments(
            "runs/trec", max_steps=args.steps, learning_rate=args.rate, save_strategy="no",
            per_device_train_batch_size=16, per_device_eval_batch_size=64, report_to="none",
        ),
        train_dataset=rows("train"),
        eval_dataset=rows("validation", 128),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )  # fmt: skip
    if name == "steered":
        trainer.add_callback(TunerCallback("default", mode="explore", trainer=trainer))
    trainer.train()
    print(f"{name}: test accuracy {trainer.evaluate(rows('test'))['eval_accuracy']:.3f}")
