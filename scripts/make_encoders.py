"""Distil MiniLM-L6 into the tiny encoders under ``envs/models``.

A student is a two-layer BERT. Its mean over tokens, mapped by a linear layer that is thrown away
afterwards, learns to point where MiniLM's sentence embedding points; the cosines among the
sentences of a batch learn to be MiniLM's too. The text is WordNet, the King James Bible and Jane
Austen (`permissive_text`): none of it one of our tasks.
"""

import argparse
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from permissive_text import corpus, fetch_sources
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
from sklearn.pipeline import make_pipeline  # type: ignore[import-untyped]
from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]
from tokenizers import BertWordPieceTokenizer
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from envs import catalog

MODELS = Path(__file__).resolve().parent.parent / "envs" / "models"
VOCABULARY = 5400
TEXTS = 100_000
BATCH = 256
TASKS = ("trec6", "tweets")  # of the probe; never trained on
EXAMPLES = """examples:
  python scripts/make_encoders.py make    # a quarter of an hour on two cores; resumes
  python scripts/make_encoders.py probe   # measure the shipped encoders again
"""
CARD = Path(__file__).with_name("encoder_card.md")


@dataclass(frozen=True)
class Student:
    """A shape, and how long it learns."""

    name: str
    width: int
    heads: int
    epochs: int
    peak: float  # of the one-cycle learning rate


STUDENTS = (
    Student("tiny-32", 32, 2, 2, 5e-3),
    Student("tiny-64", 64, 4, 2, 4e-3),
    Student("tiny-128", 128, 4, 1, 3e-3),
)


def mean_pool(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(batch, length, width) and (batch, length) -> (batch, width): the mean over real tokens."""
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1)


def embed(folder: Path, texts: Sequence[str], seed: int | None = None) -> npt.NDArray[np.float32]:
    """Frozen mean-pooled embeddings, (texts, width); ``seed`` discards the weights."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    if seed is not None:
        torch.manual_seed(seed)
        model = AutoModel.from_config(model.config).eval()
    rows = tokenizer(list(texts), truncation=True, max_length=48)["input_ids"]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    pooled = np.zeros((len(rows), model.config.hidden_size), np.float32)
    with torch.inference_mode():
        for start in range(0, len(rows), 256):
            chosen = order[start : start + 256]
            batch = tokenizer.pad({"input_ids": [rows[i] for i in chosen]}, return_tensors="pt")
            hidden = model(**batch).last_hidden_state
            pooled[chosen] = mean_pool(hidden, batch["attention_mask"]).numpy()
    return pooled


def teach(teacher: Path, texts: Sequence[str], work: Path, shard: int = 10_000) -> torch.Tensor:
    """The teacher's unit embeddings, (texts, 384); each finished shard is kept in ``work``."""
    parts = []
    for start in range(0, len(texts), shard):
        chosen = texts[start : start + shard]
        path = work / f"teacher-{zlib.crc32(chr(10).join(chosen).encode()):08x}.npy"
        if not path.exists():
            with open(path.with_suffix(".part"), "wb") as file:
                np.save(file, embed(teacher, chosen).astype(np.float16))
            path.with_suffix(".part").rename(path)
            print(f"teacher: {start + len(chosen)} texts")
        parts.append(torch.from_numpy(np.load(path)))
    return F.normalize(torch.cat(parts).float(), dim=1)


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A lower-case WordPiece tokenizer of `VOCABULARY` entries, learned from ``texts``."""
    raw = BertWordPieceTokenizer(lowercase=True)
    raw.train_from_iterator(texts, VOCABULARY, limit_alphabet=80, show_progress=False)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    # The trainer breaks ties differently in each run; numbered by name, few entries can differ.
    entries = [*special, *sorted(set(raw.get_vocab()).difference(special))]
    raw = BertWordPieceTokenizer({entry: i for i, entry in enumerate(entries)}, lowercase=True)
    marks = {f"{entry[1:-1].lower()}_token": entry for entry in special}
    return PreTrainedTokenizerFast(tokenizer_object=raw._tokenizer, model_max_length=128, **marks)


def batches(rows: Sequence[list[int]], random: np.random.Generator) -> list[list[int]]:
    """Batches of indices of ``rows`` of similar length, in random order."""
    order = random.permutation(len(rows))
    found = []
    for start in range(0, len(order), BATCH * 50):
        block = sorted(order[start : start + BATCH * 50], key=lambda i: len(rows[i]))
        found += [block[at : at + BATCH] for at in range(0, len(block), BATCH)]
    return [found[i] for i in random.permutation(len(found))]


def distil(
    student: Student,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    targets: torch.Tensor,
    pieces: torch.Tensor,
    seed: int,
) -> BertModel:
    """A student trained towards ``targets``, the teacher's unit embeddings of ``texts``.

    It starts as a bag of words: its token embeddings are the principal components of ``pieces``,
    the teacher's embeddings of the vocabulary's entries.
    """
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=student.width,
        num_hidden_layers=2,
        num_attention_heads=student.heads,
        intermediate_size=4 * student.width,
        max_position_embeddings=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = BertModel(config)
    head = torch.nn.Linear(student.width, targets.shape[1])
    axes = torch.pca_lowrank(pieces, student.width, niter=4)[2]
    start = (pieces - pieces.mean(0)) @ axes
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(0.1 * start / start.std())
        head.weight.copy_(axes / student.width**0.5)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=student.peak, weight_decay=0.01)
    rows = tokenizer(list(texts), truncation=True, max_length=48)["input_ids"]
    steps = student.epochs * len(batches(rows, random))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, student.peak, steps, pct_start=0.15)
    for epoch in range(student.epochs):
        losses = []
        for chosen in batches(rows, random):
            batch = tokenizer.pad({"input_ids": [rows[i] for i in chosen]}, return_tensors="pt")
            pooled = mean_pool(model(**batch).last_hidden_state, batch["attention_mask"])
            goal = targets[chosen]
            direction = 1 - F.cosine_similarity(head(pooled), goal).mean()
            unit = F.normalize(pooled, dim=1)
            likeness = F.mse_loss(unit @ unit.T, goal @ goal.T)
            optimizer.zero_grad()
            torch.autograd.backward(direction + 5 * likeness)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            losses.append((direction.item(), likeness.item()))
        print(f"{student.name} epoch {epoch}: losses {np.mean(losses, axis=0)}")
    return model


def save(model: BertModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a transformers directory: weights in float16, tokenizer without white space."""
    model.to(torch.float16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), separators=(",", ":")) + "\n")


