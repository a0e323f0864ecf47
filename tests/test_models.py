"""The encoders that ship with the project."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

MODELS = Path(__file__).resolve().parent.parent / "envs" / "models"
WIDTHS = {"tiny-32": 32, "tiny-64": 64, "tiny-128": 128}
# Near, near, far: the first two mean nearly the same, the third something else.
TRIPLES = [
    ("a small dog barked", "the puppy is barking", "the price of the shares fell"),
    ("he was very sad", "his grief was great", "a machine that prints books"),
    ("the ship sailed across the sea", "a boat on the ocean", "a chapter of law on taxes"),
    ("a physician who treats children", "a doctor for babies", "the mountain is covered in snow"),
    ("she plays the violin", "he performs music on the piano", "a disease of the liver"),
    ("where is the capital city?", "which town is the seat of government?", "he ate an apple"),
]


def embed(name: str, texts: list[str]) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(MODELS / name, local_files_only=True)
    model = AutoModel.from_pretrained(MODELS / name, dtype=torch.float32, local_files_only=True)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model.eval()(**batch).last_hidden_state
    weight = batch["attention_mask"].unsqueeze(-1)
    return (hidden * weight).sum(1) / weight.sum(1)


@pytest.mark.parametrize("name", WIDTHS)
def test_loads_offline_with_its_width_and_a_pad_token(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = AutoTokenizer.from_pretrained(MODELS / name)
    model = AutoModel.from_pretrained(MODELS / name, dtype=torch.float32)
    assert tokenizer.pad_token_id == model.config.pad_token_id
    assert len(tokenizer) == model.config.vocab_size
    assert model.config.hidden_size == WIDTHS[name]
    assert model.dtype == torch.float32
    ids = tokenizer("One text.")["input_ids"]
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)


@pytest.mark.parametrize("name", WIDTHS)
def test_embeddings_are_finite_and_padding_does_not_change_them(name):
    texts = ["x", "", "word " * 100, "日本語 ☃ ünïcode", "What is the capital of France?"]
    together = embed(name, texts)
    assert together.shape == (5, WIDTHS[name])
    assert torch.isfinite(together).all()
    assert torch.allclose(together[:1], embed(name, texts[:1]), atol=1e-4)


@pytest.mark.parametrize("name", WIDTHS)
def test_similar_sentences_are_nearer_than_unrelated_ones(name):
    flat = embed(name, [text for triple in TRIPLES for text in triple])
    first, near, far = (
        torch.nn.functional.normalize(flat, dim=1).view(-1, 3, WIDTHS[name]).unbind(1)
    )
    margins = (first * near).sum(1) - (first * far).sum(1)
    assert (margins > 0.05).all(), margins


@pytest.mark.parametrize("name", WIDTHS)
def test_the_card_states_licence_data_command_and_probe(name):
    card = (MODELS / name / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    for fact in ("WordNet", "King James", "make_encoders.py make", "## Probe", f"| {name}, random"):
        assert fact in card


def test_all_together_are_smaller_than_five_megabytes():
    sizes = [path.stat().st_size for path in MODELS.rglob("*") if path.is_file()]
    assert sum(sizes) < 5_000_000
