"""Batched models: one unmodified transformers encoder, computed for many runs at once.

`torch.func` maps `functional_call` over stacked weights. Three things make it fast and right:
token embeddings are looked up outside of the map (inside it their gradient is dense and slow),
the attention mask is an additive float one (a boolean one is silently wrong), and each shape may
be compiled.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional
from torch.utils._pytree import tree_map

from envs import first, memory, trunk, workload
from envs.errors import RunFailed
from envs.task import Task

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4  # between the losses of the batched and the plain model at the start
SHAPES = 64  # of one function that may be compiled
LOWEST = torch.finfo(torch.float32).min

Weights = Mapping[str, Tensor]


class Batch(NamedTuple):
    """What runs are computed on; every tensor begins with (runs, rows) but the last."""

    states: Tensor  # (runs, rows, length, width): what enters the encoder
    mask: Tensor  # (runs, rows, length): 1 at real tokens
    labels: Tensor  # (runs, rows)
    classes: Tensor  # (runs, classes): 0 for the run's own classes, LOWEST for padding


class BatchedModel:
    """The function of one family of tasks: same encoder, adapter, trainable layers and pooling.

    Weights that are not trained are the module's own, shared by all runs; their matrix products
    run once over all of them.
    """

    def __init__(
        self, task: Task, how: "Fit", *, compiled: bool, device: torch.device, together: int = 64,
        bfloat16: bool = False,
    ) -> None:  # fmt: skip
        """together: runs computed at a time; bfloat16: products in that precision (autocast)."""
        self.together, self._device, self._bfloat16 = together, device.type, bfloat16
        load = workload.load(task)
        self.module = load.module(0).to(device)
        self.encoder: Any = self.module.encoder
        self.fit = how
        self.parameters = sum(p.numel() for p in self.encoder.parameters())
        base: Any = self.encoder
        base = base.get_base_model() if task.adapter == "lora" else base
        base.set_attn_implementation("eager")  # its products have batching rules
        base.config.use_cache = False
        self.module.train(task.dropout > 0)  # with none, in the mode that skips it
        table = base.get_input_embeddings().weight
        self.table: Tensor = table.detach()  # (tokens, width)
        self.width = load.width if how.trunk else int(table.shape[1])  # of what enters
        self.trains_table: bool = table.requires_grad
        if how.trunk:
            trunk.shorten(base, task.trainable_layers or 0)
        if how.first:
            first.shorten(base)
        self._gradients = vmap(
            grad_and_value(self._loss, argnums=(0, 1) if self.trains_table else 0),
            randomness="different",
        )
        self._rows = vmap(self._row_results, randomness="different")
        if compiled:
            self._gradients = _compile(self._gradients, device)
            self._rows = _compile(self._rows, device)

    def gradients(
        self, weights: Weights, batch: Batch
    ) -> tuple[dict[str, Tensor], Tensor | None, Tensor]:
        """Gradients by name, those of the entering states if they are trained, and losses."""
        found, losses = self._in_parts(self._gradients, weights, batch)
        by_name, states = found if self.trains_table else (found, None)
        return by_name, states, losses

    def rows(self, weights: Weights, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss and correctness of each row, (runs, rows) both, without gradients or dropout."""
        training = self.module.training
        self.module.eval()
        with torch.no_grad():
            result: tuple[Tensor, Tensor] = self._in_parts(self._rows, weights, batch)
        self.module.train(training)
        return result

    def _in_parts(self, function: Callable[..., Any], weights: Weights, batch: Batch) -> Any:
        """Runs, ``together`` at a time; where memory runs out, half as many from then on."""
        runs = len(batch.mask)
        while True:
            try:
                parts = [
                    function(
                        {name: value[start : start + self.together]
                         for name, value in weights.items()},
                        *(value[start : start + self.together] for value in batch),
                    )
                    for start in range(0, runs, self.together)
                ]  # fmt: skip
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not memory.ran_out(error):
                    raise
                if self.together == 1:
                    raise RunFailed(
                        "pack: not even one run at a time fits into the memory; lower batch or "
                        "max_length"
                    ) from error
                self.together = min(self.together, runs) // 2 or 1
                logger.warning("out of memory: %d runs at a time from now on", self.together)
                continue
            return parts[0] if len(parts) == 1 else tree_map(lambda *x: torch.cat(x), *parts)

    def _logits(self, weights: Weights, states: Tensor, mask: Tensor, classes: Tensor) -> Tensor:
        additive = (1.0 - mask)[:, None, None, :] * LOWEST
        if self.fit.causal:
            length = mask.shape[-1]
            later = torch.ones(length, length, device=mask.device).triu(1)
            additive = torch.maximum(additive + later * LOWEST, later.new_tensor(LOWEST))
        start = "encoder."
        own = {name.removeprefix(start): w for name, w in weights.items() if name[:8] == start}
        inputs = {"inputs_embeds": states, "attention_mask": additive}
        with torch.autocast(self._device, torch.bfloat16, enabled=self._bfloat16):
            hidden = functional_call(self.encoder, own, kwargs=inputs)[0].float()
        pooled = workload.pool(hidden, mask, self.module.pooling)
        return functional.linear(pooled, weights["head.weight"], weights["head.bias"]) + classes

    def _loss(
        self, weights: Weights, states: Tensor, mask: Tensor, labels: Tensor, classes: Tensor
    ) -> Tensor:
        return functional.cross_entropy(self._logits(weights, states, mask, classes), labels)

    def _row_results(
        self, weights: Weights, states: Tensor, mask: Tensor, labels: Tensor, classes: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits = self._logits(weights, states, mask, classes)
        losses = functional.cross_entropy(logits, labels, reduction="none")
        return losses, (logits.argmax(-1) == labels).to(losses.dtype)


class Fit(NamedTuple):
    """How a model can be batched, or why it cannot."""

    causal: bool = False  # a token sees only those before it
    trunk: bool = False  # frozen layers are left out, their results are kept
    first: bool = False  # the last layer computes the token that the head reads, and no other
    reason: str = ""


_FITS: dict[tuple[Any, ...], Fit] = {}


def fit(task: Task) -> Fit:
    """Try batched models on a few rows beside the plain one; the answer is kept."""
    key = (task.model, task.adapter, task.trainable_layers, task.pooling)
    if key not in _FITS:
        reads = task.pooling == "first"
        freezes = task.trainable_layers is not None and trunk.size(task) <= trunk.LARGEST
        ways = [Fit(causal, kept, alone) for kept in ([True, False] if freezes else [False])
                for alone in ([True, False] if reads else [False])
                for causal in (False, True)]  # fmt: skip
        problems = [_problem(replace(task, dropout=0.0), way) for way in ways]
        good = [way for way, problem in zip(ways, problems, strict=True) if not problem]
        why = f"{task.model}: torch.func cannot batch it ({problems[-1]})"
        _FITS[key] = good[0] if good else Fit(reason=why)
    return _FITS[key]


def _problem(task: Task, way: Fit) -> str:
    """What is wrong with a way to batch a model, or "": its losses are the plain model's."""
    load, device = workload.load(task), torch.device("cpu")
    rows = load.rows["train"]
    some = np.argsort(rows.lengths, kind="stable")[:: -(-len(rows) // 4)].copy()
    ids, mask, labels = (x[some] for x in (rows.ids, rows.mask, rows.labels))
    plain = [load.module(seed).eval() for seed in (0, 1)]
    try:
        with torch.no_grad():
            logits = torch.stack([module(ids, mask)["logits"] for module in plain])
        expected = functional.cross_entropy(
            logits.flatten(0, 1), labels.repeat(2), reduction="none"
        ).view(2, -1)
        model = BatchedModel(task, way, compiled=False, device=device)
        trained = [{n: p.detach() for n, p in m.named_parameters() if p.requires_grad}
                   for m in plain]  # fmt: skip
        stacked = {n: torch.stack([part[n] for part in trained]) for n in trained[0]}
        states = model.table[ids]
        if way.trunk:
            kept = trunk.trunk_of(task, device).states(rows, "train")
            states = kept[torch.from_numpy(rows.source[some])]
        batch = Batch(
            states.expand(2, -1, -1, -1), mask.float().expand(2, -1, -1), labels.expand(2, -1),
            torch.zeros(2, len(load.classes)),
        )  # fmt: skip
        found = model.rows(stacked, batch)[0]
        model.gradients(stacked, batch)
    except Exception as error:
        return " ".join(str(error).split())[:160] or type(error).__name__
    close = torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    return "" if close else "its results differ from the plain model's"


@functools.cache
def can_compile(device: str) -> bool:
    """Whether compiled code can be made here; it wants a C++ compiler and Python's headers."""
    try:
        torch.compile(torch.special.expit)(torch.zeros(8, device=device))  # type: ignore[no-untyped-call]
    except Exception as error:
        logger.warning(
            "nothing can be compiled here (%s); runs are computed without, at about half the "
            "speed: install a C++ compiler and Python's headers",
            " ".join(str(error).split())[:100],
        )
        return False
    return True


def _compile(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Compiled anew for every shape; torch keeps the code on disk. On a GPU as a CUDA graph.

    Of what torch checks before each call the shapes are left: the module belongs to this model,
    which never changes it. A wrapper in C++ spares the dispatch of each kernel from Python.
    """
    import torch._dynamo

    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, SHAPES)
    if device.type == "cuda":
        return torch.compile(function, dynamic=False, mode="reduce-overhead")
    options: dict[str, Any] = {
        "guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe, "cpp_wrapper": True,
    }  # fmt: skip
    return torch.compile(function, dynamic=False, options=options)
