"""Muon's groups, its own part of a step, and its momentum in few bits; ZeRO's part is in tests/distributed."""

import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
from torch import nn

from ds_quant.config import ConfigError, OptimizerConfig
from ds_quant.numerics.codes import code_map
from ds_quant.optim.adamw import QuantAdamW
from ds_quant.optim.kinds import MUON, check_zero
from ds_quant.optim.muon import QuantMuon
from ds_quant.optim.setup import builder, describe_moments, describe_size, json_hyperparameters
from ds_quant.optim.state import QuantizedState

PARAMS = {
    "lr": 0.1,
    "muon_lr": 0.05,
    "betas": (0.8, 0.9),
    "momentum": 0.7,
    "weight_decay": 0.2,
    "ns_method": "standard",
}


def marked(*shapes):
    """Parameters as DeepSpeed marks them; vectors are AdamW's."""
    made = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for param in made:
        param.use_muon = param.dim() > 1
    return made


def optimizer(params, momentum_buffer=None, exp_avg=None, exp_avg_sq=None, **options):
    return QuantMuon(params, momentum_buffer=momentum_buffer, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, **options)


@pytest.mark.parametrize("with_groups", [False, True])
def test_groups_are_those_of_deepspeed(with_groups):
    params = marked([3, 5], [7], [9, 2], [4, 4, 2], [2])
    params[2].requires_grad = False
    if with_groups:
        own = {"lr": 0.3, "weight_decay": 0.0, "betas": (0.1, 0.2), "momentum": 0.5}
        given = [{"params": params[:2], "name": "first"}, {"params": params[2:], **own}]
    else:
        given = params
    theirs = MuonWithAuxAdam(DeepSpeedEngine._muon_param_groups(given, PARAMS)).param_groups
    ours = optimizer(given, **PARAMS).param_groups
    assert len(ours) == len(theirs) == (4 if with_groups else 2)
    for got, want in zip(ours, theirs, strict=True):
        assert [id(param) for param in got["params"]] == [id(param) for param in want["params"]]
        states = {"momentum_buffer", "exp_avg", "exp_avg_sq"}
        assert {key: value for key, value in got.items() if key not in {"params", *states}} == {
            key: value for key, value in want.items() if key != "params"
        }


def test_defaults_are_those_of_deepspeed():
    ours = optimizer(marked([3, 5], [7])).param_groups
    theirs = MuonWithAuxAdam([{**group, "name": ours[i]["name"]} for i, group in enumerate(bare(ours))]).param_groups
    for got, want in zip(ours, theirs, strict=True):
        assert {key: got[key] for key in want} == want


def bare(groups):
    return [{"params": group["params"], "use_muon": group["use_muon"]} for group in groups]


def test_a_step_applies_the_update_and_adamw():
    matrix, vector = marked([30], [7])
    matrix.use_muon = True
    muon = optimizer([matrix, vector], momentum_buffer={"bits": 8}, exp_avg={"bits": 8}, **PARAMS)
    twin = nn.Parameter(vector.detach().clone())
    adamw = QuantAdamW([twin], 0.1, (0.8, 0.9), 1e-10, 0.2, exp_avg={"bits": 8}, exp_avg_sq=None)
    theirs = matrix.detach().clone()
    for _ in range(3):
        for param in (matrix, vector):
            param.grad = torch.randn_like(param)
        twin.grad = vector.grad.clone()
        theirs.mul_(1 - 0.05 * 0.2).add_(matrix.grad, alpha=-0.05)
        muon.step()
        adamw.step()
    assert torch.equal(matrix, theirs)
    assert torch.equal(vector, twin)
    assert "momentum_buffer" not in muon.state[vector]
    assert "exp_avg" not in muon.state[matrix]


@pytest.mark.parametrize(("bits", "kind"), [(8, "float"), (4, "power")])
def test_momentum_is_within_a_code_of_what_was_put(bits, kind):
    (param,) = marked([50, 41])
    muon = optimizer([param], momentum_buffer={"bits": bits})
    (group,) = muon.param_groups
    muon.momentum_numel[param] = 3000
    muon.begin_momentum(group, param)
    assert not muon.momentum(group, param, torch.bfloat16).any()
    values = torch.randn(3000) * torch.logspace(-3, 3, 3000)
    muon.put_momentum(group, param, values)
    stored = muon.state[param]["momentum_buffer"]
    assert type(stored) is QuantizedState
    assert stored.stored_bytes < 3000 * (bits / 8 + 0.04)
    got = muon.momentum(group, param, torch.float32)
    levels = code_map(kind, bits, signed=True)
    assert stored.blocks.code_map == levels
    for begin in range(0, 3000, stored.blocks.block_size):
        part = slice(begin, begin + stored.blocks.block_size)
        scale = values[part].abs().max()
        fine = 2.0**-3 * values[part].abs() + scale * 2.0**-15 if kind == "float" else scale * 13 / 49
        assert ((got[part] - values[part]).abs() <= fine * (1 + 1e-5)).all()  # a gap between neighbouring codes
    again = optimizer([param], momentum_buffer={"bits": bits})
    again.momentum_numel[param] = 3000
    again.load_state_dict(muon.state_dict())
    assert torch.equal(again.momentum(again.param_groups[0], param, torch.float32), got)


