"""Roofline: what a packed step must compute and move, and what one core of this machine gives.

Arithmetic is counted as multiply and add apart, for the matrix products alone; they are nearly
all of it. Bytes are those of float32 values that no order of the work avoids: per weight the
update of AdamW, per activation one trip out and back. Both are floors: a step that takes longer
than the slower of the two spends the rest on traffic that could be avoided, on small operations
and on Python.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from inputs import CLASSES, full_rows

from envs import workload

LAYERS, SPREAD = 2, 4  # of the shipped encoders
FLOAT = 4  # bytes
# AdamW reads weight, gradient and two moments and writes weight and two moments; before that the
# gradient is written once, and read once for its norm.
WEIGHT_TRIPS = 4 + 3 + 2
# Of a token's state in a layer, in units of the width: queries, keys, values, context, projection,
# two sums, two norms, and the inner layer of the feed-forward part before and after GELU.
STATE_UNITS = 9 + 2 * SPREAD
SECONDS = 0.3  # of each measurement


def arithmetic(width: int, batch: int, tokens: int) -> float:
    """Floating-point operations of one update of one run: forward once, backward twice that.

    The last layer makes keys and values of all tokens, and all else of the first alone, whose
    attention is of sums.
    """
    dense = 2 * width * width * (4 + 2 * SPREAD)  # of a token in a layer
    attention = 2 * 2 * tokens * width
    known = 2 * width * width * 2  # keys and values of a token
    layers = (LAYERS - 1) * tokens * (dense + attention) + dense + (tokens - 1) * known
    return 3.0 * batch * (layers + 2 * width * CLASSES)


def weights(width: int, vocabulary: int, places: int = 128) -> int:
    """Weights of the encoder and its head with a table of that many words."""
    block = width * width * (4 + 2 * SPREAD) + width * (4 + SPREAD + 1 + 4)
    tables = (vocabulary + places + 2 + 2) * width
    return tables + LAYERS * block + (width + 1) * CLASSES


def traffic(width: int, batch: int, tokens: int, words: int) -> float:
    """Bytes of one update of one run whose batches use ``words`` rows of the table."""
    units = ((LAYERS - 1) * tokens + 1) * STATE_UNITS + (tokens - 1) * 2  # the last: keys, values
    states = batch * width * units * 2 * 2  # out and back; gradients too
    return float(FLOAT * (weights(width, words) * WEIGHT_TRIPS + states))


def machine() -> dict[str, Any]:
    """Single-core rates: products of the sizes that occur, one large one, and memory."""
    return {
        "sgemm_1024": rate(lambda a, b: a @ b, 2.0 * 1024**3, (1024, 1024), (1024, 1024)),
        "copy_256_mb": bandwidth(256), "copy_1_mb": bandwidth(1),
        "unit": "GFLOP/s; GB/s read and written",
    }  # fmt: skip


def width(width: int, runs: int, batch: int = 16, tokens: int = 16) -> dict[str, Any]:
    """A pack's products and its floors at one width. Rates are of batched matrix products."""
    rows, inner = batch * tokens, SPREAD * width
    vocabulary = workload.load(full_rows(width, tokens=tokens)).rows["train"].ids.unique().numel()

    def product(inward: int, outward: int) -> float:
        work = 2.0 * runs * rows * inward * outward
        return rate(torch.bmm, work, (runs, rows, inward), (runs, inward, outward))

    return {
        "width": width, "runs": runs, "batch": batch, "tokens": tokens, "words": vocabulary,
        "flop": arithmetic(width, batch, tokens),
        "bytes": traffic(width, batch, tokens, vocabulary),
        "weights": weights(width, vocabulary),
        "bmm_square": product(width, width), "bmm_wide": product(width, inner),
        "bmm_attention": rate(
            torch.bmm, 2.0 * runs * batch * tokens * tokens * width,
            (runs * batch * width // 16, tokens, 16), (runs * batch * width // 16, 16, tokens),
        ),
        "unit": "GFLOP/s",
    }  # fmt: skip


def rate(
    multiply: Callable[..., Any], work: float, left: tuple[int, ...], right: tuple[int, ...]
) -> float:
    """GFLOP/s of a product of two random arrays."""
    a, b = torch.randn(left), torch.randn(right)
    return work / _seconds(lambda: multiply(a, b)) / 1e9


def bandwidth(megabytes: int) -> float:
    """GB/s, read and written together, of copying an array of that size."""
    a = torch.randn(megabytes * 2**20 // FLOAT)
    b = torch.empty_like(a)
    return 2.0 * a.numel() * FLOAT / _seconds(lambda: b.copy_(a)) / 1e9


def _seconds(action: Callable[[], Any]) -> float:
    """The median of repeated calls."""
    action()
    times: list[float] = []
    while sum(times) < SECONDS or len(times) < 5:
        began = time.process_time()
        action()
        times.append(time.process_time() - began)
    return sorted(times)[len(times) // 2]
