"""The part of speech of each Chinese word, with and without the tuner: python examples/tokens.py"""

import argparse

from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers import DataCollatorForTokenClassification as Collator

from envs import catalog, texts
from tuner import TunerCallback

parser = argparse.ArgumentParser(description=__doc__)
default = catalog.model_path("tiny-gpt-32")
parser.add_argument("--model", default=default, help="a folder or a hub id")
parser.add_argument("--rate", type=float, default=1e-3, help="learning rate; a decade too low")
parser.add_argument("--steps", type=int, default=60, help="updates")
args = parser.parse_args()

data = texts.tagged()  # fetched on first use by: steersman fetch tagged
tokenizer = AutoTokenizer.from_pretrained(args.model)


def rows(split, most=1000):
    found = []
    for sentence in data[split][:most]:
        code = tokenizer(
            list(sentence.words), is_split_into_words=True, truncation=True, max_length=96
        )
        words = code.word_ids()  # a word is judged at its last token
        last = [word != after for word, after in zip(words, [*words[1:], None], strict=True)]
        labels = [texts.TAGS.index(sentence.tags[word]) if end and word is not None else -100
                  for word, end in zip(words, last, strict=True)]  # fmt: skip
        found.append({"input_ids": code["input_ids"], "labels": labels})
    return found


def accuracy(found):
    counted = found.label_ids != -100
    hits = found.predictions.argmax(-1) == found.label_ids
    return {"accuracy": float(hits[counted].mean())}


for name in ("unsteered", "steered"):
    set_seed(0)
    model = AutoModelForTokenClassification.from_pretrained(args.model, num_labels=len(texts.TAGS))
    arguments = TrainingArguments(
        "runs/tokens", max_steps=args.steps, learning_rate=args.rate, save_strategy="no",
        per_device_train_batch_size=16, per_device_eval_batch_size=64, report_to="none",
    )  # fmt: skip
    trainer = Trainer(model, arguments, Collator(tokenizer), rows("train"),
                      rows("validation", 128), compute_metrics=accuracy)  # fmt: skip
    if name == "steered":
        trainer.add_callback(TunerCallback("default", mode="explore", trainer=trainer))
    trainer.train()
    print(f"{name}: test accuracy {trainer.evaluate(rows('test', 256))['eval_accuracy']:.3f}")