def test_pieces_have_the_bits_of_the_whole(monkeypatch):
    (param,) = marked([37, 41])
    values, found = torch.randn(37, 41).bfloat16(), []
    for length in (1 << 22, 300):
        monkeypatch.setattr("ds_quant.optim.muon.PIECE_ELEMENTS", length)
        muon = optimizer([param], momentum_buffer={"bits": 4})
        muon.begin_momentum(muon.param_groups[0], param)
        muon.put_momentum(muon.param_groups[0], param, values)
        found.append(
            (muon.state[param]["momentum_buffer"].blocks, muon.momentum(*muon.param_groups, param, values.dtype))
        )
    (whole, read), (pieces, read_again) = found
    assert torch.equal(whole.codes, pieces.codes)
    assert torch.equal(whole.scale, pieces.scale)
    assert torch.equal(read, read_again)


def test_rounding_depends_on_parameter_step_and_rank():
    first, second = marked([64, 64], [64, 64])
    muon = optimizer([first, second], momentum_buffer={"bits": 4})
    (group,) = muon.param_groups
    values = torch.randn(64 * 64)
    for param in (first, second):
        muon.begin_momentum(group, param)

    def rounded(param):
        muon.put_momentum(group, param, values)
        return muon.momentum(group, param, torch.float32)

    base = rounded(first)
    assert torch.equal(rounded(first), base)
    assert not torch.equal(rounded(second), base)
    muon.rank = 1
    assert not torch.equal(rounded(first), base)
    muon.rank = 0
    first.grad = torch.zeros_like(first)
    muon.step()
    assert not torch.equal(rounded(first), base)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"zero_optimization": {"stage": 0}}, r"zero_optimization.stage: got 0; allowed: 1, 2 or 3 with Muon"),
        ({}, r"zero_optimization.stage: got 0"),
        ({"zero_optimization": {"stage": 3}}, r"zero_optimization.reduce_scatter: got true; allowed: false"),
        ({"zero_optimization": {"stage": 1}, "fp16": {"enabled": True}}, r"fp16.enabled: got true; allowed: false"),
        (
            {"zero_optimization": {"stage": 1, "save_muon_momentum_buffer_in_memory": True}},
            r"save_muon_momentum_buffer_in_memory: got true",
        ),
    ],
)
def test_places_without_whole_matrices_are_refused(raw, message):
    with pytest.raises(ConfigError, match=message):
        check_zero(raw, MUON)


def test_places_with_whole_matrices_are_not():
    check_zero({"zero_optimization": {"stage": 3, "reduce_scatter": False}, "fp16": {"enabled": "auto"}}, MUON)


def test_parameters_are_refused():
    unmarked = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(ConfigError, match=r"a parameter of shape \[3, 3\] without use_muon"):
        optimizer([unmarked])
    with pytest.raises(ConfigError, match=r"momentum_buffer: got .a model without a matrix"):
        optimizer(marked([3]), momentum_buffer={"bits": 8})
    (expert,) = marked([3, 3])
    expert.allreduce = False
    with pytest.raises(ConfigError, match="Muon for the experts"):
        optimizer([expert])
    with pytest.raises(ConfigError, match=r"QuantMuon\(ns_method\): got \"qr\"; allowed: gram or standard"):
        optimizer(marked([3, 3]), ns_method="qr")
    with pytest.raises(ConfigError, match=r"QuantMuon\(momentum\): got 1.0"):
        optimizer(marked([3, 3]), momentum=1.0)


def test_the_json_is_read():
    raw = {"optimizer": {"type": "muon", "params": {"muon_lr": 0.05, "betas": [0.8, 0.9], "per_head_muon": True}}}
    hyperparameters = json_hyperparameters(raw)
    assert hyperparameters == {"muon_lr": 0.05, "betas": (0.8, 0.9)}
    config = OptimizerConfig.parse({"momentum_buffer": {"bits": 4}, "exp_avg": {"bits": 8}})
    made = builder(config, hyperparameters, MUON)(marked([3, 5], [7]))
    assert [group["lr"] for group in made.param_groups] == [0.05, 3e-4]
    assert describe_moments(config, MUON).startswith(
        "momentum_buffer 4-bit power per block of 128, stochastic; exp_avg"
    )
    assert describe_size(config, MUON) == (
        "0.53 bytes a parameter of Muon's instead of those of two gradients, 5.02 bytes a parameter of AdamW's instead "
        "of 8"
    )
    assert "momentum_buffer in the dtype of gradients" in describe_moments(
        OptimizerConfig.parse({"exp_avg": {"bits": 8}}), MUON
    )
