"""Which optimizers and settings of DeepSpeed quantized moments and masters go with."""

import deepspeed
import pytest
import torch
from one_rank import SECTION, STOCK_INITIALIZE, config, losses, model, start
from torch import nn

import ds_quant
from ds_quant.config import ConfigError


@pytest.fixture(autouse=True)
def _job(single_rank):
    yield
    ds_quant.disable()


MOMENTS = {"optimizer": {"exp_avg": {"bits": 8}, "exp_avg_sq": {"bits": 8}}}


def test_the_optimizer_of_the_json_is_quantized(caplog):
    engine, *_ = start(config=config(MOMENTS))
    assert type(engine.basic_optimizer) is ds_quant.QuantAdamW
    trained = losses(engine)
    assert trained[-1] < trained[0]
    (state,) = engine.basic_optimizer.state.values()
    assert type(state["exp_avg"]).__name__ == type(state["exp_avg_sq"]).__name__ == "QuantizedState"
    assert "bytes a parameter instead of 8, for 100.0% of the trainable parameters" in caplog.text


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (None, r"optimizer: got null; allowed: an optimizer of type Adam, AdamW, "),
        ({}, r"optimizer: got \{\}; allowed: an optimizer of type Adam, AdamW, "),
        ({"type": "Lamb", "params": {"lr": 1e-3}}, r'optimizer\.type: got "Lamb"; allowed: "Adam", "AdamW", "Lion"'),
        ({"type": "Lion", "params": {"lr": 1e-3}}, r"optimizer\.exp_avg_sq: got .*; allowed: exp_avg with Lion"),
        ({"type": "Muon", "params": {"nesterov": True}}, r"optimizer\.params\.nesterov: got true"),
        ({"type": "SGD", "params": {"lr": 1e-3}}, r"optimizer\.params\.momentum: got 0\.0; allowed: above 0"),
        (
            {"type": "SGD", "params": {"lr": 1e-3, "momentum": 0.9}},
            r"optimizer\.exp_avg: got .*; allowed: momentum_buffer with SGD",
        ),
        ({"type": "AdamW", "params": {"amsgrad": True}}, r"optimizer\.params\.amsgrad: got true; allowed: false"),
        ({"type": "AdamW", "params": {"maximize": True}}, r"optimizer\.params\.maximize: got true"),
        ({"type": "Adam", "params": {"adam_w_mode": False}}, r"optimizer\.params\.adam_w_mode: got false"),
        ({"type": "AdamW", "params": {"bias_correction": False}}, r"optimizer\.params\.bias_correction: got false"),
        ({"type": "AdamW", "params": {"fp32_optimizer_states": False}}, r"fp32_optimizer_states: got false"),
        ({"type": "AdamW", "params": {"max_grad_norm": 1.0}}, r"optimizer\.params\.max_grad_norm: got 1\.0"),
    ],
)
def test_optimizers_without_these_moments_are_refused(optimizer, message):
    made = config(MOMENTS | SECTION, optimizer=optimizer)
    net = model()
    with pytest.raises(ConfigError, match=rf"{message}.*; fix: "):
        start(model=net, config=made)
    assert type(net[0]) is nn.Linear, "a refused config must leave the model as it was"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda params: torch.optim.SGD(params, lr=0.1), r"got \"an optimizer of type torch\.optim\.sgd\.SGD\""),
        (lambda params: torch.optim.AdamW(params, amsgrad=True), "amsgrad"),
        (lambda params: torch.optim.Adam(params, weight_decay=0.1), "which is added to the gradient"),
    ],
)
def test_optimizers_passed_in_that_are_refused(make, message):
    for passed in (make, make(model().parameters())):
        made = config(MOMENTS)
        del made["optimizer"]
        with pytest.raises(ConfigError, match=rf"ds_quant\.optimizer.*{message}.*; fix: "):
            start(config=made, optimizer=passed)


def test_second_moments_are_looked_at_where_there_are_any(tmp_path):
    looks = {"output_dir": str(tmp_path / "looks"), "every": 1, "kinds": ["moments"], "report": False}
    mix = {"type": "AdEMAMix", "params": {"lr": 1e-3}}
    lion = {"type": "Lion", "params": {"lr": 1e-3}}
    made = config({"optimizer": {"exp_avg_fast": {"bits": 8}}, "diagnostics": looks}, optimizer=mix)
    engine, *_ = start(config=made)
    losses(engine, 2)
    assert "exp_avg_sq" in (tmp_path / "looks" / "step-00000002.json").read_text()
    made = config({"optimizer": {"exp_avg": {"bits": 8}}, "diagnostics": looks}, optimizer=lion)
    with pytest.raises(ConfigError, match=r"diagnostics\.kinds: got \"moments\"; .* QuantLion has no exp_avg_sq"):
        start(config=made)


