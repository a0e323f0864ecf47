"""Spanish verses in English: with and without the tuner.

python examples/translation.py
"""

import argparse

from sacrebleu.metrics import CHRF
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EncoderDecoderModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

from envs import catalog, texts
from tuner import TunerCallback

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=catalog.model_path("tiny-32"), help="an encoder; used twice")
parser.add_argument("--rate", type=float, default=7e-4, help="learning rate; a decade too low")
parser.add_argument("--steps", type=int, default=60, help="updates")
args = parser.parse_args()

data = texts.verses()  # fetched on first use by: steersman fetch verses
tokenizer = AutoTokenizer.from_pretrained(args.model)


def rows(split, most=1000):
    part = data[split][:most]
    both = {"text": [row.source for row in part], "text_target": [row.target for row in part]}
    coded = tokenizer(**both, truncation=True, max_length=32)
    # The first token, [CLS], is where the decoder starts from: it is not to be written.
    return [{"input_ids": ids, "labels": target[1:]}
            for ids, target in zip(coded["input_ids"], coded["labels"], strict=True)]  # fmt: skip


for name in ("unsteered", "steered"):
    set_seed(0)
    model = EncoderDecoderModel.from_encoder_decoder_pretrained(args.model, args.model).float()
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id = tokenizer.cls_token_id
        config.eos_token_id, config.pad_token_id = tokenizer.sep_token_id, tokenizer.pad_token_id
    arguments = Seq2SeqTrainingArguments(
        "runs/translation", max_steps=args.steps, learning_rate=args.rate, save_strategy="no",
        per_device_train_batch_size=16, per_device_eval_batch_size=64, report_to="none",
    )  # fmt: skip
    trainer = Seq2SeqTrainer(
        model, arguments, DataCollatorForSeq2Seq(tokenizer), rows("train"), rows("validation", 128)
    )
    if name == "steered":
        trainer.add_callback(TunerCallback("default", mode="explore", trainer=trainer))
    trainer.train()
    trainer.args.predict_with_generate = True
    found = trainer.predict(rows("test", 64), max_new_tokens=32)
    written = tokenizer.batch_decode(found.predictions.clip(0), skip_special_tokens=True)
    score = CHRF().corpus_score(written, [[row.target for row in data["test"][:64]]]).score
    print(f"{name}: test chrF {score:.1f}, loss {found.metrics['test_loss']:.3f}")
