"""The mean rating of a text, from -4 to 4: with and without the tuner.

python examples/regression.py
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

from envs import catalog, texts
from tuner import TunerCallback

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=catalog.model_path("tiny-32"), help="a folder or a hub id")
parser.add_argument("--rate", type=float, default=7e-4, help="learning rate; a decade too low")
parser.add_argument("--steps", type=int, default=100, help="updates")
args = parser.parse_args()

data = texts.ratings()  # fetched on first use by: steersman fetch ratings
tokenizer = AutoTokenizer.from_pretrained(args.model)


def rows(split, most=2000):
    part = data[split][:most]
    coded = tokenizer([row.text for row in part], truncation=True, max_length=32)["input_ids"]
    return [{"input_ids": c, "labels": row.mean} for c, row in zip(coded, part, strict=True)]


def r_squared(found):
    error = ((found.predictions[:, 0] - found.label_ids) ** 2).mean()
    return {"r2": float(1 - error / found.label_ids.var())}


for name in ("unsteered", "steered"):
    set_seed(0)
    trainer = Trainer(
        model=AutoModelForSequenceClassification.from_pretrained(
            args.model, num_labels=1, dtype="float32"
        ),
        args=TrainingArguments(
            "runs/regression", max_steps=args.steps, learning_rate=args.rate, save_strategy="no",
            per_device_train_batch_size=32, per_device_eval_batch_size=64, report_to="none",
        ),
        train_dataset=rows("train"),
        eval_dataset=rows("validation", 128),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=r_squared,
    )  # fmt: skip
    if name == "steered":
        trainer.add_callback(TunerCallback("default", mode="explore", trainer=trainer))
    trainer.train()
    print(f"{name}: test R squared {trainer.evaluate(rows('test', 1000))['eval_r2']:.3f}")
