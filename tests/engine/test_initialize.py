"""ds_quant.initialize and enable() around the real deepspeed.initialize, on one rank."""

import base64
import copy
import importlib
import inspect
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import deepspeed
import pytest
import torch
from torch import nn

import ds_quant
from ds_quant import engine as engine_package
from ds_quant.config import ConfigError
from ds_quant.engine import quant_engine, reduction, weight_communication
from ds_quant.kernels.integer_units import integer_units
from ds_quant.linear.convert import coverage
from ds_quant.linear.step_key import CountForwards

SECTION = {"linear": {"weight": {"bits": 8}, "activation": {"bits": 8}, "exclude": []}}
CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "zero_optimization": {"ds_quant_required": True, "stage": 1},
    "ds_quant": SECTION,
}
STOCK_INITIALIZE = deepspeed.initialize


@pytest.fixture(autouse=True)
def _job(single_rank):
    yield
    ds_quant.disable()


def config(section=SECTION, tripwire=True, **overrides):
    made = {**copy.deepcopy(CONFIG), **overrides}
    if section is None:
        del made["ds_quant"]
    else:
        made["ds_quant"] = copy.deepcopy(section)
    if not tripwire:
        del made["zero_optimization"]["ds_quant_required"]
    return made


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


def losses(engine, steps=4):
    results = []
    for step in range(steps):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        loss = engine(x).square().mean()
        engine.backward(loss)
        engine.step()
        results.append(loss.item())
    return results


def start(initialize=None, **arguments):
    net = arguments.pop("model", None) or model()
    return (initialize or ds_quant.initialize)(model=net, model_parameters=net.parameters(), **arguments)


def kinds(engine):
    return [type(m).__name__ for m in engine.module.modules() if isinstance(m, nn.Linear)]


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


def test_refusals_come_before_anything_happens():
    net = model()
    with pytest.raises(ConfigError, match=r"hybrid_engine"):
        start(model=net, config=config(hybrid_engine={"enabled": True}))
    with pytest.raises(ConfigError, match=r"optimizer\.params\.lr: got \"auto\".*resolve_auto\(config, lr=\.\.\.\)"):
        start(model=net, config=config(optimizer={"type": "AdamW", "params": {"lr": "auto"}}))
    assert type(net[0]) is nn.Linear


def test_masters_are_refused_where_deepspeed_would_keep_others():
    made = config(bf16={"enabled": True}, zero_optimization={"stage": 0})
    made["ds_quant"] = {"optimizer": {"master": {"bits": 24}}}
    with pytest.raises(
        ConfigError, match=r"zero_optimization\.stage: got 0; allowed: 1, 2 or 3 with ds_quant\.optimizer"
    ):
        start(config=made)


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


def test_unsupported_versions():
    for version in ("0.19.7", "0.18.0", "0.20.0", "1.0"):
        with pytest.raises(ConfigError, match=rf"deepspeed: got version {version}; allowed: >=0\.19\.8,<0\.20; fix"):
            engine_package.check_version(version)
    for version in ("0.19.8", "0.19.8+cpu", "0.19.12"):
        assert engine_package.check_version(version) == version


def test_a_seam_that_moved_is_named(monkeypatch):
    gone = ("deepspeed.runtime.engine", "DeepSpeedEngine.gone", "a test")
    monkeypatch.setattr(engine_package.seams, "SEAMS", (*engine_package.seams.SEAMS, gone))
    assert engine_package.find_seams()["deepspeed.runtime.engine.DeepSpeedEngine.gone"] is False
    with pytest.raises(ImportError, match=r"has moved deepspeed\.runtime\.engine\.DeepSpeedEngine\.gone"):
        engine_package.check_seams()


def test_a_seam_that_a_release_does_not_use_is_not_missed(monkeypatch):
    """DeepSpeed before 0.19.8 has neither the buffers of partitions nor what adds to them."""
    holder = deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer
    name = f"{holder.__module__}.DeepSpeedZeroOptimizer._add_to_grad_partition_buffer"
    has_buffers = hasattr(holder, "_get_compact_grad_partition_slice")
    assert engine_package.find_seams().get(name, False) is has_buffers
    monkeypatch.setattr(holder, "_get_compact_grad_partition_slice", None, raising=False)
    monkeypatch.delattr(holder, "_add_to_grad_partition_buffer", raising=False)
    assert engine_package.find_seams()[name] is False
    monkeypatch.delattr(holder, "_get_compact_grad_partition_slice")
    assert name not in engine_package.find_seams()
    engine_package.check_seams()


