"""GRPO, paid for short words (TRL): with and without the tuner.

python examples/grpo.py
"""

import argparse

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import GRPOConfig, GRPOTrainer

from envs import catalog, texts
from tuner import TunerCallback

parser = argparse.ArgumentParser(description=__doc__)
default = catalog.model_path("tiny-gpt-32")
parser.add_argument("--model", default=default, help="a folder or a hub id")
parser.add_argument("--rate", type=float, default=1e-3, help="learning rate; a decade too low")
parser.add_argument("--steps", type=int, default=40, help="updates")
args = parser.parse_args()

data = texts.dialogue()  # fetched on first use by: steersman fetch dialogue
tokenizer = AutoTokenizer.from_pretrained(args.model)


def rows(split, most=1000):
    return Dataset.from_list([{"prompt": row.statement + "\n"} for row in data[split][:most]])


def short(completions, **_):
    """The share of words that are short: a reward from 0 to 1."""
    return [sum(len(w) < 4 for w in text.split()) / (len(text.split()) + 1) for text in completions]


for name in ("unsteered", "steered"):
    set_seed(0)
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model),
        args=GRPOConfig(
            "runs/grpo", max_steps=args.steps, learning_rate=args.rate, num_generations=4,
            max_completion_length=12, per_device_train_batch_size=16, per_device_eval_batch_size=64,
            bf16=False,
            save_strategy="no", report_to="none",
        ),
        reward_funcs=short,
        train_dataset=rows("train"),
        eval_dataset={"validation": rows("validation", 64), "test": rows("test", 256)},
        processing_class=tokenizer,
    )  # fmt: skip
    if name == "steered":
        trainer.add_callback(TunerCallback("default", mode="explore", trainer=trainer))
    trainer.train()
    trainer.evaluate(trainer.eval_dataset["test"])
    print(f"{name}: test reward {trainer.state.log_history[-1]['eval_reward']:.3f}")
