"""Micro steps under accelerate's loop and a native one, and parameters that freeze or thaw."""

import copy

import pytest
import torch
from one_rank import config, losses, start

import ds_quant


@pytest.fixture(autouse=True)
def _job(single_rank):
    yield
    ds_quant.disable()


STOCHASTIC = {
    "linear": {
        "weight": {"bits": 8},
        "activation": {"bits": 8},
        "gradient": {"bits": 8, "rounding": "stochastic"},
        "exclude": [],
    },
    "optimizer": {"exp_avg": {"bits": 8}, "exp_avg_sq": {"bits": 8}},
    "communication": {"gradient": {"bits": 8, "rounding": "stochastic"}},
}
ACCUMULATION = 3


def micro_batches(step):
    return [
        torch.randn(4, 8, generator=torch.Generator().manual_seed(ACCUMULATION * step + micro))
        for micro in range(ACCUMULATION)
    ]


def native_step(engine, step):
    for x in micro_batches(step):
        engine.backward(engine(x).square().mean())
        engine.step()


def accelerate_step(engine, step):
    """As accelerate drives an engine: it names the boundary, and calls `step` there only."""
    *first, last = micro_batches(step)
    for x in first:
        engine.set_gradient_accumulation_boundary(is_boundary=False)
        engine.backward(engine(x).square().mean())
    engine.eval()
    engine(last)  # evaluation in between counts for nothing
    engine.train()
    engine.set_gradient_accumulation_boundary(is_boundary=True)
    engine.backward(engine(last).square().mean())
    engine.step()


def weights(engine):
    return [parameter.detach().clone() for parameter in engine.module.parameters()]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_accelerates_loop_draws_the_bits_of_a_native_one(stage, tmp_path):
    """Other bits in each micro step, the same under either, and after resuming with 3 micro steps a step."""
    settings = config(
        STOCHASTIC,
        zero_optimization={"ds_quant_required": True, "stage": stage},
        gradient_accumulation_steps=ACCUMULATION,
    )
    engines = [start(config=copy.deepcopy(settings))[0] for _ in range(2)]
    keys = []
    for step in range(4):
        if step == 2:
            engines[1].save_checkpoint(tmp_path, tag="middle")
        native_step(engines[0], step)
        accelerate_step(engines[1], step)
        keys.append(engines[1].module[0].step_key.micro_step)
        for got, want in zip(weights(engines[1]), weights(engines[0]), strict=True):
            assert torch.equal(got, want)
    assert keys == [ACCUMULATION - 1] * 4
    resumed = start(config=copy.deepcopy(settings))[0]
    native_step(resumed, 9)  # a count of its own, which loading puts an end to
    resumed.load_checkpoint(tmp_path, tag="middle")
    for step in (2, 3):
        accelerate_step(resumed, step)
    for got, want in zip(weights(resumed), weights(engines[0]), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("step_of", [native_step, accelerate_step])
@pytest.mark.parametrize(("every", "accumulation"), [(2, 3), (1, 3)])
def test_a_look_sees_the_first_micro_batch_alone(step_of, every, accumulation, tmp_path, monkeypatch):
    """With an even `every` and accumulation under accelerate there was nothing to see, or all of the step."""
    seen = []
    section = {
        **copy.deepcopy(STOCHASTIC),
        "diagnostics": {"every": every, "kinds": ["outliers"], "output_dir": str(tmp_path), "report": False},
    }
    engine = start(config=config(section, gradient_accumulation_steps=accumulation))[0]
    forward = type(engine.module[0]).forward

    def watched(module, x):
        if module is engine.module[0] and module.training:
            seen.append(engine.ds_quant_diagnostics._hooks is not None)
        return forward(module, x)

    monkeypatch.setattr(type(engine.module[0]), "forward", watched)
    for step in range(4):
        step_of(engine, step)
    looked = [[(step + 1) % every == 0, False, False] for step in range(4)]
    assert [seen[3 * step : 3 * step + 3] for step in range(4)] == looked
    assert list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("thaws", [True, False])
def test_parameters_that_freeze_or_thaw_go_on_from_a_checkpoint(thaws, tmp_path):
    """At stage 0 in fp32 each parameter counts its own steps."""
    settings = config({"optimizer": STOCHASTIC["optimizer"]}, zero_optimization={"ds_quant_required": True, "stage": 0})
    engine = start(config=copy.deepcopy(settings))[0]
    engine.module[0].requires_grad_(not thaws)
    losses(engine, 2)
    engine.module[0].requires_grad_(thaws)
    losses(engine, 3)
    engine.save_checkpoint(tmp_path, tag="x")
    losses(engine, 2)
    other = start(config=copy.deepcopy(settings))[0]
    other.module[0].requires_grad_(thaws)
    other.load_checkpoint(tmp_path, tag="x")
    steps = {float(state["step"]) for state in other.basic_optimizer.state.values()}
    assert len(steps) == 2
    losses(other, 2)
    for got, want in zip(weights(other), weights(engine), strict=True):
        assert torch.equal(got, want)
