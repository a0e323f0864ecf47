"""First: a last layer that computes only the token that the head reads."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from envs import workload


def shorten(encoder: nn.Module) -> None:
    """Let the last layer ask for its first token alone; it still attends to all of them.

    Two thirds of a layer's weights, and all of its attention but one row, work for one token
    instead of all. For layers built like BERT's (RoBERTa, ELECTRA and MiniLM are); others raise
    `AttributeError`.
    """
    stack = workload.layers_of(encoder)
    if stack is None:
        raise AttributeError("the model has no list of layers")
    layer: Any = stack[-1]
    attention, inner = layer.attention, layer.attention.self
    size, scale = inner.attention_head_size, inner.scaling
    query, key, value = inner.query, inner.key, inner.value

    def forward(states: Tensor, attention_mask: Tensor, *_: Any, **__: Any) -> Tensor:
        """(rows, length, width) states, (rows, 1, 1, length) additive mask -> (rows, 1, width)."""
        first = states[:, :1]
        heads = (*states.shape[:2], -1, size)
        asked = query(first).view(len(first), 1, -1, size)
        # products of one row: sums are faster than matrix products, and need no transposition
        scores = (asked * key(states).view(heads)).sum(-1) * scale + attention_mask[
            :, 0, 0, :, None
        ]
        shares = functional.dropout(scores.softmax(1), inner.dropout.p, inner.training)
        seen = (shares.unsqueeze(-1) * value(states).view(heads)).sum(1, keepdim=True)
        return torch.as_tensor(layer.feed_forward_chunk(attention.output(seen.flatten(2), first)))

    layer.forward = forward
