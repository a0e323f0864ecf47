"""Cases: which sides are measured together, and how a round of them gives a claim's figure."""

from collections.abc import Callable
from typing import Any

import torch
from harness import Case, Round, Side

WIDTHS = (32, 64, 128)
PACKS = (1, 4, 8, 16, 32, 64)
MEMORY = {32: (1, 4, 16, 64, 256), 64: (1, 4, 16, 64), 128: (1, 4, 16, 64)}  # runs by width
LORA = 8  # runs in a pack of adapters
MEAN = {"pooling": "mean"}  # all tokens are read, so that the last layer computes all of them
BRIEFLY = 4.0  # seconds of the measurements that only a plot needs
GPU = (
    "There is no GPU that PyTorch can use; on a machine with one: "
    "python benchmarks/speed.py --only gpu"
)
DACBENCH = (
    "DACBench is measured by an interpreter that has it: python3 -m venv DIR; "
    "DIR/bin/pip install torch==2.13.0; DIR/bin/pip install --no-deps torchvision==0.28.0; "
    "DIR/bin/pip install dacbench; then --dacbench-python DIR/bin/python"
)


def cases(dacbench: str | None) -> list[Case]:
    """All of them, cheapest first."""
    return [
        roofline(), surrogate(), reset(), memory(), single(), environment(), learning(),
        dac(dacbench), trunk(), lora(), packed(), eager(), lengths(), gpu(),
    ]  # fmt: skip


def roofline() -> Case:
    """What this machine gives, and what a step asks for."""
    sides = [Side(f"width-{w}", "roofline:width", {"width": w, "runs": 8}) for w in WIDTHS]
    return Case("roofline", [Side("machine", "roofline:machine"), *sides], rounds=3)


def single() -> Case:
    """One run at a time, by the Trainer and by TorchJob; then over the length of the rows."""
    return Case(
        "single",
        [
            Side("trainer-32", "step:trainer"),
            *(Side(f"torchjob-{w}", "step:torchjob", {"width": w}) for w in WIDTHS),
            *(
                Side(f"torchjob-32-tokens-{n}", "step:torchjob", {"tokens": n, "steps": 200})
                for n in (8, 32, 64)
            ),
        ],
        {"torchjob_trainer_32": faster("torchjob-32", "trainer-32")},
    )


def packed() -> Case:
    """Packs of compiled code beside the Trainer and TorchJob; the best size is taken."""
    return Case(
        "packed",
        [
            Side("trainer-32", "step:trainer"),
            *(Side(f"torchjob-{w}", "step:torchjob", {"width": w}) for w in WIDTHS),
            *(
                Side(f"pack-{w}-{n}", "packs:update", {"width": w, "runs": n})
                for w in WIDTHS
                for n in PACKS
            ),
            Side("trainer-32-mean", "step:trainer", MEAN),
            Side("torchjob-32-mean", "step:torchjob", MEAN),
            *(Side(f"pack-32-{n}-mean", "packs:update", {"runs": n, **MEAN}) for n in PACKS[1:4]),
        ],
        {"packed_trainer_32": faster(_packs(32), "trainer-32")}
        | {f"packed_torchjob_{w}": faster(_packs(w), f"torchjob-{w}") for w in WIDTHS}
        | {
            f"packed_{other}_32_mean": faster(
                [f"pack-32-{n}-mean" for n in PACKS[1:4]], f"{other}-32-mean"
            )
            for other in ("trainer", "torchjob")
        },
        rounds=3,
    )


def _packs(width: int) -> list[str]:
    return [f"pack-{width}-{n}" for n in PACKS]


def eager() -> Case:
    """The same packs without compiled code, as shipped trainings run them."""
    sizes = [(32, n) for n in PACKS] + [(w, 8) for w in WIDTHS[1:]]
    told = {"compiled": False, "limit": BRIEFLY}
    return Case(
        "packed-eager",
        [
            Side("torchjob-32", "step:torchjob"),
            *(
                Side(f"eager-{w}-{n}", "packs:update", {"width": w, "runs": n, **told})
                for w, n in sizes
            ),
        ],
        {"eager_torchjob_32": faster([f"eager-32-{n}" for n in PACKS], "torchjob-32")},
        rounds=3,
    )


def lengths() -> Case:
    """A pack over the length of the rows."""
    return Case(
        "packed-lengths",
        [
            Side(f"pack-32-8-tokens-{n}", "packs:update", {"tokens": n, "limit": BRIEFLY})
            for n in (8, 32, 64)
        ],
        rounds=2,
    )


def lora() -> Case:
    """A pack of MiniLM-L6 adapters beside one run at a time."""
    fast = {"compiled": True}
    ways = {"eager": {}, "compiled": fast, "compiled-by-2": {**fast, "together": 2},
            "compiled-by-4": {**fast, "together": 4}, "compiled-mean": {**fast, **MEAN},
            "compiled-by-2-mean": {**fast, "together": 2, **MEAN},
            "bfloat16": {"bfloat16": True},
            "compiled-bfloat16": {**fast, "bfloat16": True}}  # fmt: skip
    return Case(
        "lora",
        [
            Side("torchjob-lora", "step:torchjob_minilm", {"adapter": "lora"}),
            Side("torchjob-lora-mean", "step:torchjob_minilm", {"adapter": "lora", **MEAN}),
            *(
                Side(f"lora-{name}", "packs:lora", {"runs": LORA, **told})
                for name, told in ways.items()
            ),
        ],
        {
            "lora_pack_8": faster(
                ["lora-eager", *(f"lora-compiled{by}" for by in ("", "-by-2", "-by-4"))],
                "torchjob-lora",
            ),
            "lora_pack_8_mean": faster(
                ["lora-compiled-mean", "lora-compiled-by-2-mean"], "torchjob-lora-mean"
            ),
            "lora_pack_8_bfloat16": faster(
                ["lora-bfloat16", "lora-compiled-bfloat16"], "torchjob-lora"
            ),
        },
        rounds=3,
    )


