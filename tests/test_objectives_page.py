"""The page of objectives is made from the code, and its tables are what the code does."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_objectives import OBJECTIVES, decoder, task_of  # noqa: F401  (fixtures)
from torch import nn

from envs import objectives
from envs.dials import DIALS, REACH
from envs.errors import BadInput
from envs.handles import Handles
from envs.hardware import Plan
from envs.job import TorchJob
from envs.knobs import Actions, Knobs
from envs.lockstep import Lockstep, PackedJob
from envs.refusals import REFUSED
from envs.switchable import SwitchableOptimizer
from envs.task import OBJECTIVE_TASKS
from envs.trainer_job import TrainerJob
from tuner.callback import _check

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "scripts"))

import objectives_page  # noqa: E402

TURNS = Actions(
    optimizers=("sgd",),
    turns=(
        ("weight_decay", 3.0),
        ("clip", 0.3),
        ("depth", -1.0),
        ("adapter_scale", 2.0),
        ("head_rate", 3.0),
    ),
)
EVERY = Knobs(rate=1e-3, adapter_scale=1.0, beta=0.1, depth=1, head_rate=1.0)
OPENED = ("adapter_scale", "beta", "depth", "head_rate")


def test_the_page_is_up_to_date():
    written = objectives_page.PAGE.read_text(encoding="utf-8")
    assert objectives_page.page() == written, "run: python scripts/objectives_page.py"


def test_the_tables_name_all_there_is():
    assert set(REACH) == {"rate", "rollback", "optimizer", *DIALS}
    assert {tuple(cells) for cells in REACH.values()} == {tuple(objectives_page.ROLES)}
    known = {task.objective for task in OBJECTIVE_TASKS.values()} | {"classification"}
    assert set(objectives.CARDS) == known


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_trainer_of_an_objective_is_the_one_named(objective, task_of):  # noqa: F811
    setup = objectives.prepare(task_of(objective), 0, Knobs())
    made = setup.trainer
    card = objectives.CARDS[objective]
    assert type(made).__name__ == card.trainer
    assert type(made).__module__.split(".")[0] == card.library
    assert (setup.marks is not None) == bool(card.marks)
    assert bool(getattr(made, "beta", None)) == (objective in ("dpo", "kto"))


def reached(place):
    """The dials, of those that a run is opened with or without, that the table allows."""
    return {name for name in OPENED if REACH[name][place]}


def had(knobs):
    return {name for name in OPENED if getattr(knobs, name) is not None}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's own
@pytest.mark.filterwarnings("ignore")  # TRL's
def test_a_job_has_the_knobs_that_the_table_says(tiny_task, task_of):  # noqa: F811
    assert had(TorchJob(tiny_task(adapter="lora"), 0, EVERY).knobs) == reached("TorchJob")
    assert "adapter_scale" not in had(TorchJob(tiny_task(), 0, EVERY).knobs)
    packed = Lockstep(Plan("cpu", 2)).open(tiny_task(), 0, Knobs(adapter_scale=1.0, head_rate=1.0))
    assert isinstance(packed, PackedJob)
    assert had(packed.knobs) == reached("packs")
    pairs = task_of("dpo", adapter="lora")
    job = TrainerJob(pairs, 0, Knobs(head_rate=1.0), make=objectives.prepare)
    job.apply(job.knobs.having(adapter_scale=1.0, depth=1, beta=0.3, head_rate=3.0))
    assert had(job.knobs) == reached("TrainerJob") - {"head_rate"}  # of classifiers: `test_head.py`


class Classifier(nn.Sequential):
    """What has a head, by its name."""


@pytest.mark.parametrize(("place", "processes"), [("TunerCallback", 1), ("DDP", 2), ("FSDP2", 2)])
def test_the_callback_turns_what_the_table_says(place, processes):
    args = SimpleNamespace(fsdp=place == "FSDP2", max_grad_norm=1.0, world_size=processes)
    net = Classifier(nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)] * 1))
    adapter = nn.ModuleDict({"own": nn.Linear(2, 2)})
    net.append(nn.ModuleDict({"lora_A": adapter, "lora_B": adapter}))  # as peft's layers have
    net[2].scaling = {"own": 2.0}
    net.base_model_prefix = "0"  # what comes after it is the head
    switchable = SwitchableOptimizer(net.parameters())
    preference = SimpleNamespace(beta=0.1, args=args, model=SimpleNamespace(objective="dpo"))
    if REACH["optimizer"][place]:
        handles = Handles(args, net, switchable, 1e-3, TURNS, trainer=preference, headed=True)
        assert handles.switch
    else:
        with pytest.raises(BadInput, match="cannot be switched"):
            Handles(args, net, switchable, 1e-3, TURNS)
        handles = Handles(
            args, net, switchable._inner, 1e-3, TURNS, trainer=preference, headed=True
        )
    assert set(handles.dials) == {name for name in DIALS if REACH[name][place]}
    args.max_grad_norm = 0.0  # off: the table's condition
    plain = Handles(args, net, switchable._inner, 1e-3, TURNS)  # no Trainer given: no beta
    assert not {"clip", "beta"} & set(plain.dials)


@pytest.mark.parametrize("engine", REFUSED)
def test_an_engine_that_is_said_to_be_refused_is(engine):
    optimizer = SimpleNamespace(accelerator_state=SimpleNamespace(distributed_type=engine))
    args = SimpleNamespace(deepspeed=None)
    with pytest.raises(BadInput, match=f"trainer: {engine}: not supported"):
        _check(args, SimpleNamespace(max_steps=1), optimizer, None)