def probe(seeds: int = 5, rows: int = 600) -> dict[str, list[str]]:
    """Accuracy of logistic regression on frozen embeddings: encoder -> one cell for each task."""
    catalog.fetch([*TASKS, "minilm-l6"])
    names = [*(student.name for student in STUDENTS), "minilm-l6"]
    starts = [(name, start) for name in names for start in ("pretrained", "random")]
    table: dict[str, list[str]] = {}
    for task in TASKS:
        train, test = (catalog.load(task)[split] for split in ("train", "test"))
        draws = [np.random.default_rng(i).permutation(len(train))[:rows] for i in range(seeds)]
        every = np.unique(draws)  # sorted, so that a draw's places in it can be searched
        for name, start in starts[:-1]:  # MiniLM is not tried at random
            folder, scores = Path(catalog.model_path(name)), []
            for seed, drawn in enumerate(draws):
                if start == "random" or seed == 0:
                    used, weights = (drawn, seed) if start == "random" else (every, None)
                    texts = [*(train.texts[i] for i in np.sort(used)), *test.texts]
                    features = embed(folder, texts, weights)
                places = np.searchsorted(np.sort(used), drawn)
                model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
                model.fit(features[places], train.labels[drawn])
                scores.append(float(model.score(features[len(used) :], test.labels)))
            cell = f"{np.mean(scores):.3f} ± {np.std(scores, ddof=1):.3f}"
            table.setdefault(f"{name}, {start}", []).append(cell)
    return table


def write_card(student: Student, table: dict[str, list[str]]) -> None:
    """The model card, with the rows of the probe that concern ``student`` and the teacher."""
    concerned = {k: v for k, v in table.items() if k.startswith((f"{student.name},", "minilm"))}
    lines = [f"| {name} | {' | '.join(cells)} |" for name, cells in concerned.items()]
    header = [f"| encoder | {' | '.join(TASKS)} |", "|---" * (len(TASKS) + 1) + "|"]
    facts = {**vars(student), "size": VOCABULARY, "texts": f"{TEXTS:,}"}
    text = CARD.read_text().format(**facts, table="\n".join([*header, *lines]))
    (MODELS / student.name / "README.md").write_text(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``make`` (distil, then probe) or ``probe`` alone; both write the model cards."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=layout)
    parser.add_argument("command", choices=("make", "probe"), help="distil and probe, or probe")
    parser.add_argument("--work", type=Path, default=Path("runs/encoders"), help="kept folder")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    if given.command == "make":
        texts = corpus(fetch_sources(given.work), TEXTS, seed=0)
        catalog.fetch(["minilm-l6"])
        teacher = Path(catalog.model_path("minilm-l6"))
        targets = teach(teacher, texts, given.work)
        tokenizer = make_tokenizer(texts)
        entries = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        pieces = teach(teacher, [entry.removeprefix("##") for entry in entries], given.work)
        for student in STUDENTS:
            model = distil(student, tokenizer, texts, targets, pieces, seed=0)
            save(model, tokenizer, MODELS / student.name)
    table = probe()
    for student in STUDENTS:
        write_card(student, table)
    print("\n".join(f"{name}: {', '.join(cells)}" for name, cells in table.items()))


if __name__ == "__main__":
    main()
