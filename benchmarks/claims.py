"""Claims: what is said about speed, and the bar each figure must reach."""

from dataclasses import dataclass
from typing import Literal

Unit = Literal["x", "share", "points", "a second", "ms"]


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


_FIRST = "the head reads the first token"
_MEAN = "as above, but the head reads the mean of all tokens, which the last layer must all compute"
_STEPS = f"run-steps a second on one core, 16 rows of 16 tokens, AdamW on all weights; {_FIRST}"
_MINILM = f"run-steps a second on one core, 16 rows of 32 tokens, no dropout; {_FIRST}"
_AMX = "a processor with AMX or AVX512-BF16 gains, others lose"
CLAIMS: dict[str, Claim] = {
    claim.name: claim
    for claim in (
        Claim("packed_trainer_32", "best pack over the transformers Trainer, width 32",
              f"{_STEPS}; the Trainer logs, saves and evaluates nothing", 6.0),
        Claim("packed_torchjob_32", "best pack over one TorchJob, width 32",
              f"{_STEPS}; TorchJob uses fused AdamW", 3.0),
        Claim("packed_torchjob_64", "best pack over one TorchJob, width 64", f"{_STEPS}", 1.5),
        Claim("packed_torchjob_128", "best pack over one TorchJob, width 128", f"{_STEPS}", 1.0),
        Claim("packed_trainer_32_mean", "best pack over the transformers Trainer, width 32, mean",
              _MEAN),
        Claim("packed_torchjob_32_mean", "best pack over one TorchJob, width 32, mean", _MEAN),
        Claim("eager_torchjob_32", "best pack without compiled code over one TorchJob, width 32",
              f"{_STEPS}; trainings run so unless told to compile"),
        Claim("torchjob_trainer_32", "one TorchJob over the transformers Trainer, width 32",
              f"{_STEPS}"),
        Claim("lora_pack_8", "pack of 8 LoRA runs over 8 in turn, MiniLM-L6",
              f"{_MINILM}; the best of eager, and compiled by 2, 4 or all 8 at a time", 1.3),
        Claim("lora_pack_8_mean", "the same with mean pooling", _MEAN),
        Claim("lora_pack_8_bfloat16", "the same with products in bfloat16 in the pack",
              f"{_MINILM}; the runs in turn are float32; {_AMX}"),
        Claim("trunk_cache", "frozen trunk cached over not cached, MiniLM-L6: updates alone",
              f"{_MINILM}; the last layer and the head are trained; the best of packs of 1 and 8, "
              "eager and compiled, over one TorchJob", 4.0),
        Claim("trunk_cache_mean", "the same with mean pooling", _MEAN),
        Claim("trunk_cache_decision", "the same: a decision of an environment",
              "6 updates and the scores of 128 and 256 rows", 4.0),
        Claim("surrogate", "surrogate environment",
              "environment steps a second of one core, 4096 together", 300_000.0,
              unit="a second"),
        Claim("observation", "one observation of a run", "after ten intervals of ten updates",
              0.15, "lower", "ms"),
        Claim("env_step", "FineTuneEnv step over the bare loop",
              "processor time of whole runs of 100 updates, width 32; the final weights are equal "
              "bit for bit; below 1 our loop is faster than the bare one, by more than the "
              "environment costs", 1.02, "lower"),
        Claim("pack_reset_32", "reset of a pack over one packed step, width 32",
              "time of opening all 8 runs (of 500 updates) anew over that of one update of all, "
              "compiled", 1.0, "lower"),
        Claim("pack_reset_64", "the same, width 64", "as above", 1.0, "lower"),
        Claim("ppo_outside", "PPO end to end: time spent outside fine-tuning",
              "rollouts and learning, packs of 8 as shipped; inside is what the packs' own methods "
              "take, opening runs included", 0.15, "lower", "share"),
        Claim("ppo_outside_compiled", "the same with compiled packs", "fine-tuning takes less",
              unit="share"),
        Claim("dacbench_less", "overhead of our environment less that of DACBench's SGD",
              "each over a bare PyTorch loop, models of one size; stepped by epochs, as DACBench "
              "ships it", 0.0, "lower", "points"),
        Claim("dacbench_overhead", "overhead of DACBench's SGD environment",
              "over the bare loop, a step is an epoch of 62 updates", unit="points"),
        Claim("dacbench_update_overhead", "the same, stepped by single updates",
              "over the bare loop, a step is one update", unit="points"),
        Claim("own_overhead", "overhead of our environment",
              "over the bare loop, a step is 10 updates", unit="points"),
        Claim("memory", "memory of packs of 1 to 256 runs: distance from the prediction",
              "largest deviation, at widths 32, 64 and 128, of a fresh process's peak from the "
              "line that two runs foretell: encoder, texts, weights, moments, and the work of "
              "updates and scores", 0.10, "lower", "share"),
        Claim("gpu_packed_256", "256 packed runs over the Trainer in turn, width 64, GPU",
              "run-steps a second on one GPU", 50.0),
        Claim("gpu_lora_64", "64 packed LoRA runs over runs in turn, MiniLM-L6, GPU",
              "run-steps a second on one GPU", 8.0),
    )
}  # fmt: skip
