"""Kahneman-Tversky optimisation, each answer alone good or bad (TRL): with and without the tuner.

python examples/kto.py
"""

import argparse

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import KTOConfig, KTOTrainer

from envs import catalog, texts
from tuner import TunerCallback

parser = argparse.ArgumentParser(description=__doc__)
default = catalog.model_path("tiny-gpt-32")
parser.add_argument("--model", default=default, help="a folder or a hub id")
parser.add_argument("--rate", type=float, default=1e-3, help="learning rate; a decade too low")
parser.add_argument("--steps", type=int, default=60, help="updates")
args = parser.parse_args()

data = texts.pairs()  # fetched on first use by: steersman fetch ratings
tokenizer = AutoTokenizer.from_pretrained(args.model)


def rows(split, most=1000):
    part = data[split]
    part = part[:: max(1, len(part) // most)][:most]  # of every source: they come one by one
    found = [
        {"prompt": row.prompt + "\n", "completion": answer, "label": answer == row.chosen}
        for row in part
        for answer in (row.chosen, row.rejected)
    ]
    return Dataset.from_list(found).shuffle(seed=0)


for name in ("unsteered", "steered"):
    set_seed(0)
    trainer = KTOTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model),
        args=KTOConfig(
            "runs/kto", max_steps=args.steps, learning_rate=args.rate, max_length=48,
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
    trainer.evaluate(trainer.eval_dataset["test"])
    margin = trainer.state.log_history[-1]["eval_rewards/margins"]
    print(f"{name}: test margin of the rewards {margin:.3f}")
