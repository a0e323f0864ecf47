"""Parts of a model that a knob acts on: layers that may be frozen, adapters that may be scaled."""

from typing import Any

from torch import nn

from envs.knobs import Knobs
from envs.workload import layers_of


class Parts:
    """A model's trained layers, counted from the top, and its LoRA adapters.

    What comes before the layers, as embeddings do, counts as one more, the lowest; what comes
    after them is always trained. Weights that are not trained at the start never are.
    """

    def __init__(self, model: nn.Module) -> None:
        stack = [*(layers_of(model) or [])]
        within = {id(p): number for number, part in enumerate(stack, 1) for p in part.parameters()}
        storeys: list[list[nn.Parameter]] = [[] for _ in range(len(stack) + 1)]
        number = 0
        for parameter in model.parameters():
            number = within.get(id(parameter), len(storeys) if number else 0)
            if parameter.requires_grad and number < len(storeys):
                storeys[number].append(parameter)
        self._storeys = [storey for storey in storeys if storey] if stack else []
        self._adapters: list[tuple[dict[str, float], dict[str, float]]] = [
            (part.scaling, dict(part.scaling)) for part in _lora(model)
        ]

    def fit(self, knobs: Knobs, now: Knobs) -> Knobs:
        """The wish as this model can have it; None leaves a knob as it is ``now``."""
        depth = now.depth if knobs.depth is None else min(knobs.depth, len(self._storeys))
        scale = now.adapter_scale if knobs.adapter_scale is None else knobs.adapter_scale
        return knobs.having(
            depth=depth if self._storeys else None,
            adapter_scale=scale if self._adapters else None,
        )

    def put(self, knobs: Knobs) -> None:
        """Freeze and scale as fitted knobs say; frozen weights keep the optimizer's moments."""
        if knobs.depth is not None:
            lowest = len(self._storeys) - knobs.depth
            for number, storey in enumerate(self._storeys):
                for parameter in storey:
                    parameter.requires_grad_(number >= lowest)
                    if number < lowest:
                        parameter.grad = None  # or the optimizer would still move it
        if knobs.adapter_scale is not None:
            for scaling, own in self._adapters:
                scaling.update({name: knobs.adapter_scale * value for name, value in own.items()})


def _lora(model: nn.Module) -> list[Any]:
    """The layers of peft that have a LoRA adapter."""
    return [
        part for part in model.modules() if hasattr(part, "lora_A") and hasattr(part, "scaling")
    ]
