"""Claims: what is said about speed, and the bar each figure must reach."""

from dataclasses import dataclass
from typing import Literal

Unit = Literal["x", "share", "points", "a second"]


@dataclass(frozen=True)
class Claim:
    """One figure of the page. Without a bar it is there to compare with."""

    name: str
    what: str
    how: str
    bar: float | None = None
    better: Literal["higher", "lower"] = "higher"
    unit: Unit = "x"

    def holds(self, value: float) -> bool | None:
        """Whether a value reaches the bar; None without one."""
        if self.bar is None:
            return None
        return value >= self.bar if self.better == "higher" else value <= self.bar


_STEPS = "run-steps a second on one core, 16 rows of 16 tokens, AdamW on all weights"
CLAIMS: dict[str, Claim] = {
    claim.name: claim
    for claim in (
        Claim("packed_trainer_32", "best pack over the transformers Trainer, width 32",
              f"{_STEPS}; the Trainer logs, saves and evaluates nothing", 6.0),
        Claim("packed_torchjob_32", "best pack over one TorchJob, width 32",
              f"{_STEPS}; TorchJob uses fused AdamW", 3.0),
        Claim("packed_torchjob_64", "best pack over one TorchJob, width 64", f"{_STEPS}", 1.5),
        Claim("packed_torchjob_128", "best pack over one TorchJob, width 128", f"{_STEPS}", 1.0),
        Claim("torchjob_trainer_32", "one TorchJob over the transformers Trainer, width 32",
              f"{_STEPS}"),
        Claim("lora_pack_8", "pack of 8 LoRA runs over 8 in turn, MiniLM-L6",
              "run-steps a second on one core, 16 rows of 32 tokens", 1.3),
        Claim("trunk_cache", "frozen trunk cached over not cached, MiniLM-L6",
              "updates a second; the last layer and the head are trained", 4.0),
        Claim("surrogate", "surrogate environment",
              "environment steps a second, one core", 300_000.0, unit="a second"),
        Claim("env_step", "FineTuneEnv step over the bare loop",
              "processor time of whole runs of 100 updates, width 32; the final weights are equal "
              "bit for bit; below 1 our loop is faster than the bare one, by more than the "
              "environment costs", 1.02, "lower"),
        Claim("pack_reset", "reset of a pack over one packed step",
              "time of opening every run anew over that of one update of all", 1.0, "lower"),
        Claim("ppo_outside", "PPO end to end: time spent outside fine-tuning",
              "rollouts and learning; inside is what the jobs' own methods take",
              0.15, "lower", "share"),
        Claim("dacbench_less", "overhead of our environment less that of DACBench's SGD",
              "each over a bare PyTorch loop, models of one size; stepped by epochs, as DACBench "
              "ships it", 0.0, "lower", "points"),
        Claim("dacbench_overhead", "overhead of DACBench's SGD environment",
              "over the bare loop, a step is an epoch of 62 updates", unit="points"),
        Claim("dacbench_update_overhead", "the same, stepped by single updates",
              "over the bare loop, a step is one update", unit="points"),
        Claim("own_overhead", "overhead of our environment",
              "over the bare loop, a step is 10 updates", unit="points"),
        Claim("memory", "memory as the pack grows from 1 to 256: distance from the prediction",
              "largest deviation from a line through the weights, moments and activations",
              0.10, "lower", "share"),
        Claim("gpu_packed_256", "256 packed runs over the Trainer in turn, width 64, GPU",
              "run-steps a second on one GPU", 50.0),
        Claim("gpu_lora_64", "64 packed LoRA runs over runs in turn, MiniLM-L6, GPU",
              "run-steps a second on one GPU", 8.0),
    )
}  # fmt: skip
