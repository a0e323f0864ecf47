"""A tiny encoder and a tiny data set, made here: what a test needs to fine-tune for real.

Nothing is fetched and nothing is trained beforehand: each class has words of its own.
"""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from envs.task import Task

CLASSES = ("animal", "city", "tool")
WORDS = {
    "animal": ("cat", "dog", "horse", "goat"),
    "city": ("street", "tower", "bridge", "market"),
    "tool": ("hammer", "saw", "drill", "chisel"),
}
FILLER = ("the", "a", "one", "near", "old", "with", "and", "big", "small", "some")
POSITIONS = 16


def write_data(path: Path, rows: int = 480, seed: int = 0) -> Path:
    """A CSV of ``text,label``: three words of the class among fillers; no repeats."""
    rng = np.random.default_rng(seed)
    texts: dict[str, str] = {}
    while len(texts) < rows:
        label = CLASSES[len(texts) % len(CLASSES)]
        words = [*rng.choice(WORDS[label], 3), *rng.choice(FILLER, int(rng.integers(2, 6)))]
        texts[" ".join(rng.permutation(words))] = label
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *texts.items()])
    return path


def tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece over the data set's words and the letters."""
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [letter for c in "abcdefghijklmnopqrstuvwxyz0123456789" for letter in (c, f"##{c}")]
    words = [word for group in (*WORDS.values(), FILLER) for word in group if len(word) > 1]
    vocabulary = {token: i for i, token in enumerate([*marks, *letters, *words])}
    raw = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, model_max_length=POSITIONS, pad_token="[PAD]", unk_token="[UNK]",
        cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip


def write_model(folder: Path, width: int = 16, layers: int = 2, **config: Any) -> Path:
    """A random BERT of that width with its tokenizer, as ``from_pretrained`` reads it."""
    words = tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": len(words),
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 2 * width,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertModel(BertConfig(**(settings | config)))
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def write_decoder(folder: Path, width: int = 16) -> Path:
    """A random one-layer GPT-2 that reads bytes, with its tokenizer."""
    marks = ["<pad>", "<eos>"]
    vocabulary = {
        token: i for i, token in enumerate([*marks, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    raw = Tokenizer(models.BPE(vocabulary, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    words = PreTrainedTokenizerFast(
        tokenizer_object=raw, model_max_length=64, pad_token="<pad>", eos_token="<eos>"
    )
    config = GPT2Config(
        vocab_size=len(words), n_positions=64, n_embd=width, n_layer=1, n_head=2,
        bos_token_id=1, eos_token_id=1, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def task(data: Path, model: Path, **changes: Any) -> Task:
    """Twenty updates in five decisions on 200 rows, some milliseconds each."""
    settings: dict[str, Any] = {
        "rows": 200, "batch": 8, "steps": 20, "interval": 4, "max_length": 12,
        "validation_rows": 48, "selection_rows": 48, "test_rows": 48,
    }  # fmt: skip
    return Task(str(data), str(model), **(settings | changes))