def trunk() -> Case:
    """MiniLM-L6 with all but its last layer frozen: computed once, or in every update."""
    ways: dict[str, dict[str, Any]] = {
        f"trunk-{n}{'-compiled' if compiled else ''}": {"runs": n, "compiled": compiled}
        for n in (1, 8)
        for compiled in (False, True)
    }
    return Case(
        "trunk",
        [
            Side("torchjob-last-layer", "step:decision"),
            *(Side(name, "packs:trunk", told) for name, told in ways.items()),
            Side("torchjob-last-layer-mean", "step:decision", MEAN),
            *(
                Side(f"{name}-mean", "packs:trunk", {**told, **MEAN})
                for name, told in ways.items()
                if told["compiled"]
            ),
        ],
        {
            "trunk_cache": faster(list(ways), "torchjob-last-layer"),
            "trunk_cache_mean": faster(
                [f"{name}-mean" for name in ways if ways[name]["compiled"]],
                "torchjob-last-layer-mean",
            ),
            "trunk_cache_decision": faster(list(ways), "torchjob-last-layer", "decision"),
        },
        rounds=3,
    )


def reset() -> Case:
    """Opening a pack's runs anew beside one update of them."""
    sides = [Side(f"reset-{w}", "packs:reset", {"width": w}) for w in WIDTHS[:2]]
    return Case(
        "reset",
        sides,
        {
            f"pack_reset_{w}": lambda results, w=w: (
                results[f"reset-{w}"]["opening"] / results[f"reset-{w}"]["update"]
            )
            for w in WIDTHS[:2]
        },
        rounds=3,
    )


def memory() -> Case:
    """What packs take, beside what was predicted."""
    return Case(
        "memory",
        [
            Side(f"memory-{w}-{n}", "pack_memory:taken", {"runs": n, "width": w})
            for w, sizes in MEMORY.items()
            for n in sizes
        ],
        {
            "memory": lambda results: max(
                abs(side["megabytes"] / side["predicted"] - 1) for side in results.values()
            )
        },
        rounds=2,
    )


def surrogate() -> Case:
    """Simulated environments, and one observation of a real one."""
    return Case(
        "surrogate",
        [
            Side("surrogate", "surrogate_speed:steps"),
            Side("observation", "surrogate_speed:observation"),
        ],
        {
            "surrogate": lambda results: results["surrogate"]["a_second"],
            "observation": lambda results: results["observation"]["milliseconds"],
        },
        rounds=3,
    )


def gpu() -> Case:
    """Large packs on a GPU beside runs in turn there."""
    there = {"device": "cuda"}
    return Case(
        "gpu",
        [
            Side("gpu-trainer-64", "step:trainer", {"width": 64, **there}),
            Side("gpu-pack-64-256", "packs:update", {"width": 64, "runs": 256, **there}),
            Side("gpu-torchjob-lora", "step:torchjob_minilm", {"adapter": "lora", **there}),
            Side("gpu-lora-64", "packs:lora", {"runs": 64, "compiled": True, **there}),
        ],
        {
            "gpu_packed_256": faster("gpu-pack-64-256", "gpu-trainer-64"),
            "gpu_lora_64": faster("gpu-lora-64", "gpu-torchjob-lora"),
        },
        rounds=3,
        missing=None if torch.cuda.is_available() else GPU,
    )


def environment() -> Case:
    """Our environment over the bare loop."""
    return Case(
        "environment",
        [Side("env-over-bare", "env_overhead:over_bare", {"pairs": 12})],
        {"env_step": lambda results: results["env-over-bare"]["ratio"]},
    )


def learning() -> Case:
    """PPO end to end, as shipped and with compiled packs."""
    return Case(
        "learning",
        [
            Side("ppo", "learning:outside"),
            Side("ppo-compiled", "learning:outside", {"compiled": True}),
        ],
        {
            "ppo_outside": lambda results: results["ppo"]["share"],
            "ppo_outside_compiled": lambda results: results["ppo-compiled"]["share"],
        },
        rounds=3,
    )


def dac(python: str | None) -> Case:
    """DACBench's environment and ours, each over its own bare loop, by turns."""
    return Case(
        "dacbench",
        [
            Side("dacbench-epochs", "dac:over_bare", {"epochs": True}, python),
            Side("dacbench-updates", "dac:over_bare", {"epochs": False}, python),
            Side("env-over-bare", "env_overhead:over_bare"),
        ],
        {
            "dacbench_overhead": overhead("dacbench-epochs"),
            "dacbench_update_overhead": overhead("dacbench-updates"),
            "own_overhead": overhead("env-over-bare"),
            "dacbench_less": lambda results: (
                overhead("env-over-bare")(results) - overhead("dacbench-epochs")(results)
            ),
        },
        missing=None if python else DACBENCH,
    )


def faster(these: str | list[str], that: str, what: str = "seconds") -> Callable[[Round], float]:
    """How many times fewer seconds the fastest of some sides takes, by default of a run-step."""
    names = [these] if isinstance(these, str) else these
    return lambda results: results[that][what] / min(results[name][what] for name in names)


def overhead(side: str) -> Callable[[Round], float]:
    """Percentage points over a bare loop."""
    return lambda results: 100 * (results[side]["ratio"] - 1)
