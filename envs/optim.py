"""Updates: AdamW, SGD with momentum and RMSprop, for one run or for a stack of runs.

One definition of what an optimizer keeps (`MOMENTS`), of its constants, and of what it inherits
from another one, for the plain loop and for packed runs.
"""

from typing import Any

import torch
from torch import Tensor, nn

from envs.knobs import Knobs, Optimizer

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # AdamW (Loshchilov & Hutter 2019)
MOMENTUM = 0.9  # SGD (Sutskever et al. 2013, without Nesterov)
ALPHA = 0.99  # RMSprop
DECAY = {"adamw": BETA2, "rmsprop": ALPHA}  # of the second moment
FIRST = {"adamw": "exp_avg", "sgd": "momentum_buffer", "rmsprop": None}  # torch's own names
SECOND = {"adamw": "exp_avg_sq", "sgd": None, "rmsprop": "square_avg"}


def group(parameters: list[nn.Parameter], knobs: Knobs) -> list[dict[str, Any]]:
    """Parameter groups: weight decay on matrices only, as transformers does."""
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": knobs.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def make(parameters: list[nn.Parameter], knobs: Knobs) -> torch.optim.Optimizer:
    """A fresh optimizer."""
    return build(knobs.optimizer, group(parameters, knobs), knobs.rate)


def build(
    kind: Optimizer, groups: list[dict[str, Any]], rate: float = 1e-3
) -> torch.optim.Optimizer:
    """A fresh optimizer of a kind over groups; ``rate`` for those that name none."""
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=rate, fused=True)
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=MOMENTUM)
    return torch.optim.RMSprop(groups, lr=rate, alpha=ALPHA)


def inherit(
    old: Optimizer, new: Optimizer, first: Tensor | None, second: Tensor | None, step: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The moments of one optimizer -> those that another starts from; None: from nothing.

    A mean that decays by b has grown to 1 - b^steps of what it measures: the second moment is
    rescaled to where the new optimizer's own would be. SGD's buffer sums gradients, AdamW's first
    moment averages them: a factor of 1 / (1 - 0.9).
    """
    if new == "sgd":
        scale = 1 / (1 - BETA1) if old == "adamw" else 1.0
        return (None, None) if first is None else (first * scale, None)
    if second is None:
        return None, None
    if old != new:
        second = second * ((1 - DECAY[new] ** step) / (1 - DECAY[old] ** step))
    return (first if new == "adamw" else None), second


def hand_over(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], knobs: Knobs
) -> torch.optim.Optimizer:
    """A new optimizer that inherits what it can use of the old one's moments."""
    new = make(parameters, knobs)
    old: Optimizer = {"AdamW": "adamw", "SGD": "sgd", "RMSprop": "rmsprop"}[  # type: ignore[assignment]
        type(optimizer).__name__
    ]
    pass_on(optimizer, new, old, knobs.optimizer)
    return new


def pass_on(
    optimizer: torch.optim.Optimizer, heir: torch.optim.Optimizer, old: Optimizer, new: Optimizer
) -> None:
    """Give a fresh optimizer of kind ``new`` what it can use of the moments of one of ``old``."""
    for parameter in (p for group in heir.param_groups for p in group["params"]):
        have = optimizer.state.get(parameter, {})
        step = have.get("step", torch.tensor(0.0)).to(parameter.device, copy=True)
        first, second = inherit(
            old, new, have.get(FIRST[old] or ""), have.get(SECOND[old] or ""), step
        )
        if new == "sgd" and first is not None:
            heir.state[parameter] = {"momentum_buffer": first.clone()}
        elif new == "rmsprop" and second is not None:
            heir.state[parameter] = {"step": step.cpu(), "square_avg": second.clone()}
        elif new == "adamw" and second is not None:
            heir.state[parameter] = {
                "step": step,
                "exp_avg": first.clone() if first is not None else torch.zeros_like(parameter),
                "exp_avg_sq": second.clone(),
            }


def update(
    kind: Optimizer,
    weights: Tensor,
    gradients: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    step: Tensor,
    rate: Tensor,
    decay: Tensor,
) -> None:
    """One update in place, by the formulas of ``torch.optim``.

    weights, gradients, first, second: (runs, weights); step (updates so far, this one included),
    rate and decay: (runs, 1).
    """
    if kind == "adamw":
        weights.mul_(1 - rate * decay)
        first.lerp_(gradients, 1 - BETA1)
        second.mul_(BETA2).addcmul_(gradients, gradients, value=1 - BETA2)
        scale = second.sqrt().div_((1 - BETA2**step).sqrt()).add_(EPSILON)
        weights.sub_(first.div(scale).mul_(rate / (1 - BETA1**step)))
        return
    gradients = torch.addcmul(gradients, weights, decay)
    if kind == "sgd":
        first.mul_(MOMENTUM).add_(gradients)
        weights.sub_(first * rate)
    else:
        second.mul_(ALPHA).addcmul_(gradients, gradients, value=1 - ALPHA)
        weights.sub_(gradients.div(second.sqrt().add_(EPSILON)).mul_(rate))
