"""ds_quant.initialize and enable() around the real deepspeed.initialize, on one rank."""

import base64
import copy
import inspect
import json
import subprocess
import sys
from types import SimpleNamespace

import deepspeed
import pytest
import torch
from one_rank import SECTION, STOCK_INITIALIZE, config, kinds, losses, model, start
from torch import nn

import ds_quant
from ds_quant.config import ConfigError
from ds_quant.kernels.integer_units import integer_units
from ds_quant.linear.convert import coverage
from ds_quant.linear.step_key import CountForwards


@pytest.fixture(autouse=True)
def _job(single_rank):
    yield
    ds_quant.disable()


def test_signature_is_deepspeeds():
    ours = inspect.signature(ds_quant.initialize).parameters.values()
    theirs = inspect.signature(STOCK_INITIALIZE).parameters.values()
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]


def test_returns_the_four_tuple_and_trains_quantized(caplog):
    result = start(config=config())
    assert len(result) == 4
    engine, optimizer, loader, scheduler = result
    assert isinstance(engine, deepspeed.DeepSpeedEngine)
    assert optimizer is engine.optimizer
    assert (loader, scheduler) == (None, None)
    assert kinds(engine) == ["QuantLinear"] * 2
    quantized = losses(engine)
    assert quantized[-1] < quantized[0]
    assert "2 linear modules quantized: W8 channel, A8 token (simulated)" in caplog.messages
    assert "100.0% of 256 matmul parameters covered" in caplog.messages
    plain, *_ = start(config=config(None, tripwire=False))
    assert losses(plain) != quantized


@pytest.mark.parametrize("section", [None, {**SECTION, "enabled": False}], ids=["absent", "switched off"])
def test_without_the_section_it_is_deepspeed_bit_for_bit(section, caplog):
    stock, *_ = start(STOCK_INITIALIZE, config=config(None, tripwire=False))
    ours, *_ = start(config=config(section, tripwire=section is not None))
    assert kinds(ours) == ["Linear"] * 2
    assert losses(ours) == losses(stock)
    assert type(ours) is type(stock)
    assert sum("a plain DeepSpeed run in full precision" in message for message in caplog.messages) == 1


def test_every_form_of_the_config(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config()))
    encoded = base64.urlsafe_b64encode(path.read_bytes()).decode()
    as_arguments = SimpleNamespace(deepspeed_config=str(path), local_rank=0)
    forms = [
        {"config": config()},
        {"config": str(path)},
        {"config": encoded},
        {"config_params": config()},
        {"args": as_arguments},
    ]
    for form in forms:
        engine, *_ = start(**form)
        assert kinds(engine) == ["QuantLinear"] * 2, form
    assert as_arguments.deepspeed_config == str(path), "the caller's arguments were changed"
    with pytest.raises(ConfigError, match="one of them"):
        start(args=as_arguments, config=config())


def test_the_callers_config_is_not_changed():
    given = config()
    before = copy.deepcopy(given)
    start(config=given)
    assert given == before


def test_enable_wraps_once_and_disable_restores():
    ds_quant.enable()
    wrapped = deepspeed.initialize
    assert wrapped is not STOCK_INITIALIZE
    ds_quant.enable()
    assert deepspeed.initialize is wrapped
    engine, *_ = start(deepspeed.initialize, config=config())
    assert kinds(engine) == ["QuantLinear"] * 2
    ds_quant.disable()
    assert deepspeed.initialize is STOCK_INITIALIZE
    ds_quant.disable()
    with pytest.raises(ValueError, match="ds_quant_required"):
        start(deepspeed.initialize, config=config())


def test_zero_init_takes_the_tripwire_only_when_enabled():
    made = config(zero_optimization={"ds_quant_required": True, "stage": 3})
    made["train_batch_size"] = 4
    deepspeed.init_distributed()
    with pytest.raises(ValueError, match="ds_quant_required"):
        deepspeed.zero.Init(config_dict_or_path=made)
    ds_quant.enable()
    with deepspeed.zero.Init(config_dict_or_path=made):
        net = model()
    assert net[0].weight.ds_shape == (16, 8)
    engine, *_ = start(model=net, config=made)
    assert kinds(engine) == ["QuantLinear"] * 2
    found = coverage(engine.module)
    assert (found.share, found.matmul_numel) == (1.0, 256)
    ds_quant.disable()
    with pytest.raises(ValueError, match="ds_quant_required"):
        deepspeed.zero.Init(config_dict_or_path=made)


def test_an_old_reference_to_initialize_does_not_train_in_full_precision():
    """`from deepspeed import initialize` before enable() keeps DeepSpeed's own, which must refuse the config."""
    ds_quant.enable()
    with pytest.raises(ValueError, match="ds_quant_required"):
        start(STOCK_INITIALIZE, config=config())


