"""docs/extending.md, followed: its examples are taken from the page and run."""

import copy
import importlib
import json
import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import ROOT
from torch import nn

import ds_quant
from ds_quant.base.code_maps import MAP_BITS
from ds_quant.base.errors import ConfigError
from ds_quant.config import MomentConfig, QuantConfig
from ds_quant.numerics import adam
from ds_quant.numerics.blockwise import quantize_blockwise
from ds_quant.numerics.codes import KINDS, code_map, code_values
from ds_quant.numerics.random import derive_key, fold_key
from ds_quant.optim import QuantAdamW, QuantizedState

MOMENT = {"bits": 6, "map": "square", "block_size": 64}


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Imports an example by its title."""
    text = (ROOT / "docs" / "extending.md").read_text()
    names = re.findall(r'```python title="(\w+)\.py"\n(.*?)```', text, flags=re.DOTALL)
    assert len(names) == 3
    for name, code in names:
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module
    for name, _ in names:
        sys.modules.pop(name, None)


@pytest.fixture
def square(page):
    page("square_map")
    yield
    del KINDS["square"], MAP_BITS["square"]


def parameters(rng, *shapes):
    made = [nn.Parameter(torch.from_numpy(rng.normal(size=shape)).float()) for shape in shapes]
    for param in made:
        param.grad = torch.from_numpy(rng.normal(size=param.shape)).float()
    return made


def test_a_map_is_a_value_of_the_json(square):
    parsed = MomentConfig.parse({"bits": 6})
    assert (parsed.map, parsed.bits) == ("square", 6)
    moments = QuantConfig.model_json_schema()["$defs"]["MomentConfig"]["properties"]
    assert "square" in moments["map"]["enum"]
    assert 6 in moments["bits"]["enum"]
    for wrong, message in (
        (
            {"bits": 8, "map": "square"},
            r'map: got "square"; allowed: "float", "power", "linear", "dynamic" with 8 bits',
        ),
        ({"bits": 5}, "bits: got 5; allowed: 4, 6 or 8"),
    ):
        with pytest.raises(ConfigError, match=message):
            MomentConfig.parse(wrong)


def test_without_it_nobody_knows_the_map():
    with pytest.raises(ConfigError, match=r'bits: got 6; allowed: 4 or 8; .*\n.*map: got "square"; allowed: "float"'):
        MomentConfig.parse(MOMENT)
    assert "square" not in QuantConfig.model_json_schema()["$defs"]["MomentConfig"]["properties"]["map"]["enum"]


def test_a_map_steps_as_the_definition_says(square, rng):
    params = parameters(rng, (7, 31), (3,), (64, 2), (0,))
    optimizer = QuantAdamW(params, lr=0.1, exp_avg=MOMENT, exp_avg_sq=MOMENT)
    expected = []
    for param in params:
        zeros = [
            quantize_blockwise(torch.zeros(param.numel()), code_map("square", 6, signed=signed), block_size=64)
            for signed in (True, False)
        ]
        expected.append((param.detach().clone().reshape(-1), *zeros))
    for step in (1, 2, 3):
        scalars = adam.adamw_scalars(0.1, (0.9, 0.999), 1e-8, 1e-2, step)
        key = fold_key(0, step)
        for number, param in enumerate(params):
            keys = [derive_key(key, 2 * number + which) for which in (0, 1)]
            expected[number] = adam.adamw_step(
                expected[number][0], param.grad.reshape(-1), *expected[number][1:], scalars, *keys
            )
        optimizer.step()
    for param, (wanted, first, second) in zip(params, expected, strict=True):
        assert torch.equal(param.detach().reshape(-1), wanted)
        for name, blocks in (("exp_avg", first), ("exp_avg_sq", second)):
            state = optimizer.state[param][name]
            assert torch.equal(state.blocks.codes, blocks.codes)
            assert torch.equal(state.blocks.scale, blocks.scale)
    # 3 blocks of 64 elements, and 25 in planes of 4 and 2 bits.
    assert optimizer.state[params[0]]["exp_avg"].blocks.codes.nbytes == 3 * 48 + 13 + 7


def test_a_state_under_a_map_is_a_tensor_like_any_other(square, rng, tmp_path):
    kind = code_map("square", 6, signed=True)
    assert torch.equal(code_values(kind), code_values(kind).sort().values)
    values = torch.from_numpy(rng.normal(size=(5, 67))).float()
    state = QuantizedState.quantize(values, kind, 64)
    assert torch.equal(QuantizedState.quantize(state.dequantize(), kind, 64).blocks.codes, state.blocks.codes)
    before = state.dequantize()
    state[2].fill_(0.0)
    assert (state.dequantize()[2] == 0).all()
    assert torch.equal(state.dequantize()[4, 10:], before[4, 10:])
    torch.save({"state": state, "copy": copy.deepcopy(state)}, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    for one in loaded.values():
        assert torch.equal(one.blocks.codes, state.blocks.codes)
        assert one.blocks.code_map == kind
    reader = f"import torch; torch.load({str(tmp_path / 'state.pt')!r}, weights_only=False)"
    run = subprocess.run(
        [sys.executable, "-c", f"import ds_quant.optim.state; {reader}"], capture_output=True, text=True, timeout=600
    )
    assert 'got "a state with the map square"; allowed: float, power, linear, dynamic' in run.stderr


def test_an_engine_trains_and_resumes_with_the_map(square, single_rank, tmp_path):
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": 1, "ds_quant_required": True},
        "ds_quant": {"optimizer": {"exp_avg": MOMENT, "exp_avg_sq": MOMENT}},
    }

    def start():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 31), nn.GELU(), nn.Linear(31, 8))
        return ds_quant.initialize(model=model, model_parameters=model.parameters(), config=config)[0]

    def train(engine, steps):
        losses = []
        for step in steps:
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
            loss = engine(x).square().mean()
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        return losses

    engine = start()
    first = train(engine, range(4))
    engine.save_checkpoint(tmp_path)
    rest = train(engine, range(4, 8))
    assert first[-1] < first[0]
    again = start()
    again.load_checkpoint(tmp_path)
    assert train(again, range(4, 8)) == rest
    state = next(iter(again.basic_optimizer.state.values()))
    assert state["exp_avg"].blocks.code_map.name == "square"


def test_a_backend_serves_where_it_is_chosen(page, tmp_path):
    program = """
        import json, os, torch, steps_in_torch
        from ds_quant.kernels.adamw import ops
        from ds_quant.optim import QuantAdamW
        served = []
        for choice in ("", "slow"):
            os.environ["DS_QUANT_KERNELS"] = choice
            param = torch.nn.Parameter(torch.linspace(-1, 1, 300))
            param.grad = param.detach().clone()
            optimizer = QuantAdamW([param], exp_avg={"bits": 8}, exp_avg_sq={"bits": 8})
            optimizer.step()
            served.append([ops.adamw_.implementation("cpu"), param.sum().item()])
        print(json.dumps(served))
    """
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": path},
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr
    (usual, total), (chosen, same) = json.loads(run.stdout)
    assert chosen == "cpu: steps_in_torch"
    assert usual != chosen
    assert total == same


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_an_optimizer_of_a_screens_length(page, rng, bits):
    momentum = page("momentum").Momentum
    params = parameters(rng, (9, 40), (5,))
    others = [nn.Parameter(param.detach().clone()) for param in params]
    stored = None if bits is None else {"bits": bits, "block_size": 64}
    ours = momentum(params, lr=0.01, momentum_buffer=stored)
    theirs = torch.optim.SGD(others, lr=0.01, momentum=0.9)
    largest = 0.0
    for _ in range(5):
        for param, other in zip(params, others, strict=True):
            param.grad = torch.from_numpy(rng.normal(size=param.shape)).float()
            other.grad = param.grad.clone()
        ours.step()
        theirs.step()
        if bits is not None:
            largest = max(
                largest, *(ours.state[param]["momentum_buffer"].blocks.scale.max().item() for param in params)
            )
    for param, other in zip(params, others, strict=True):
        if bits is None:
            torch.testing.assert_close(param, other)
            continue
        state = ours.state[param]["momentum_buffer"]
        assert (type(state), state.blocks.code_map.bits) == (QuantizedState, bits)
        # A step rounds the buffer by less than a gap of the map times the scale; what is lost fades by 0.9 a step, and
        # moves the parameter by lr each time: after five steps by 0.9 + 1.71 + 2.44 + 3.1 of it.
        gap = code_values(state.blocks.code_map).sort().values.diff().max().item()
        assert (param - other).abs().max() < 0.01 * 8.2 * gap * largest
        assert not torch.equal(param, other)
    again = momentum(params, lr=0.5, momentum_buffer=stored)
    again.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert again.param_groups[0]["lr"] == 0.01
    for param in params:
        assert torch.equal(again.state[param]["momentum_buffer"], ours.state[param]["momentum_buffer"])
    with pytest.raises(ConfigError, match=r"Momentum\(momentum_buffer\)\.bits: got 3; allowed: 4 or 8"):
        momentum(params, lr=0.1, momentum_buffer={"bits": 3})
