"""One run on several processes (DDP): rank 0 decides, all carry it out.

torchrun --nproc_per_node 2 examples/distributed.py
"""

import argparse

import torch
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
parser.add_argument("--rate", type=float, default=7e-4, help="learning rate; a decade too low")
parser.add_argument("--steps", type=int, default=100, help="updates")
args, model = parser.parse_args(), catalog.model_path("tiny-32")

data = catalog.load("trec6")  # fetched on first use by: steersman fetch trec6
tokenizer = AutoTokenizer.from_pretrained(model)


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
            model, num_labels=len(data["train"].classes), dtype="float32"
        ),
        args=TrainingArguments(
            "runs/distributed", max_steps=args.steps, learning_rate=args.rate, save_strategy="no",
            per_device_train_batch_size=8, per_device_eval_batch_size=64, report_to="none",
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=rows("train"), eval_dataset=rows("validation", 128),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )  # fmt: skip
    if name == "steered":
        trainer.add_callback(TunerCallback("default", mode="explore", trainer=trainer))
    trainer.train()
    found = trainer.evaluate(rows("test"))["eval_accuracy"]
    if trainer.is_world_process_zero():
        print(f"{name}: test accuracy {found:.3f} on {trainer.args.world_size} processes")
