"""The next token of a text (a causal language model): with and without the tuner.

python examples/causal.py
"""

import argparse
import math

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)

from envs import catalog, texts
from tuner import TunerCallback

parser = argparse.ArgumentParser(description=__doc__)
default = catalog.model_path("tiny-gpt-32")
parser.add_argument("--model", default=default, help="a folder or a hub id")
parser.add_argument("--rate", type=float, default=1e-3, help="learning rate; a decade too low")
parser.add_argument("--steps", type=int, default=60, help="updates")
args = parser.parse_args()

data = texts.plain()  # fetched on first use by: steersman fetch plain
tokenizer = AutoTokenizer.from_pretrained(args.model)


def rows(split, most=1000):
    coded = tokenizer(data[split][:most], truncation=True, max_length=48)["input_ids"]
    return [{"input_ids": ids} for ids in coded]


for name in ("unsteered", "steered"):
    set_seed(0)
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(args.model),
        args=TrainingArguments(
            "runs/causal", max_steps=args.steps, learning_rate=args.rate, save_strategy="no",
            per_device_train_batch_size=16, per_device_eval_batch_size=64, report_to="none",
        ),
        train_dataset=rows("train"),
        eval_dataset=rows("validation", 128),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )  # fmt: skip
    if name == "steered":
        trainer.add_callback(TunerCallback("default", mode="explore", trainer=trainer))
    trainer.train()
    nats = trainer.evaluate(rows("test", 256))["eval_loss"]
    print(f"{name}: test perplexity {math.exp(nats):.1f}")
