"""Candidates: answers of a model to prompts, decoded in five ways."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

LENGTH = 16  # tokens of an answer
AT_ONCE = 128  # prompts in one forward pass

WAYS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "greedy": {"do_sample": False},
        "beam": {"do_sample": False, "num_beams": 4},
        "sampling": {"do_sample": True, "top_k": 0},
        "top-k": {"do_sample": True, "top_k": 20},
        "nucleus": {"do_sample": True, "top_k": 0, "top_p": 0.9},
    }
)


@dataclass(frozen=True)
class Item:
    """A prompt, answers to it, and the way in which each was decoded."""

    id: str
    prompt: str
    texts: tuple[str, ...]
    ways: tuple[str, ...]


def answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], way: str = "sampling", *, seed: int
) -> list[str]:
    """One answer to each prompt; the seed draws what is random in it."""
    found: list[str] = []
    model.eval()
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        for at in range(0, len(prompts), AT_ONCE):
            lines = [prompt + "\n" for prompt in prompts[at : at + AT_ONCE]]
            code = tokenizer(lines, return_tensors="pt", padding=True, padding_side="left")
            written = model.generate(
                **code.to(model.device), **WAYS[way], min_new_tokens=3, max_new_tokens=LENGTH
            )[:, code["input_ids"].shape[1] :]
            texts = tokenizer.batch_decode(written, skip_special_tokens=True)
            found += [" ".join(text.split()) for text in texts]
    return found


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, name: str, seed: int
) -> list[Item]:
    """Each prompt's answers in every way of decoding; of equal answers one."""
    columns = [
        answers(model, tokenizer, prompts, way, seed=seed + place) for place, way in enumerate(WAYS)
    ]
    items = []
    for place, (prompt, *texts) in enumerate(zip(prompts, *columns, strict=True)):
        first: dict[str, str] = {}
        for text, way in zip(texts, WAYS, strict=True):
            if text:
                first.setdefault(text, way)
        items.append(Item(f"{name}-{place}", prompt, tuple(first), tuple(first.values())))
    return items
