"""One's own Trainer as an environment, steered and not: python examples/own_trainer_env.py"""

import argparse

import gymnasium as gym
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from envs import catalog
from tuner.tracking import open_policy

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=catalog.model_path("tiny-32"), help="a folder or a hub id")
parser.add_argument("--rate", type=float, default=7e-4, help="learning rate; a decade too low")
parser.add_argument("--steps", type=int, default=60, help="updates")
args = parser.parse_args()

data = catalog.load("trec6")  # fetched on first use by: steersman fetch trec6
tokenizer = AutoTokenizer.from_pretrained(args.model)


def rows(split, most=1000):
    coded = tokenizer(list(data[split].texts[:most]), truncation=True, max_length=32)["input_ids"]
    numbers = data[split].labels[:most]
    return [{"input_ids": c, "labels": int(n)} for c, n in zip(coded, numbers, strict=True)]


def accuracy(found):
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}


def my_trainer(seed):
    set_seed(seed)
    return Trainer(
        model=AutoModelForSequenceClassification.from_pretrained(
            args.model, num_labels=len(data["train"].classes), dtype="float32"
        ),
        args=TrainingArguments("runs/own", max_steps=args.steps, learning_rate=args.rate, seed=seed,
                               save_strategy="no", report_to="none", disable_tqdm=True),
        train_dataset=rows("train"), data_collator=DataCollatorWithPadding(tokenizer),
        eval_dataset=rows("validation", 128), compute_metrics=accuracy,
    )  # fmt: skip


policy = open_policy("default")
actions = policy.manifest.actions
env = gym.make("Steersman/Trainer-v0", trainer_factory=my_trainer, actions=actions, spread=0.0)
for name in ("unsteered", "steered"):
    observation, info = env.reset(seed=0)
    ended = False
    while not ended:
        choice = policy.act(observation) if name == "steered" else actions.keep
        observation, reward, ended, _, info = env.step(choice)
    print(f"{name}: validation accuracy {info['metric']:.3f}, rate at the end {info['rate']:.2g}")
