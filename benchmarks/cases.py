"""Cases: which sides are measured together, and how a round of them gives a claim's figure."""

from collections.abc import Callable

from harness import Case, Round, Side

WIDTHS = (32, 64, 128)
DACBENCH = (
    "DACBench is measured by an interpreter that has it: python3 -m venv DIR; "
    "DIR/bin/pip install torch==2.13.0; DIR/bin/pip install --no-deps torchvision==0.28.0; "
    "DIR/bin/pip install dacbench; then --dacbench-python DIR/bin/python"
)


def cases(dacbench: str | None) -> list[Case]:
    """All of them, cheapest first."""
    return [roofline(), single(), environment(), learning(), dac(dacbench), minilm()]


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


def minilm() -> Case:
    """One MiniLM-L6 run at a time: an adapter, or the last layer and the head."""
    return Case(
        "minilm",
        [
            Side("torchjob-lora", "step:torchjob_minilm", {"adapter": "lora"}),
            Side("torchjob-last-layer", "step:torchjob_minilm", {"layers": 1}),
        ],
        rounds=3,
    )


def environment() -> Case:
    """Our environment over the bare loop."""
    return Case(
        "environment",
        [Side("env-over-bare", "env_overhead:over_bare", {"pairs": 12})],
        {"env_step": lambda results: results["env-over-bare"]["ratio"]},
    )


def learning() -> Case:
    """PPO end to end."""
    return Case(
        "learning",
        [Side("ppo", "learning:outside")],
        {"ppo_outside": lambda results: results["ppo"]["share"]},
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


def faster(this: str, that: str) -> Callable[[Round], float]:
    """How many times fewer seconds a run-step of one side takes."""
    return lambda results: results[that]["seconds"] / results[this]["seconds"]


def overhead(side: str) -> Callable[[Round], float]:
    """Percentage points over a bare loop."""
    return lambda results: 100 * (results[side]["ratio"] - 1)