def test_integer_products_are_announced(caplog):
    integer_units.cache_clear()  # where they are slow it is said once in a process
    section = {"linear": {"weight": {"bits": 8}, "activation": {"bits": 8}, "backend": "int8"}}
    engine, *_ = start(config=config(section))
    trained = losses(engine)
    assert trained[-1] < trained[0]
    assert "W8 channel, A8 token (int8: Y)" in caplog.text
    assert "int8 products run " in caplog.text, "on which units, or without any"


def test_a_refused_config_leaves_the_model_as_it_was():
    net = model()
    section = {"linear": {"weight": {"bits": 8}, "gradient": {"bits": 8, "granularity": "tensor"}, "backend": "int8"}}
    with pytest.raises(ConfigError, match=r"ds_quant\.linear\.gradient\.granularity: got .*fix"):
        start(model=net, config=config(section))
    assert type(net[0]) is nn.Linear


def test_refusals_come_before_anything_happens():
    net = model()
    with pytest.raises(ConfigError, match=r"hybrid_engine"):
        start(model=net, config=config(hybrid_engine={"enabled": True}))
    with pytest.raises(ConfigError, match=r"optimizer\.params\.lr: got \"auto\".*resolve_auto\(config, lr=\.\.\.\)"):
        start(model=net, config=config(optimizer={"type": "AdamW", "params": {"lr": "auto"}}))
    assert type(net[0]) is nn.Linear


def test_warnings(caplog):
    start(config=config(tripwire=False))
    assert 'has no tripwire; add "ds_quant_required": "run with python -m ds_quant"' in caplog.text
    start(config=config(gradient_clippping=1.0))
    assert 'did you mean "gradient_clipping"' in caplog.text


def test_models_that_a_class_swap_does_not_reach():
    deepspeed.init_distributed()
    pipeline = deepspeed.pipe.PipelineModule(layers=[nn.Linear(8, 8), nn.Linear(8, 8)], num_stages=1)
    with pytest.raises(ConfigError, match=r"got a PipelineModule.*fix: build the model as a plain module"):
        ds_quant.initialize(model=pipeline, model_parameters=pipeline.parameters(), config=config())
    from deepspeed.module_inject.layers import LinearLayer

    parallel = nn.Sequential(nn.Linear(8, 8), LinearLayer(nn.Linear(8, 8), mp_group=None, skip_partition=True))
    with pytest.raises(ConfigError, match=r"the layer '1' of tensor parallelism \(LinearLayer\)"):
        start(model=parallel, config=config())

    domino = type("DominoLayer", (nn.Module,), {"__module__": "deepspeed.runtime.domino.transformer"})
    with pytest.raises(ConfigError, match="the Domino layer '1'"):
        start(model=nn.Sequential(nn.Linear(8, 8), domino()), config=config())


def test_modules_replaced_during_initialize_are_an_error(monkeypatch):
    def replacing(*args, **kwargs):
        result = STOCK_INITIALIZE(*args, **kwargs)
        result[0].module[2] = nn.Linear(16, 8)
        return result

    monkeypatch.setattr(deepspeed, "initialize", replacing)
    with pytest.raises(ConfigError, match="1 quantized modules replaced by something else"):
        start(config=config())


def test_a_client_optimizer_and_scheduler_stay_the_users():
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    made = config(zero_allow_untested_optimizer=True)
    del made["optimizer"]
    engine, _, _, returned = ds_quant.initialize(
        model=net, model_parameters=net.parameters(), optimizer=optimizer, lr_scheduler=scheduler, config=made
    )
    assert returned is scheduler
    losses(engine, 2)
    assert engine.get_lr() == [1e-2 * 0.25]


def test_the_engine_names_the_step():
    section = {"linear": {**SECTION["linear"], "gradient": {"bits": 8, "rounding": "stochastic"}}}
    torch.manual_seed(5)
    engine, *_ = start(config=config(section, gradient_accumulation_steps=2))
    key = engine.ds_quant_step_key
    # model() seeds with 0 for its weights, and that is the seed at the time of conversion.
    assert (key.seed, key.rank) == (0, 0)
    losses(engine, 3)
    assert (key.step, key.micro_step) == (1, 0)
    hooks = engine.module._forward_pre_hooks.values()
    assert not any(isinstance(hook, CountForwards) for hook in hooks), "the model still counts its own forwards"
    assert type(engine).__name__ == "DeepSpeedEngine"


def test_importing_the_package_is_light():
    program = (
        "import sys, ds_quant; ds_quant.__version__; dir(ds_quant); "
        "assert not {'deepspeed', 'transformers', 'torch'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_public_names():
    for name in ds_quant.__all__:
        assert getattr(ds_quant, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'initialise'"):
        ds_quant.initialise  # noqa: B018