def test_other_optimizers_that_are_passed_in():
    """One of ours trains as it is, and its section must agree; functions that make one, too."""
    made = config({"optimizer": {"exp_avg": {"bits": 4}}})
    del made["optimizer"]
    net = model()
    lion = ds_quant.QuantLion(net.parameters(), lr=1e-3, exp_avg={"bits": 4})
    engine, *_ = start(model=net, config=made, optimizer=lion)
    assert engine.basic_optimizer is lion
    losses(engine, 1)
    (state,) = lion.state.values()
    assert (type(state["exp_avg"]).__name__, state["exp_avg"].blocks.code_map.bits) == ("QuantizedState", 4)

    def make(params):
        return ds_quant.QuantLion(params, lr=1e-3, exp_avg={"bits": 8})

    for passed in (make, make(model().parameters())):
        with pytest.raises(ConfigError, match=r"ds_quant\.optimizer\.exp_avg: got .*a QuantLion with .*8.*; fix: "):
            start(config=made, optimizer=passed)
    made["ds_quant"]["optimizer"] = {"exp_avg": {"bits": 8}, "exp_avg_sq": {"bits": 8}}
    with pytest.raises(
        ConfigError, match=r"exp_avg_sq: got .*; allowed: exp_avg with QuantLion, which has no exp_avg_sq"
    ):
        start(config=made, optimizer=make)


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        ({"zero_optimization": {"stage": 1, "zenflow": {"topk_ratio": 0.1}}}, r"zero_optimization\.zenflow"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, r"offload_optimizer\.device"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
            r"offload_optimizer\.super_offload",
        ),
        ({"zero_optimization": {"stage": 1, "elastic_checkpoint": True}}, r"zero_optimization\.elastic_checkpoint"),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, r"bf16\.bf16_optimizer_states"),
    ],
)
def test_what_does_not_go_with_quantized_moments(overrides, where):
    with pytest.raises(ConfigError, match=rf"{where}: got .*ds_quant\.optimizer.*; fix: "):
        start(config=config(MOMENTS, **overrides))


def test_scales_of_whole_parameters_need_whole_parameters():
    section = {"optimizer": {"exp_avg": {"bits": 8, "map": "linear", "granularity": "channel"}}}
    with pytest.raises(ConfigError, match=r'exp_avg\.granularity: got "channel"; allowed: "block" at ZeRO stage 1'):
        start(config=config(section))
    engine, *_ = start(config=config(section, zero_optimization={"ds_quant_required": True, "stage": 0}))
    losses(engine, 1)


def test_an_optimizer_that_was_replaced_is_an_error(monkeypatch):
    def replacing(*args, **kwargs):
        result = STOCK_INITIALIZE(*args, **kwargs)
        result[0].basic_optimizer = torch.optim.SGD(result[0].module.parameters(), lr=0.1)
        return result

    monkeypatch.setattr(deepspeed, "initialize", replacing)
    with pytest.raises(ConfigError, match=r"ds_quant\.optimizer: got \"an engine with SGD\""):
        start(config=config(MOMENTS))


def test_a_moved_attribute_of_a_live_wrapper_is_named(monkeypatch):
    def moving(*args, **kwargs):
        result = STOCK_INITIALIZE(*args, **kwargs)
        del result[1]._hp_optimizer_states_linked
        return result

    monkeypatch.setattr(deepspeed, "initialize", moving)
    with pytest.raises(ImportError, match=r"has moved DeepSpeedZeroOptimizer\._hp_optimizer_states_linked"):
        start(config=config(MOMENTS))


def test_masters_are_refused_where_deepspeed_would_keep_others():
    made = config(bf16={"enabled": True}, zero_optimization={"stage": 0})
    made["ds_quant"] = {"optimizer": {"master": {"bits": 24}}}
    with pytest.raises(
        ConfigError, match=r"zero_optimization\.stage: got 0; allowed: 1, 2 or 3 with ds_quant\.optimizer"
    ):
        start(config=made)
