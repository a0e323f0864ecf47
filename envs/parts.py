"""Parts of a model that a knob acts on: layers that may be frozen, adapters that may be scaled."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from envs.knobs import Knobs
from envs.workload import layers_of


class Parts:
    """A model's trained layers, counted from the top, and its LoRA adapters.

    What comes before the layers, as embeddings do, counts as one more, the lowest; what comes
    after them is always trained. Weights that are not trained at the start never are, and an
    adapter that is not, as a frozen reference, keeps its scaling.
    """

    def __init__(self, model: nn.Module, scales: Sequence[float] | None = None) -> None:
        """scales: LoRA's own scalings, where a checkpoint has brought others."""
        stack = [*(layers_of(model) or [])]
        within = {id(p): number for number, part in enumerate(stack, 1) for p in part.parameters()}
        storeys: list[list[nn.Parameter]] = [[] for _ in range(len(stack) + 1)]
        number = 0
        for parameter in model.parameters():
            number = within.get(id(parameter), len(storeys) if number else 0)
            if parameter.requires_grad and number < len(storeys):
                storeys[number].append(parameter)
        self._storeys = [storey for storey in storeys if storey] if stack else []
        self._adapters = list(_adapters(model))
        found = [part.scaling[name] for part, name in self._adapters]
        same = scales is not None and len(scales) == len(found)
        self.scales: list[float] = [*scales] if scales is not None and same else found
        trained = {name for _, name in self._adapters}
        self._configs = [
            (config, config.lora_alpha, dict(config.alpha_pattern or {}))
            for config in _configs(model, trained)
        ]

    @property
    def depth(self) -> int:
        """The layers that are trained, what is below them among them."""
        return len(self._storeys)

    def fit(self, knobs: Knobs, now: Knobs) -> Knobs:
        """The wish as this model can have it; None leaves a knob as it is ``now``."""
        depth = now.depth if knobs.depth is None else min(knobs.depth, self.depth)
        scale = now.adapter_scale if knobs.adapter_scale is None else knobs.adapter_scale
        return knobs.having(
            depth=depth if self._storeys else None,
            adapter_scale=scale if self._adapters else None,
        )

    def put(self, knobs: Knobs) -> None:
        """Freeze and scale as fitted knobs say; frozen weights keep the optimizer's moments."""
        if knobs.depth is not None:
            lowest = self.depth - knobs.depth
            for number, storey in enumerate(self._storeys):
                for parameter in storey:
                    parameter.requires_grad_(number >= lowest)
                    if number < lowest:
                        parameter.grad = None  # or the optimizer would still move it
        if (scale := knobs.adapter_scale) is not None:
            for (part, name), own in zip(self._adapters, self.scales, strict=True):
                part.scaling[name] = scale * own
            for config, alpha, pattern in self._configs:  # or a saved adapter would lack the scale
                config.lora_alpha = alpha if scale == 1 else scale * alpha
                config.alpha_pattern = {key: scale * value for key, value in pattern.items()}

    def settle(self, scale: float) -> None:
        """LoRA's own scaling again: what an adapter adds at ``scale`` is now in its weights."""
        with torch.no_grad():
            for part, name in self._adapters:
                for weight in _upper(part, name):
                    weight.mul_(scale)
        self.put(Knobs(adapter_scale=1.0))


def _adapters(model: nn.Module) -> Iterator[tuple[Any, str]]:
    """The layers of peft that have a LoRA adapter in training, and its name."""
    part: Any
    for part in model.modules():
        if hasattr(part, "lora_A") and hasattr(part, "scaling"):
            for name in part.scaling:
                if any(weight.requires_grad for weight in _upper(part, name)):
                    yield part, name


def _upper(part: Any, name: str) -> list[nn.Parameter]:
    """The weights of an adapter that its output is linear in."""
    for kind in ("lora_B", "lora_embedding_B"):
        held = getattr(part, kind, {})
        if name in held:
            found = held[name]
            return [*found.parameters()] if isinstance(found, nn.Module) else [found]
    return []


def _configs(model: nn.Module, names: set[str]) -> list[Any]:
    """Their configurations, which are saved beside the weights."""
    found = {
        id(config): config
        for part in model.modules()
        for name, config in (getattr(part, "peft_config", None) or {}).items()
        if name in names and hasattr(config, "lora_alpha")
    }
    return list(found.values())
