"""GRPO, paid by a reward model of what people rate higher (TRL): with and without the tuner.

python examples/judge.py
"""

import argparse

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import GRPOConfig, GRPOTrainer

from envs import catalog, texts
from envs.knobs import Knobs
from envs.objectives import prepare
from envs.task import find
from tuner import TunerCallback

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=catalog.model_path("tiny-gpt-32"), help="a folder or hub id")
parser.add_argument("--rate", type=float, default=1e-3, help="learning rate; a decade too low")
parser.add_argument("--steps", type=int, default=40, help="updates")
args = parser.parse_args()

# Fetched on first use, or by: steersman fetch ratings dialogue
taught = prepare(find("reward"), seed=0, knobs=Knobs(7e-3)).trainer
taught.train()
judge, reader = taught.model.eval(), taught.processing_class
data, tokenizer = texts.dialogue(), AutoTokenizer.from_pretrained(args.model)


def rows(split, most=1000):
    return Dataset.from_list([{"prompt": row.statement + "\n"} for row in data[split][:most]])


@torch.inference_mode()
def pay(completions, **_):
    """The chance that the judge prefers a text to one of output 0: a reward from 0 to 1."""
    asked = [f"{texts.PROMPTS['tweets']}\n{text}" for text in completions]  # as it was taught
    code = reader(asked, return_tensors="pt", padding=True, truncation=True, max_length=64)
    return torch.sigmoid(judge(**code.to(judge.device)).logits[:, 0]).tolist()


for name in ("unsteered", "steered"):
    set_seed(0)
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model),
        args=GRPOConfig(
            "runs/judge", max_steps=args.steps, learning_rate=args.rate, num_generations=4,
            max_completion_length=12, per_device_train_batch_size=16, per_device_eval_batch_size=64,
            bf16=False, save_strategy="no", report_to="none",
        ),
        reward_funcs=pay, train_dataset=rows("train"), processing_class=tokenizer,
        eval_dataset={"validation": rows("validation", 64), "test": rows("test", 256)},
    )  # fmt: skip
    if name == "steered":
        trainer.add_callback(TunerCallback("default", mode="explore", trainer=trainer))
    trainer.train()
    trainer.evaluate(trainer.eval_dataset["test"])
    print(f"{name}: test reward {trainer.state.log_history[-1]['eval_reward']:.3f}")
