"""One steered run, in this process or as one of several: ``python ranks.py FOLDER OPTIONS``.

The same rows, in the same order, make the same updates however many processes share them.
"""

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from accelerate import DistributedType, PartialState
from torch.utils.data import Dataset, SequentialSampler
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

from envs.knobs import Actions
from envs.workload import with_lora
from tuner.callback import TunerCallback

KEEP, ROLLBACK, UP, DOWN = 3, 7, 8, 9
STEPS, BATCH, WORDS, LENGTH = 20, 8, 40, 10
ACTIONS = (4, KEEP, 5, 2, ROLLBACK)


class Pilot:
    """Decides by the share of the run that is done, and remembers what it saw."""

    def __init__(self, scaling=False):
        """scaling: also turns LoRA's."""
        turns = (("adapter_scale", 2.0), ("adapter_scale", 0.5)) if scaling else ()
        self.manifest = SimpleNamespace(actions=Actions(turns=turns), decisions=10, features=())
        self.sha256, self.seen = "5" * 64, []
        self._actions = (UP, KEEP, UP, 2, ROLLBACK, DOWN, 5) if scaling else ACTIONS

    def act(self, observation):
        self.seen.append(observation)
        return self._actions[round(float(observation[0]) * 10) % len(self._actions)]

    def outside(self, observation):
        return []


class Rows(Dataset):
    """Texts of made-up words; two kinds, told apart by their words. Labels: the kind, or words."""

    def __init__(self, kind, count, seed):
        rng = np.random.default_rng(seed)
        self.rows = []
        for i in range(count):
            ids = rng.integers(2, WORDS // 2 + 5, LENGTH) + i % 2 * (WORDS // 2 - 5)
            label, hidden = i % 2, rng.integers(0, LENGTH - 2)
            if kind == "llama":  # as many labels as there happen to be
                label = np.where(np.arange(LENGTH) < hidden, -100, ids)
            self.rows.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(label)})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def model_of(kind):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 16, "pad_token_id": 0,
        "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2))
    calm = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**sizes, **calm, initializer_range=0.2))


def adapted(model):
    torch.manual_seed(1)
    return with_lora(model, ["classifier"])


class InOrder(Trainer):
    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


class Look(TrainerCallback):
    def __init__(self):
        self.rates = []

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(float(optimizer.param_groups[0]["lr"]))


class Break(TrainerCallback):
    """Breaks a tuner on one process."""

    def __init__(self, tuner, step):
        self.tuner, self.step = tuner, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.process_index == 1:
            self.tuner._crew.sight.eyes.error = RuntimeError("no memory here")


def outside(outputs, labels, num_items_in_batch=None):
    """A loss that the model knows nothing of."""
    return torch.nn.functional.cross_entropy(outputs.logits, labels, label_smoothing=0.1)


def run(folder, kind="bert", micro=BATCH, accumulation=1, resume=0, save=0, own=True, broken=0,
        plain=False, given=False, scaling=False, **more):  # fmt: skip
    """-> rates, observations and weights, and writes them to a file for this process.

    own: the tuner has validation rows. broken: the step at which it breaks on one process. given:
    it is given the Trainer, which computes the loss outside of the model. scaling: an adapter is
    trained, and its scaling turned.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    pilot, look = Pilot(scaling), Look()
    rows = Rows(kind, 32, 1) if own else None
    loss = outside if given else None
    tuner = TunerCallback(pilot, mode="explore", eval_dataset=rows)
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": micro, "max_steps": STEPS,
        "gradient_accumulation_steps": accumulation, "learning_rate": 5e-3, "use_cpu": True,
        "lr_scheduler_type": "linear", "report_to": "none", "disable_tqdm": True,
        "save_strategy": "steps" if save else "no", "save_steps": save or 1, "logging_steps": 1,
        "adam_epsilon": 1e-4, "dataloader_pin_memory": False,
        "average_tokens_across_devices": kind == "llama", "ddp_find_unused_parameters": False,
    } | more  # fmt: skip
    arguments = TrainingArguments(**settings)
    if arguments.fsdp and arguments.device:  # accelerate shards on accelerators: call these one
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_NPU
    trainer = InOrder(
        model=adapted(model_of(kind)) if scaling else model_of(kind), args=arguments,
        train_dataset=Rows(kind, STEPS * BATCH, 0), compute_loss_func=loss,
        callbacks=[look, *([] if plain else [tuner]), *([Break(tuner, broken)] if broken else [])],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    tuner._trainer = trainer if given else None
    if accumulation > 1 and kind == "bert":
        trainer.loss_is_scaled_for_ga = False
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = str(Path(folder) / f"checkpoint-{resume}")
    trainer.train(resume_from_checkpoint=path if resume else None)
    weights = [p.detach() for p in trainer.model.parameters()]
    sharded = any(hasattr(w, "full_tensor") for w in weights)
    weights = [w.full_tensor() if hasattr(w, "full_tensor") else w.clone() for w in weights]
    found = {"rates": look.rates, "seen": np.array(pilot.seen), "weights": weights,
             "sharded": sharded, "off": not plain and tuner._crew.helm.off,
             "logs": [x["loss"] for x in trainer.state.log_history if "loss" in x]}  # fmt: skip
    torch.save(found, Path(folder) / f"rank{trainer.args.process_index}-{resume}.pt")
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    random.seed(0)
    for name, options in json.loads(sys.argv[2]):
        run(Path(sys.argv[1]) / name, **options)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