SEAMS_OF_COMMUNICATION = [
    (module, path)
    for module, path, _ in engine_package.seams.SEAMS
    if f"{module}.{path}" in engine_package.find_seams()
    if path.rpartition(".")[2].startswith(("_DeepSpeedZeroOptimizer_Stage3__avg", "reduce", "all_reduce", "allreduce"))
    or path.rpartition(".")[2] in ("average_tensor", "gradient_reduction_w_predivide", "_add_to_grad_partition_buffer")
    or path.rpartition(".")[2] in ("buffered_allreduce_fallback", "_get_gradients_for_reduction")
    or path.rpartition(".")[2] in ("save_checkpoint", "was_step_applied", "is_gradient_accumulation_boundary")
]


@pytest.mark.parametrize(("module", "path"), SEAMS_OF_COMMUNICATION)
def test_a_seam_of_communication_that_moved_is_named(monkeypatch, module, path):
    holder = importlib.import_module(module)
    *parts, last = path.split(".")
    for part in parts:
        holder = getattr(holder, part)
    monkeypatch.delattr(holder, last)
    with pytest.raises(ImportError, match=rf"has moved .*{re.escape(f'{module}.{path}')}"):
        engine_package.check_seams()


def test_every_override_is_a_seam():
    """A method that DeepSpeed no longer calls would leave gradients in full precision, in silence."""
    with_buffers = hasattr(deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer, "_add_to_grad_partition_buffer")
    assert len(SEAMS_OF_COMMUNICATION) == 18 + with_buffers
    names = {path.rpartition(".")[2] for _, path, _ in engine_package.seams.SEAMS}
    for mixin in (
        reduction.QuantizedReductionEngine,
        reduction.QuantizedReductionStage1And2,
        reduction.QuantizedReductionStage3,
        weight_communication.GatheredStage1And2,
        quant_engine.QuantEngine,
    ):
        overrides = {name for name, value in vars(mixin).items() if inspect.isfunction(value)}
        overrides = {name for name in overrides if not name.startswith("_ds_quant_") and name != "gather_weights"}
        assert overrides
        assert overrides <= names
    for name in ("save_checkpoint", "load_checkpoint", "offload_states", "reload_states"):
        ours = inspect.signature(getattr(quant_engine.QuantEngine, name)).parameters
        assert list(ours) == list(inspect.signature(getattr(deepspeed.DeepSpeedEngine, name)).parameters)


@pytest.mark.parametrize(
    ("stage", "holder", "name"),
    [
        (0, "engine", "seq_data_parallel_group"),
        (1, "optimizer", "ipg_buckets"),
        (2, "optimizer", "partition_size"),
        (3, "optimizer", "reduce_scatter"),
    ],
)
def test_a_moved_attribute_of_communication_is_named(monkeypatch, stage, holder, name):
    def moving(*args, **kwargs):
        result = STOCK_INITIALIZE(*args, **kwargs)
        delattr(result[0] if holder == "engine" else result[1], name)
        return result

    monkeypatch.setattr(deepspeed, "initialize", moving)
    section = {"communication": {"gradient": {"bits": 8}}}
    with pytest.raises(ImportError, match=rf"has moved \w+\.{name}"):
        start(config=config(section, zero_optimization={"ds_quant_required": True, "stage": stage}))


def test_a_release_that_averages_always_need_not_say_so(monkeypatch):
    """DeepSpeed before 0.19.6 has no `gradient_allreduce_op`, and nothing that tells which one was chosen."""

    def without(*args, **kwargs):
        result = STOCK_INITIALIZE(*args, **kwargs)
        vars(result[1]).pop("gradient_average", None)
        return result

    monkeypatch.setattr(deepspeed, "initialize", without)
    section = {"communication": {"gradient": {"bits": 8}}}
    settings = {"section": section, "zero_optimization": {"ds_quant_required": True, "stage": 2}}
    monkeypatch.setattr(reduction, "CAN_SUM", True)
    with pytest.raises(ImportError, match=r"has moved \w+\.gradient_average"):
        start(config=config(**copy.deepcopy(settings)))
    monkeypatch.setattr(reduction, "CAN_SUM", False)
    engine = start(config=config(**copy.deepcopy(settings)))[0]
    assert hasattr(engine, "ds_quant_gradients")


def test_importing_the_package_is_light():
    program = (
        "import sys, ds_quant; ds_quant.__version__; dir(ds_quant); "
        "assert not {'deepspeed', 'transformers', 'torch'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_public_names():
    for name in ds_quant.__all__:
        assert getattr(ds_quant, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'initialise'"):
        ds_quant.initialise  # noqa: B018


# ---- micro steps, and parameters that freeze and thaw

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


# ---- engines that do not train

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
