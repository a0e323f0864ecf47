"""DACBench's SGD environment over a bare PyTorch loop; runs in an interpreter that has dacbench.

Imports nothing of this project. Both sides train the same model from the same start: an encoder
of the size of `tiny-32`, in plain PyTorch, whose tokens are the first pixels of an image. The
images are random and lie in a temporary folder in the format that torchvision reads, so that
nothing is downloaded. The environment steps as shipped, through torchvision's data set and
PyTorch's loader; the loop makes the same number of updates and evaluates as many rows in the same
batches, from tensors in memory. They take turns in one process.
"""

import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

TRAIN, VALIDATION, TEST, BATCH, CLASSES = 992, 128, 64, 16, 10
KEPT: list[Any] = []  # an operator lives as long as the library that defined it


class Encoder(nn.Module):
    """Embedding, two layers of width 32, mean pooling, a head: 203 thousand parameters."""

    def __init__(self, tokens: int = 24, words: int = 5400, width: int = 32) -> None:
        super().__init__()
        self.tokens, self.words = tokens, words
        self.embedding = nn.Embedding(words, width)
        self.places = nn.Parameter(torch.randn(128, width) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 4 * width, 0.0, "gelu", batch_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """images: (batch, 1, 28, 28), normalised -> (batch, classes) log-probabilities."""
        pixels = images.flatten(1)[:, : self.tokens]
        states = self.embedding((pixels * 78 + 36).long().abs() * 7 % self.words)
        states = states + self.places[: self.tokens]
        for layer in self.layers:
            states = layer(states)
        return functional.log_softmax(self.head(states.mean(1)), 1)


def write_images(folder: Path) -> None:
    """Random images in MNIST's file format (LeCun's IDX: magic number, sizes, bytes)."""
    rng, raw = np.random.default_rng(0), folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", TRAIN + VALIDATION), ("t10k", TEST)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, CLASSES, count, dtype=np.uint8)
        head = struct.pack(">IIII", 2051, count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        head = struct.pack(">II", 2049, count)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())


def with_torchvision() -> None:
    """Let torchvision be imported where its compiled part cannot be loaded.

    The wheel of the package index is built for CUDA; beside a processor's PyTorch it fails over
    one operator for boxes, which neither data sets nor transforms use.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        KEPT.append(library)


def make_env(folder: Path, epochs: bool) -> Any:
    """The environment with one instance; its other settings as shipped."""
    with_torchvision()
    from dacbench.benchmarks import SGDBenchmark
    from dacbench.envs import SGDInstance

    benchmark = SGDBenchmark()
    benchmark.config.epoch_mode, benchmark.config.cutoff = epochs, 1e6
    benchmark.config.instance_set = {
        0: SGDInstance(
            model=Encoder, optimizer_type=torch.optim.AdamW, optimizer_params={},
            dataset_path=str(folder), dataset_name="MNIST", batch_size=BATCH,
            fraction_of_dataset=1.0, seed=0,
            train_validation_ratio=(TRAIN + 0.5) / (TRAIN + VALIDATION),
        )
    }  # fmt: skip
    env = benchmark.get_environment()
    env.reset(seed=0)
    return env


class Loop:
    """The same updates and evaluations, from tensors in memory."""

    def __init__(self, rows: Any) -> None:
        images = torch.stack([row[0] for row in rows])
        labels = torch.tensor([row[1] for row in rows])
        self._train, self._labels = images[:TRAIN], labels[:TRAIN]
        self._validation, self._truth = images[TRAIN:], labels[TRAIN:]
        self._model = Encoder()
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-3)
        self._order: list[Tensor] = []

    def steps(self, updates: int, evaluated: int) -> None:
        """That many updates, then a look at so many validation rows."""
        self._model.train()
        for _ in range(updates):
            if not self._order:
                self._order = list(torch.randperm(TRAIN).split(BATCH))
            index = self._order.pop()
            loss = functional.nll_loss(self._model(self._train[index]), self._labels[index])
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
        self._model.eval()
        losses, right = [], []
        with torch.no_grad():
            for start in range(0, evaluated, BATCH):
                part = slice(start, start + BATCH)
                output, truth = self._model(self._validation[part]), self._truth[part]
                losses.append(functional.nll_loss(output, truth))
                right.append((output.argmax(1) == truth).float().mean())
            torch.stack(losses).mean().item(), torch.stack(right).mean().item()


def over_bare(epochs: bool = True, pairs: int = 10) -> dict[str, Any]:
    """The ratio of processor times. A step is an epoch (as shipped) or a single update."""
    updates, evaluated = (TRAIN // BATCH, VALIDATION) if epochs else (1, BATCH)
    repeats = 1 if epochs else 60
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder))
        env = make_env(Path(folder), epochs)
        assert len(env.validation_loader.dataset) == VALIDATION
        loop = Loop(env.datasets[0])

        def stepped() -> None:
            for _ in range(repeats):
                env.step(1e-3)

        def bare() -> None:
            for _ in range(repeats):
                loop.steps(updates, evaluated)

        both = {"env": stepped, "bare": bare}
        times: dict[str, list[tuple[float, float]]] = {"env": [], "bare": []}
        for turn in range(pairs + 1):
            for name in sorted(both, reverse=bool(turn % 2)):
                times[name].append(timed(both[name]))
    warm = {name: found[1:] for name, found in times.items()}
    ratios = [
        [a[clock] / b[clock] for a, b in zip(warm["env"], warm["bare"], strict=True)]
        for clock in (0, 1)
    ]
    bare_ms = 1e3 * statistics.median(t[0] for t in warm["bare"]) / (repeats * updates)
    return {
        "ratio": statistics.median(ratios[0]), "ratio_wall": statistics.median(ratios[1]),
        "bare_ms_an_update": bare_ms,
        "model": "2-layer encoder of width 32 in plain PyTorch",
        "parameters": sum(p.numel() for p in Encoder().parameters()),
        "step": "an epoch (as shipped)" if epochs else "one update",
        "updates_a_step": updates, "batch": BATCH, "tokens": 24,
        "evaluated_rows_a_step": evaluated, "pairs": pairs, "dacbench": version("dacbench"),
        "torch": torch.__version__, "torchvision": version("torchvision"),
    }  # fmt: skip


def timed(action: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the processor and of the wall clock."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return time.process_time() - cpu, time.perf_counter() - wall
