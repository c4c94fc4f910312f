import pytest
import torch

from ds_quant.base.errors import ConfigError
from ds_quant.kernels import wire
from ds_quant.kernels.adamw.ops import adamw_
from ds_quant.kernels.choice import check_choice


@pytest.mark.parametrize("value", ["", "reference", "triton", "compiled"])
def test_what_may_be_chosen(value):
    check_choice(value)


@pytest.mark.parametrize("value", ["Reference", "cpp", "1"])
def test_anything_else_is_refused_wherever_it_is_read(monkeypatch, value):
    monkeypatch.setenv("DS_QUANT_KERNELS", value)
    message = f'DS_QUANT_KERNELS: got "{value}"; allowed: reference or triton or compiled; fix: correct it'
    with pytest.raises(ConfigError, match=message):
        adamw_.implementation("cpu")
    with pytest.raises(ConfigError, match=message):
        wire.quantize.on(torch.device("cpu"))
