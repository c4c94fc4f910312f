"""GPT-2's linear layer, quantized. In a file of its own because only this one needs transformers."""

from typing import Any

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ds_quant.config import LinearConfig
from ds_quant.linear.modules import QuantizedModule


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
        self.configure_alone(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.quantized_forward(x)
