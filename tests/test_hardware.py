"""The probe, the prediction of memory, and what happens when there is none left."""

import pytest
import torch

from envs import batched, hardware, memory, workload
from envs.errors import RunFailed
from envs.hardware import Plan, fitting, probe
from envs.job import TorchJob
from envs.knobs import Knobs
from envs.packed import BUFFERS, Pack, predict


def test_a_peak_is_of_what_lives_at_the_same_time():
    block = torch.zeros(1000, dtype=torch.float64)
    assert memory.peak(lambda: block + 1) == 8000
    assert memory.peak(lambda: (block + 1, block + 2)) == 16000
    assert memory.peak(lambda: ((block + 1) + 1) + 1) == 16000  # the first is gone by the third
    assert memory.peak(lambda: block.view(10, 100)) <= 8000


def test_a_prediction_is_linear_and_holds_the_stacks(tiny_task):
    sizes = [predict(tiny_task(), lanes) for lanes in (1, 2, 4, 64)]
    slope = sizes[1] - sizes[0]
    assert sizes[2] - sizes[1] == 2 * slope
    assert sizes[3] - sizes[2] == 60 * slope
    assert sizes[3] > Pack(tiny_task(), 64, 8)._stack.nbytes


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's own
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_a_prediction_charges_once_what_runs_share(tiny_task, adapter):
    task = tiny_task(adapter=adapter)
    once = 2 * predict(task, 1) - predict(task, 2) - BUFFERS
    encoder, pack = 4 * workload.parameters(task.model), Pack(task, 3, 8)
    assert encoder < once < 4 * encoder  # with the texts
    pack.open(0, task, 0, Knobs())
    before = pack.shared_bytes
    for lane in (1, 2):
        pack.open(lane, task, lane, Knobs())
    assert pack.shared_bytes == before
    assert pack.lane_bytes * 3 >= pack._stack.nbytes


def test_only_packs_that_fit_are_tried(tiny_task, monkeypatch):
    sizes = (4, 8, 16)
    assert fitting(tiny_task(), "cpu", sizes) == [4, 8, 16]
    room = predict(tiny_task(), 8) / memory.SHARE + 1
    monkeypatch.setattr(memory, "free", lambda device: room)
    assert fitting(tiny_task(), "cpu", sizes) == [4, 8]


def test_the_probe_takes_the_cheapest_way(tiny_task, monkeypatch):
    """With known costs: packs pay up to 8, compiled code where many updates are to come."""
    costs = {1: 10.0, 4: 4.0, 8: 3.0, 16: 2.9, 32: 1.0}

    def seconds(task, plan):
        return costs[plan.pack] / 1000 * (0.4 if plan.compiled else 1) * (1 + plan.bfloat16)

    monkeypatch.setattr(hardware, "seconds", seconds)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert probe(tiny_task()) == Plan("cpu", 8)
    assert probe(tiny_task(), most=4) == Plan("cpu", 4)
    assert probe(tiny_task(), updates=10_000) == Plan("cpu", 8)
    assert probe(tiny_task(), updates=1e6) == Plan("cpu", 8, compiled=True)
    assert str(Plan("cpu", 8, compiled=True)) == "packs of 8 on cpu, compiled"


def test_the_probe_measures(tiny_task):
    threads = torch.get_num_threads()
    assert probe(tiny_task(), most=4).pack in (1, 4)
    assert torch.get_num_threads() == threads


def test_out_of_memory_halves_what_is_computed_together(tiny_task, monkeypatch, caplog):
    """And changes no number."""
    task = tiny_task()
    pack, jobs = Pack(task, 5, 4), [TorchJob(task, seed, Knobs(1e-3)) for seed in range(5)]
    for lane in range(5):
        pack.open(lane, task, lane, Knobs(1e-3))
    inner = pack._model._gradients

    def small(weights, *batch):
        if len(batch[0]) > 2:
            raise torch.OutOfMemoryError
        return inner(weights, *batch)

    pack._model._gradients = small
    reports = pack.advance(dict.fromkeys(range(5), 4))
    assert pack._model.together == 2
    assert caplog.messages == ["out of memory: 2 runs at a time from now on"]
    for lane, job in enumerate(jobs):
        assert reports[lane].losses == pytest.approx(job.advance(4).losses, rel=1e-5)

    def none(weights, *batch):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    pack._model._gradients = none
    with pytest.raises(RunFailed, match="not even one run at a time fits"):
        pack.advance({0: 1})
    pack._model._gradients = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        pack.advance({0: 1})


def test_lower_precision_is_close(tiny_task):
    task = tiny_task()
    full, half = Pack(task, 1, 4), Pack(task, 1, 4, bfloat16=True)
    for pack in (full, half):
        pack.open(0, task, 0, Knobs(1e-3))
    assert half.evaluate({0: "test"})[0].loss == pytest.approx(
        full.evaluate({0: "test"})[0].loss, rel=0.02
    )
    assert half.advance({0: 4})[0].losses == pytest.approx(full.advance({0: 4})[0].losses, rel=0.05)
    assert batched.fit(task).reason == ""
