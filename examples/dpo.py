"""Direct preference optimisation (TRL): with and without the tuner.

python examples/dpo.py
"""

import argparse

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import DPOConfig, DPOTrainer

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


def rows(split, most=2000):
    part = data[split]
    part = part[:: max(1, len(part) // most)][:most]  # of every source: they come one by one
    return Dataset.from_list(
        [{"prompt": row.prompt + "\n", "chosen": row.chosen, "rejected": row.rejected}
         for row in part]
    )  # fmt: skip


for name in ("unsteered", "steered"):
    set_seed(0)
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model),
        args=DPOConfig(
            "runs/dpo", max_steps=args.steps, learning_rate=args.rate, max_length=48,
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
    right = trainer.state.log_history[-1]["eval_rewards/accuracies"]
    print(f"{name}: test pairs in the right order {right:.3f}")
