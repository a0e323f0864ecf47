"""SmolLM2-135M taught by LoRA to reply (TRL's SFT): with and without the tuner. Slow on a CPU.

steersman fetch smollm2-135m dialogue; python examples/smollm_lora.py
"""

import argparse
import math

from datasets import Dataset
from peft import LoraConfig
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from envs import smollm, texts
from tuner import TunerCallback

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--rate", type=float, default=5e-5, help="learning rate; a decade too low")
parser.add_argument("--steps", type=int, default=60, help="updates")
parser.add_argument("--test-rows", type=int, default=128, help="rows that judge the run")
args = parser.parse_args()

data = texts.dialogue()


def rows(split, most=1000):
    return Dataset.from_list(
        [{"prompt": row.statement + "\n", "completion": row.reply} for row in data[split][:most]]
    )


for name in ("unsteered", "steered"):
    set_seed(0)
    model, tokenizer = smollm.load()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            "runs/smollm", max_steps=args.steps, learning_rate=args.rate, max_length=48,
            per_device_train_batch_size=4, per_device_eval_batch_size=64,
            bf16=False, gradient_checkpointing=False,
            save_strategy="no", report_to="none",
        ),
        train_dataset=rows("train"),
        eval_dataset={"validation": rows("validation", 16), "test": rows("test", args.test_rows)},
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj"]),
    )  # fmt: skip
    if name == "steered":
        trainer.add_callback(TunerCallback("default", mode="explore", trainer=trainer))
    trainer.train()
    nats = trainer.evaluate(trainer.eval_dataset["test"])["eval_loss"]
    print(f"{name}: test perplexity {math.exp(nats):.1f}")
