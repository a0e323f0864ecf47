"""Refusals: Trainers that cannot be steered, told before their first update."""

from typing import Any

from envs.errors import BadInput

REFUSED = ("deepspeed", "megatron_lm", "xla")  # engines whose optimizers are out of reach


def refuse_engine(args: Any, state: Any) -> None:
    """Engines that no tuner can steer. state: what knows accelerate's ``distributed_type``."""
    if (engine := _engine(args, state)) in REFUSED:
        raise BadInput(f"trainer: {engine}: not supported by the tuner; train with DDP or FSDP2")


def refuse_arguments(args: Any) -> None:
    """Arguments that a Trainer takes and divides by."""
    count = args.gradient_accumulation_steps
    if not isinstance(count, int) or count < 1:
        raise BadInput(
            f"trainer: gradient_accumulation_steps: {count!r} is not a count; give 1 or more"
        )


def refuse_job(trainer: Any) -> None:
    """What keeps a Trainer from being a job: its weights are elsewhere, or made anew."""
    args = trainer.args
    refuse_arguments(args)
    engine = _engine(args, trainer.accelerator)
    if engine in (*REFUSED, "fsdp") or args.world_size > 1:
        raise BadInput(
            f"trainer: {engine}: a job needs whole weights in one process; start one, without "
            "DeepSpeed and FSDP"
        )
    if trainer.model_init is not None:
        raise BadInput(
            "trainer: model_init: the Trainer would make its model anew; make it where the "
            "Trainer is made, from the seed"
        )


def _engine(args: Any, state: Any) -> str:
    kind = getattr(state, "distributed_type", "")
    return "deepspeed" if args.deepspeed else str(getattr(kind, "value", kind)).lower()
