"""Versions and seams of DeepSpeed: what has moved is named."""

import copy
import importlib
import inspect
import re

import deepspeed
import pytest
from one_rank import STOCK_INITIALIZE, config, start

import ds_quant
from ds_quant import engine as engine_package
from ds_quant.config import ConfigError
from ds_quant.engine import quant_engine, reduction, weight_communication


@pytest.fixture(autouse=True)
def _job(single_rank):
    yield
    ds_quant.disable()


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
