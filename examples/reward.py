"""A reward model of which text people rate higher (TRL): with and without the tuner.

python examples/reward.py
"""

import argparse

from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
from trl import RewardConfig, RewardTrainer

from envs import catalog, texts
from tuner import TunerCallback

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=catalog.model_path("tiny-32"), help="a folder or a hub id")
parser.add_argument("--rate", type=float, default=7e-4, help="learning rate; a decade too low")
parser.add_argument("--steps", type=int, default=100, help="updates")
args = parser.parse_args()

data = texts.pairs()  # fetched on first use by: steersman fetch ratings
tokenizer = AutoTokenizer.from_pretrained(args.model)
if tokenizer.eos_token is None:
    tokenizer.eos_token = tokenizer.sep_token


def rows(split, most=2000):
    part = data[split]
    part = part[:: max(1, len(part) // most)][:most]  # of every source: they come one by one
    return Dataset.from_list([{"chosen": row.chosen, "rejected": row.rejected} for row in part])


for name in ("unsteered", "steered"):
    set_seed(0)
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(
            args.model, num_labels=1, dtype="float32"
        ),
        args=RewardConfig(
            "runs/reward", max_steps=args.steps, learning_rate=args.rate, max_length=32,
            per_device_train_batch_size=32, per_device_eval_batch_size=64,
            bf16=False, save_strategy="no", report_to="none",
        ),
        train_dataset=rows("train"),
        eval_dataset={"validation": rows("validation", 128), "test": rows("test", 512)},
        processing_class=tokenizer,
    )  # fmt: skip
    if name == "steered":
        trainer.add_callback(TunerCallback("default", mode="explore", trainer=trainer))
    trainer.train()
    trainer.evaluate(trainer.eval_dataset["test"])
    right = trainer.state.log_history[-1]["eval_accuracy"]
    print(f"{name}: test pairs in the right order {right:.3f}")
