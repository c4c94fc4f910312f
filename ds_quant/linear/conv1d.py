"""GPT-2's linear layer, quantized. In a file of its own because only this one needs transformers."""

from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ds_quant.config import LinearConfig
from ds_quant.linear.modules import QuantizedModule
from ds_quant.linear.step_key import StepKey


class QuantConv1D(QuantizedModule, Conv1D):
    """transformers' Conv1D with quantized products; its weight keeps the (in, out) layout.

    Args:
        nf: number of output features.
        nx: number of input features.
        config: what to quantize; `ds_quant.QuantConfig.load(...).linear` or the JSON object.
    """

    transposed = True

    def __init__(self, nf: int, nx: int, *, config: LinearConfig | dict[str, Any]):
        super().__init__(nf, nx)
        self.configure_quantization(LinearConfig.parse(config), StepKey(torch.initial_seed()))

    def forward(self, x: Tensor) -> Tensor:
        return self.quantized_forward(x)
