"""What QuantAdamW refuses: arguments, options of groups, parameters."""

import pytest
import torch
from adamw_cases import NONE, moments, parameters, tensor
from torch import nn

from ds_quant.config import ConfigError
from ds_quant.numerics import code_map
from ds_quant.optim import QuantAdamW
from ds_quant.optim.state import QuantizedState


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"QuantAdamW\(lr\): got -1.0; allowed: a number, 0 or more; fix: set it so"),
        ({"lr": float("nan")}, r"QuantAdamW\(lr\): got NaN"),
        ({"lr": "auto"}, r'QuantAdamW\(lr\): got "auto"'),
        ({"lr": torch.ones(2)}, r"QuantAdamW\(lr\): got .*2 elements.*; allowed: one element; fix: pass a number"),
        ({"lr": torch.tensor(-0.5)}, r"QuantAdamW\(lr\): got -0.5; "),
        ({"eps": -1e-8}, r"QuantAdamW\(eps\): got -1e-08; "),
        ({"weight_decay": -0.1}, r"QuantAdamW\(weight_decay\): got -0.1; "),
        ({"betas": (1.0, 0.9)}, r"QuantAdamW\(betas\): got \[1.0, 0.9\]; allowed: two numbers from 0 to below 1; "),
        ({"betas": (0.9, -0.1)}, r"QuantAdamW\(betas\): got \[0.9, -0.1\]; "),
        ({"betas": 0.9}, r"QuantAdamW\(betas\): got 0.9; "),
        ({"betas": (0.9,)}, r"QuantAdamW\(betas\): got \[0.9\]; "),
        ({"betas": ("auto", 0.9)}, r"QuantAdamW\(betas\): got "),
        ({"exp_avg": {"bits": 5}}, r"QuantAdamW\(exp_avg\).bits: got 5; allowed: 4 or 8; fix: "),
        ({"exp_avg": {"bits": "auto"}}, r"QuantAdamW\(exp_avg\).bits: got "),
        ({"exp_avg_sq": {}}, r"QuantAdamW\(exp_avg_sq\).bits: got nothing; "),
        (
            {"exp_avg_sq": {"bits": 8, "blocksize": 64}},
            r"QuantAdamW\(exp_avg_sq\).blocksize: .*did you mean \"block_size\"",
        ),
        ({"exp_avg": 8}, r"QuantAdamW\(exp_avg\): got 8; "),
    ],
)
def test_wrong_arguments_are_refused(options, message, rng):
    with pytest.raises(ConfigError, match=message):
        QuantAdamW(parameters(rng), **{**moments("8/8"), **options})
    # The same in a group, which leaves the optimizer as it was.
    optimizer = QuantAdamW(parameters(rng), **moments("8/8"))
    with pytest.raises(ConfigError, match=message):
        optimizer.add_param_group({"params": parameters(rng), **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("option", ["amsgrad", "maximize", "differentiable"])
def test_groups_that_ask_for_another_function_are_refused(option, rng):
    with pytest.raises(ConfigError, match=rf"QuantAdamW\({option}\): got true; allowed: False; fix: "):
        QuantAdamW([{"params": parameters(rng), option: True}], **NONE)
    QuantAdamW([{"params": parameters(rng), option: False, "bias_correction": True, "fused": True}], **NONE)
    with pytest.raises(ConfigError, match=r"QuantAdamW\(bias_correction\): got false; allowed: True; "):
        QuantAdamW([{"params": parameters(rng), "bias_correction": False}], **NONE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int32, torch.float8_e4m3fn])
def test_parameters_of_other_dtypes_are_refused(dtype, rng):
    param = nn.Parameter(torch.zeros(4).to(dtype), requires_grad=False)
    message = rf"QuantAdamW\(params\): got .*{dtype}.*; allowed: torch.float32, .*; fix: cast the parameter"
    with pytest.raises(ConfigError, match=message):
        QuantAdamW([param], **NONE)
    optimizer = QuantAdamW(parameters(rng), **NONE)
    with pytest.raises(ConfigError, match=message):
        optimizer.add_param_group({"params": [param]})
    assert len(optimizer.param_groups) == 1


def test_parameters_without_plain_memory_are_refused(rng):
    param = QuantizedState.quantize(tensor(rng, 64), code_map("power", 8, signed=True), 32)
    with pytest.raises(
        ConfigError, match=r"QuantAdamW\(params\): got .*class QuantizedState.*; allowed: plain tensors"
    ):
        QuantAdamW([param], **NONE)
