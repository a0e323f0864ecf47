"""Pretrain the tiny causal language models under ``envs/models``.

GPT-2 of two layers with a byte-level BPE vocabulary, on WordNet and Jane Austen
(`permissive_text`). The Bible is left out: `envs.texts` has it to learn and to translate.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from permissive_text import austen, fetch_sources, wordnet
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from envs import texts

MODELS = Path(__file__).resolve().parent.parent / "envs" / "models"
CARD = Path(__file__).with_name("decoder_card.md")
VOCABULARY = 2048
POSITIONS = 128
BATCH = 8
SENTENCES = 6  # of Austen, in one document
END, PAD = "<|endoftext|>", "<|pad|>"
TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] + ': ' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
EXAMPLES = """examples:
  python scripts/make_decoders.py make      # ten minutes of one busy core
  python scripts/make_decoders.py measure   # the figures of the cards again
"""


@dataclass(frozen=True)
class Shape:
    """A width, and how it learns."""

    name: str
    width: int
    heads: int
    epochs: float
    peak: float  # of the one-cycle learning rate


SHAPES = (Shape("tiny-gpt-32", 32, 2, 0.5, 8e-3), Shape("tiny-gpt-64", 64, 4, 0.5, 5e-3))


def documents(folder: Path, seed: int) -> tuple[list[str], list[str]]:
    """Texts of at least three words in random order: those to learn from, and 2 % held out."""
    sentences = list(austen(folder))
    groups = (sentences[at : at + SENTENCES] for at in range(0, len(sentences), SENTENCES))
    found = dict.fromkeys(text for text in wordnet(folder) if len(text.split()) >= 3)
    found |= dict.fromkeys(" ".join(group) for group in groups)
    every = list(found)
    order = np.random.default_rng(seed).permutation(len(every))
    held_out = len(every) // 50
    return [every[i] for i in order[held_out:]], [every[i] for i in order[:held_out]]


def make_tokenizer(learned: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCABULARY` entries: no text is unknown to it."""
    raw = ByteLevelBPETokenizer()
    raw.train_from_iterator(learned, VOCABULARY, special_tokens=[END, PAD], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw._tokenizer,
        model_max_length=POSITIONS,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def blocks(tokenizer: PreTrainedTokenizerFast, given: Sequence[str]) -> torch.Tensor:
    """(blocks, `POSITIONS`) token ids: the texts one after another, each behind an end mark."""
    end = tokenizer.eos_token_id
    rows = tokenizer(list(given), truncation=False, verbose=False)["input_ids"]
    stream = [token for row in rows for token in (end, *row)]
    whole = len(stream) // POSITIONS * POSITIONS
    return torch.tensor(stream[:whole]).view(-1, POSITIONS)


def config(shape: Shape, tokenizer: PreTrainedTokenizerFast) -> GPT2Config:
    """GPT-2, small, without dropout; float32 once it is loaded."""
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=POSITIONS,
        n_embd=shape.width,
        n_layer=2,
        n_head=shape.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def batches(data: torch.Tensor, epochs: float, seed: int) -> Iterator[torch.Tensor]:
    """Batches of blocks in random order, each epoch in another one."""
    random = np.random.default_rng(seed)
    orders = [random.permutation(len(data)) for _ in range(math.ceil(epochs))]
    order = np.concatenate(orders)[: int(epochs * len(data))]
    for start in range(0, len(order) - BATCH + 1, BATCH):
        yield data[order[start : start + BATCH]]


def pretrain(shape: Shape, start: GPT2Config, data: torch.Tensor, seed: int) -> GPT2LMHeadModel:
    """A model that predicts the next token of ``data``."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(start)
    steps = sum(1 for _ in batches(data, shape.epochs, seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=shape.peak, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, shape.peak, steps, pct_start=0.1)
    losses: list[float] = []
    began = time.monotonic()
    for step, batch in enumerate(batches(data, shape.epochs, seed), 1):
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 200 == 0 or step == steps:
            spent = time.monotonic() - began
            mean = np.mean(losses[-100:])
            print(
                f"{shape.name}: step {step} of {steps}, loss {mean:.3f}, {spent:.0f} s", flush=True
            )
    return model


def perplexity(model: GPT2LMHeadModel, data: torch.Tensor) -> float:
    """The exponential of the mean loss of every token but the first of a block."""
    model.eval()
    with torch.inference_mode():
        parts = [(len(b), model(input_ids=b, labels=b).loss.item()) for b in data.split(BATCH)]
    return math.exp(sum(size * loss for size, loss in parts) / len(data))


def unigram(learned: torch.Tensor, data: torch.Tensor) -> float:
    """The same of a model that knows only how frequent each token is (one added to each)."""
    counts = torch.bincount(learned.flatten(), minlength=VOCABULARY) + 1.0
    return math.exp(-(counts / counts.sum()).log()[data[:, 1:]].mean().item())


def save(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a transformers directory: float16 on the disk, float32 when it is loaded."""
    model.to(torch.float16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    for name, changes, space in (
        ("config.json", {"dtype": "float32"}, 2),
        ("tokenizer.json", {}, None),
    ):
        path = folder / name
        content = json.loads(path.read_text()) | changes
        separators = (",", ":") if space is None else None
        path.write_text(json.dumps(content, indent=space, separators=separators) + "\n")


def measure(learned: Sequence[str], held_out: Sequence[str]) -> None:
    """Write the model cards, with the perplexities of the shipped models."""
    texts.fetch("plain")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODELS / SHAPES[0].name)
    sets = [blocks(tokenizer, given) for given in (learned, held_out, texts.plain()["test"])]
    baseline = [unigram(sets[0], data) for data in sets[1:]]
    for shape in SHAPES:
        model = GPT2LMHeadModel.from_pretrained(MODELS / shape.name)
        torch.manual_seed(0)
        untrained = GPT2LMHeadModel(model.config)
        rows = {
            shape.name: [perplexity(model, data) for data in sets[1:]],
            "frequencies alone": baseline,
            "untrained": [perplexity(untrained, data) for data in sets[1:]],
        }
        table = "\n".join(
            f"| {name} | {' | '.join(f'{figure:,.1f}' for figure in figures)} |"
            for name, figures in rows.items()
        )
        print(table)
        facts = {
            **vars(shape),
            "size": VOCABULARY,
            "batch": BATCH,
            "tokens": f"{sets[0].numel():,}",
            "parameters": f"{model.num_parameters():,}",
            "held_out": f"{sets[1].numel():,}",
        }
        (MODELS / shape.name / "README.md").write_text(
            CARD.read_text().format(**facts, table=table)
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``make`` (pretrain, then measure) or ``measure`` alone; both write the model cards."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=layout)
    parser.add_argument("command", choices=("make", "measure"))
    parser.add_argument("--work", type=Path, default=Path("runs/encoders"), help="kept folder")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    learned, held_out = documents(fetch_sources(given.work), seed=0)
    if given.command == "make":
        tokenizer = make_tokenizer(learned)
        data = blocks(tokenizer, learned)
        print(f"{len(learned)} texts, {data.numel()} tokens")
        for shape in SHAPES:
            model = pretrain(shape, config(shape, tokenizer), data, seed=0)
            save(model, tokenizer, MODELS / shape.name)
    measure(learned, held_out)


if __name__ == "__main__":
    main()
