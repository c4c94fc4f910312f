"""When and in which order a live engine calls its parts."""

import functools

import deepspeed
import pytest
import torch
from torch import nn

import ds_quant
from ds_quant.engine import quant_engine
from ds_quant.engine.parts import Part

ORDER = [
    "MicroSteps",
    "Masters",
    "Release",
    "Moments",
    "Steps",
    "Weights",
    "Communication",
    "WeightCommunication",
    "WeightFetches",
    "OscillationReset",
    "Diagnostics",
]
"""Written down once more: what `quant_engine.ORDER` must be."""
BELOW_STAGE_3 = [name for name in ORDER if name not in ("WeightFetches", "Release", "OscillationReset")]
"""The parts that one engine has: that of stage 3 stands in for WeightCommunication, gradients that are released cannot
be accumulated, and weights that are reset have masters in fp32."""
HOOKS = [name for name in vars(Part) if name.startswith(("before_", "after_"))]


@pytest.fixture(autouse=True)
def _job(single_rank):
    """One rank without a launcher."""


@pytest.fixture
def called(monkeypatch):
    """(hook, class, arguments) of every call of a hook of any part."""
    calls = []

    def recording(name, original):
        @functools.wraps(original)
        def hook(part, *args, **kwargs):
            calls.append((name, type(part).__name__, args, kwargs))
            return original(part, *args, **kwargs)

        return hook

    for part in quant_engine.ORDER:
        for name in HOOKS:
            monkeypatch.setattr(part, name, recording(name, getattr(part, name)))
    return calls


def start(folder, *, with_masters=True, **overrides):
    """An engine with every part, of two micro steps a step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    section = {
        "linear": {
            "backend": "int8",
            "weight": {"bits": 8},
            "activation": {"bits": 8},
            "gradient": {"bits": 8, "rounding": "stochastic"},
        },
        "optimizer": {"exp_avg": {"bits": 8}, "exp_avg_sq": {"bits": 8}},
        "communication": {"gradient": {"bits": 8, "error_feedback": True}, "weight": {"mode": "codes"}},
        "diagnostics": {"every": 1, "kinds": ["outliers"], "output_dir": str(folder), "report": False},
    }
    if with_masters:
        section["optimizer"]["master"] = {"bits": 24}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": 1, "ds_quant_required": True},
        "ds_quant": section,
        **overrides,
    }
    return ds_quant.initialize(model=model, config=config)[0]


def micro_step(engine):
    engine.backward(engine(torch.ones(2, 32, dtype=torch.bfloat16)).float().square().mean())
    engine.step()


def test_parts_are_called_in_one_order(tmp_path, called):
    engine = start(tmp_path / "looks")
    called.clear()
    micro_step(engine)
    micro_step(engine)
    engine.eval()
    with torch.no_grad():
        engine(torch.ones(2, 32, dtype=torch.bfloat16))
    engine.train()
    engine.save_checkpoint(tmp_path, tag="x")
    engine.load_checkpoint(tmp_path, tag="x")
    engine.load_module_state_dict({"module": engine.module.state_dict()})  # loading a checkpoint calls it, too
    engine.offload_states(include=[quant_engine.OffloadStateTypeEnum.optim_states])
    engine.reload_states()
    micro = ["before_forward", "after_forward", "after_backward"]
    expected = [*micro, "after_step", *micro, "after_writing", "after_step", "before_forward", "after_forward"]
    expected += ["before_reading", "before_save"]
    expected += ["before_load", "after_writing", "after_writing", "after_load", "after_writing"]
    expected += ["before_offload", "after_reload"]
    assert [(name, part) for name, part, *_ in called] == [(name, p) for name in expected for p in BELOW_STAGE_3]
    arguments = {
        name: [kwargs for hook, part, _, kwargs in called if (hook, part) == (name, BELOW_STAGE_3[0])]
        for name in ("before_forward", "after_step")
    }
    assert [bool(kwargs["trains"]) for kwargs in arguments["before_forward"]] == [True, True, False]
    assert [bool(kwargs["is_whole"]) for kwargs in arguments["after_step"]] == [False, True]
    (folder,) = {args[0] for name, _, args, _ in called if name == "before_save"}
    assert folder == tmp_path / "x"


class Bare:
    global_steps = 0


def test_a_part_joins_wherever_it_was_made(tmp_path):
    engine = start(tmp_path)
    parts = engine.ds_quant_parts
    assert [part.__name__ for part in quant_engine.ORDER] == ORDER
    assert [type(part).__name__ for part in parts] == BELOW_STAGE_3
    bare = Bare()
    quant_engine.extend(bare, reversed(parts))
    assert bare.ds_quant_parts == parts


@pytest.mark.parametrize("method", ["forward", "step", "load_checkpoint"])
def test_parts_hear_of_what_failed(tmp_path, called, monkeypatch, method):
    engine = start(tmp_path / "looks")
    engine.save_checkpoint(tmp_path, tag="x")

    def fails(*args, **kwargs):
        raise RuntimeError("full")

    monkeypatch.setattr(deepspeed.DeepSpeedEngine, method, fails)
    called.clear()
    run = {"forward": lambda: engine(torch.ones(2, 32)), "step": engine.step}
    with pytest.raises(RuntimeError, match="full"):
        run.get(method, lambda: engine.load_checkpoint(tmp_path, tag="x"))()
    (last,) = {name for name, *_ in called[-len(BELOW_STAGE_3) :]}
    assert last == ("after_forward" if method == "forward" else "after_writing")
    if method == "forward":
        assert called[-1][3] == {"trains": True, "failed": True}
    if method == "load_checkpoint":
        assert "_load_global_state" not in vars(engine.optimizer), "what holds while DeepSpeed loads is still held"


def test_a_part_that_fails_before_a_forward_ends_it_for_all(tmp_path, monkeypatch):
    """Else a layer that is called outside of a forward would draw the bits of one that never ended."""
    engine = start(tmp_path)

    def fails(part, *, trains):
        raise RuntimeError("full")

    monkeypatch.setattr(quant_engine.Diagnostics, "before_forward", fails)
    with pytest.raises(RuntimeError, match="full"):
        engine(torch.ones(2, 32))
    assert engine.ds_quant_step_key._calls is None


def test_only_moments_are_offloaded_unpinned(tmp_path, monkeypatch):
    engine, seen = start(tmp_path, with_masters=False), []  # with them offload_states() is refused

    def offload(self, include=None, device=None, pin_memory=True, non_blocking=False):
        seen.append((None if include is None else set(include), pin_memory))

    monkeypatch.setattr(deepspeed.DeepSpeedEngine, "offload_states", offload)
    states = set(quant_engine.OffloadStateTypeEnum)
    moments = set(quant_engine.Moments.unpinned)
    engine.offload_states()
    assert seen == [(moments, False), (states - moments, True)]
    seen.clear()
    engine.offload_states(include=list(moments))
    engine.offload_states(pin_memory=False)
    assert seen == [(moments, False), (None, False)]
