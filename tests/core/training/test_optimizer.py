"""Rates and optimisers."""

import itertools
import math

import pytest
import torch
from torch import nn

from mochi_core.errors import TrainingError
from mochi_core.training import optimizer
from mochi_core.training.optimizer import Optimizer, OptimizerOptions


def test_rate_warms_up_then_falls_to_zero():
    options = OptimizerOptions(warmup=4)
    rates = [options.rate_at(step, 24) for step in range(24)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[14] == pytest.approx(0.5) and 0 < rates[-1] < 0.01
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))


@pytest.mark.parametrize(
    "options, step, rate",
    [
        (OptimizerOptions(schedule="linear"), 50, 0.5),
        (OptimizerOptions(schedule="constant"), 99, 1.0),
        (OptimizerOptions(schedule="linear", hold=0.5), 50, 1.0),
        (OptimizerOptions(schedule="linear", hold=0.5), 75, 0.5),
        (OptimizerOptions(schedule="cosine", final_rate=0.1), 50, 0.55),
    ],
)
def test_shapes_of_the_rate(options, step, rate):
    assert options.rate_at(step, 100) == pytest.approx(rate)


def test_every_step_of_every_schedule_has_a_rate():
    for schedule in optimizer.SCHEDULES:
        for hold in (0.0, 0.5, 1.0):
            for warmup in (0, 3, 10):
                options = OptimizerOptions(schedule=schedule, hold=hold, warmup=warmup)
                assert all(0 <= options.rate_at(step, 10) <= 1 for step in range(10))


def test_muon_is_for_matrices_and_slow_parameters_are_slower():
    network = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    made = Optimizer(
        network.named_parameters(), OptimizerOptions(name="muon", rate=1e-2, vector_rate=1e-3, slow={"1.bias": 0.1})
    )
    muon, adamw = made.parts
    assert [p.shape for group in muon.param_groups for p in group["params"]] == [(4, 4)]
    assert sorted(group["full_rate"] for group in adamw.param_groups) == pytest.approx([1e-4, 1e-3])
    network(torch.randn(3, 4)).square().sum().backward()
    made.step(0.5)
    assert muon.param_groups[0]["lr"] == pytest.approx(5e-3)
    assert all(p.grad is None for p in network.parameters())


def test_state_goes_over():
    def trained(steps, made, network):
        for step in range(steps):
            network(torch.full((1, 4), float(step + 1))).square().sum().backward()
            made.step(1.0)

    torch.manual_seed(0)
    first = nn.Linear(4, 4)
    second = nn.Linear(4, 4)
    one = Optimizer(first.named_parameters(), OptimizerOptions())
    trained(3, one, first)
    second.load_state_dict(first.state_dict())
    two = Optimizer(second.named_parameters(), OptimizerOptions())
    two.restore({name: held.clone() for name, held in one.tensors().items()}, one.numbers())
    trained(3, one, first)
    trained(3, two, second)
    assert torch.equal(first.weight, second.weight)


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_optimiser_without_its_package_is_named(name, monkeypatch):
    def missing(module, *rest):
        raise ImportError(module)

    monkeypatch.setattr(optimizer.importlib, "import_module", missing)
    with pytest.raises(TrainingError, match="pip install bitsandbytes"):
        Optimizer([("a", nn.Parameter(torch.zeros(2)))], OptimizerOptions(name=name))


@pytest.mark.parametrize(
    "bad",
    [
        dict(name="sgd"),
        dict(schedule="step"),
        dict(rate=0.0),
        dict(rate=math.inf),
        dict(warmup=-1),
        dict(betas=(0.9, 1.0)),
        dict(final_rate=2.0),
        dict(hold=-0.1),
        dict(weight_decay=-1.0),
    ],
)
def test_options_that_cannot_be(bad):
    (name,) = bad
    with pytest.raises(TrainingError, match=f"optimizer.{name}"):
        OptimizerOptions(**bad)
