"""The models that ship with the project, and the one that is read from a GGUF file."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from envs import catalog, smollm
from envs.errors import BadInput
from envs.task import TASKS

MODELS = Path(__file__).resolve().parent.parent / "envs" / "models"
WIDTHS = {"tiny-32": 32, "tiny-64": 64, "tiny-128": 128}
DECODERS = {"tiny-gpt-32": 32, "tiny-gpt-64": 64}
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


def decoder(name):
    """As a user or a trainer loads it."""
    path = catalog.model_path(name)
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_loads_offline_in_float32_with_what_trainers_need(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, tokenizer = decoder(name)
    assert model.dtype == torch.float32
    assert model.config.n_embd == DECODERS[name]
    assert len(tokenizer) == model.config.vocab_size == 2048
    assert tokenizer.pad_token_id == model.config.pad_token_id
    assert tokenizer.eos_token_id == model.config.eos_token_id != tokenizer.pad_token_id
    for text in ("It is a truth universally acknowledged.", "日本語 ☃ ünïcode", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    turns = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert prompt == "user: Hello?<|endoftext|>\nassistant: "
    assert whole == f"{prompt}Yes.<|endoftext|>\n"


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_has_learned_and_padding_does_not_change_it(name):
    model, tokenizer = decoder(name)
    text = "a person who is employed to do the work of the house; she was very fond of her sister"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        alone = model(input_ids=ids, labels=ids)
        padded = tokenizer([text, text * 3], padding=True, return_tensors="pt")
        together = model(**padded).logits[0, : ids.shape[1]]
        torch.manual_seed(0)
        untrained = AutoModelForCausalLM.from_config(model.config).eval()(ids, labels=ids)
    assert torch.allclose(alone.logits[0], together, atol=1e-3)
    # One token in 2,048 costs 7.6; frequencies alone 6.4.
    assert untrained.loss > 7
    assert alone.loss < 4.9


@pytest.mark.parametrize("name", DECODERS)
def test_the_card_of_a_decoder_states_licence_data_command_and_perplexity(name):
    card = (MODELS / name / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    for fact in ("WordNet", "Austen", "make_decoders.py make", "## Perplexity", "| untrained |"):
        assert fact in card
    figures = {
        row.split("|")[1].strip(): float(row.split("|")[2].replace(",", ""))
        for row in card.splitlines()
        if row.startswith(("| tiny", "| freq", "| untr"))
    }
    assert 2 * figures[name] < figures["frequencies alone"] < figures["untrained"] / 2


def test_decoders_are_models_but_no_tasks_of_classification():
    assert {*DECODERS, "smollm2-135m"} == set(catalog.DECODERS)
    assert set(catalog.MODELS) == {*catalog.ENCODERS, *catalog.DECODERS}
    assert not {task.model for task in TASKS.values()} & set(catalog.DECODERS)


def test_smollm_that_is_not_fetched_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("STEERSMAN_CACHE", str(tmp_path))
    with pytest.raises(BadInput, match="run `steersman fetch smollm2-135m`"):
        smollm.load()


@pytest.mark.slow
def test_smollm_knows_a_capital_and_is_the_same_once_saved(tmp_path):
    catalog.fetch(["smollm2-135m"])
    model, tokenizer = smollm.load()
    assert model.dtype == torch.float32
    assert model.num_parameters() == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt")
    found = model.generate(**ids, max_new_tokens=3, do_sample=False)[0]
    assert tokenizer.decode(found).startswith("The capital of France is Paris")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(**ids).logits, model(**ids).logits)


def test_all_together_are_smaller_than_five_megabytes():
    sizes = [path.stat().st_size for path in MODELS.rglob("*") if path.is_file()]
    assert sum(sizes) < 5_000_000
