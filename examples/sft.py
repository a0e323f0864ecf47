"""Replies learned from demonstrations, SFT (TRL): with and without the tuner.

python examples/sft.py
"""

import argparse
import math

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from envs import catalog, texts
from tuner import TunerCallback

parser = argparse.ArgumentParser(description=__doc__)
default = catalog.model_path("tiny-gpt-32")
parser.add_argument("--model", default=default, help="a folder or a hub id")
parser.add_argument("--rate", type=float, default=1e-3, help="learning rate; a decade too low")
parser.add_argument("--steps", type=int, default=60, help="updates")
args = parser.parse_args()

data = texts.dialogue()  # fetched on first use by: steersman fetch dialogue
tokenizer = AutoTokenizer.from_pretrained(args.model)


def rows(split, most=1000):
    return Dataset.from_list(
        [{"prompt": row.statement + "\n", "completion": row.reply} for row in data[split][:most]]
    )


for name in ("unsteered", "steered"):
    set_seed(0)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model),
        args=SFTConfig(
            "runs/sft", max_steps=args.steps, learning_rate=args.rate, max_length=32,
            per_device_train_batch_size=16, per_device_eval_batch_size=64,
            bf16=False, save_strategy="no", report_to="none",
        ),
        train_dataset=rows("train"),
        eval_dataset={"validation": rows("validation", 128), "test": rows("test", 256)},
        processing_class=tokenizer,
    )  # fmt: skip
    if name == "steered":
        trainer.add_callback(TunerCallback("default", mode="explore", trainer=trainer))
    trainer.train()
    nats = trainer.evaluate(trainer.eval_dataset["test"])["eval_loss"]
    print(f"{name}: test perplexity {math.exp(nats):.1f}")
