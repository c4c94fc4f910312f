"""Engines that only evaluate, beside those that train."""

import pytest
import torch
from one_rank import SECTION, config, kinds, losses, model, start
from torch import nn

import ds_quant
from ds_quant.config import ConfigError


@pytest.fixture(autouse=True)
def _job(single_rank):
    yield
    ds_quant.disable()


EVERYTHING = {
    **SECTION,
    "optimizer": {"exp_avg": {"bits": 8}, "exp_avg_sq": {"bits": 8}},
    "communication": {"gradient": {"bits": 8}},
    "diagnostics": {"every": 1, "report": False},
}


def without_optimizer(stage, section=EVERYTHING):
    made = config(section)
    made["zero_optimization"]["stage"] = stage
    return {key: value for key, value in made.items() if key != "optimizer"}


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("optimizer", ["absent", {"type": None}])
def test_an_engine_without_an_optimizer_evaluates(stage, optimizer, caplog):
    caplog.set_level("INFO", logger="ds_quant")
    net, reference, x = model(), model(), torch.randn(4, 8)
    made = without_optimizer(stage)
    if optimizer != "absent":
        made["optimizer"] = optimizer
    engine, *_ = ds_quant.initialize(model=net, config=made)
    ds_quant.convert(reference, SECTION["linear"])
    with torch.no_grad():
        engine.eval()
        assert torch.equal(engine(x), reference.eval()(x))
    skipped = "ds_quant.optimizer, ds_quant.communication, ds_quant.diagnostics"
    assert f"Sequential is only evaluated: nothing to do for {skipped}" in caplog.text
    assert "Sequential is evaluated with the quantized linears of ds_quant.linear" in caplog.text
    assert "2 linear modules quantized" in caplog.text


def test_an_engine_without_an_optimizer_and_without_linear_is_stock(caplog):
    caplog.set_level("INFO", logger="ds_quant")
    section = {key: value for key, value in EVERYTHING.items() if key != "linear"}
    net, x = model(), torch.randn(4, 8)
    wanted = net(x)
    engine, *_ = ds_quant.initialize(model=net, config=without_optimizer(0, section))
    assert torch.equal(engine(x), wanted)
    assert "quantized linears" not in caplog.text


def test_a_reference_beside_a_model_that_is_trained():
    reference, *_ = ds_quant.initialize(model=model(), config=without_optimizer(0))
    engine, *_ = start(config=config({**SECTION, "optimizer": EVERYTHING["optimizer"]}))
    x = torch.randn(4, 8)
    before = reference(x).detach()
    losses(engine)
    assert torch.equal(reference(x), before)
    assert not torch.equal(engine(x), before)


def test_a_model_is_evaluated_and_then_trained():
    net = model()
    evaluating, *_ = ds_quant.initialize(model=net, config=without_optimizer(0))
    evaluating.eval()
    evaluating(torch.randn(4, 8))
    evaluating.train()
    made = config({**SECTION, "optimizer": EVERYTHING["optimizer"]})
    engine, *_ = start(model=net, config=made)
    fresh, *_ = start(config=made)
    assert losses(engine) == losses(fresh)


@pytest.mark.parametrize("stage", [1, 2])
def test_stages_that_need_an_optimizer(stage):
    with pytest.raises(ConfigError, match=r"optimizer: got null.*fix: add"):
        ds_quant.initialize(model=model(), config=without_optimizer(stage))


def test_a_head_that_was_resized_before_initialize():
    net = model()
    ds_quant.convert(net, SECTION["linear"])
    net[2] = nn.Linear(16, 12)
    engine, *_ = start(model=net, config=config())
    assert kinds(engine) == ["QuantLinear", "QuantLinear"]
