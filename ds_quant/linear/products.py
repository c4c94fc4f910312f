"""One product of a linear layer in floating point, of operands that are quantized or not; see `simulated`."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_quant.kernels.fp8 import ops as fp8_ops
from ds_quant.kernels.simulated import ops as kernels
from ds_quant.linear.fused_outputs import InParts
from ds_quant.linear.outlier_channels import WithOutliers
from ds_quant.numerics.integer import Quantized, integer_values

_NARROW = (torch.bfloat16, torch.float16)
_WITHOUT_FACTORS = (InParts, WithOutliers)
"""Several scales for each row: they are dequantized before they are multiplied."""


class Operand(NamedTuple):
    """One side of a product: a matrix whose dimension `contracted` is summed over.

    `value` is a tensor in the model's dtype, or quantized. `scaled` is False where the scale of a quantized operand
    was folded into the other one.
    """

    value: Tensor | Quantized | WithOutliers | InParts
    contracted: int
    scaled: bool = True

    @property
    def value_device(self) -> torch.device:
        return self.value.codes.device if isinstance(self.value, Quantized) else self.value.device

    @property
    def scale_is_contracted(self) -> bool:
        if isinstance(self.value, _WITHOUT_FACTORS):
            return True
        if not isinstance(self.value, Quantized) or not self.scaled:
            return False
        # Blocks run along the features, so their scale varies along both dimensions.
        return self.value.granularity in ("block", "column" if self.contracted == 1 else "row")

    def _contracted_last(self, tensor: Tensor) -> Tensor:
        return tensor if self.contracted == 1 else tensor.t()

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[rows, contracted] in dtype, dequantized."""
        if isinstance(self.value, _WITHOUT_FACTORS):
            return self._contracted_last(self.value.dense(dtype))
        value = kernels.dequantize(self.value, dtype) if isinstance(self.value, Quantized) else self.value.to(dtype)
        return self._contracted_last(value)

    def factors(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[rows, contracted]: what is multiplied before any scale is applied. Other dtypes than fp32 must hold it."""
        assert not isinstance(self.value, _WITHOUT_FACTORS)
        if not isinstance(self.value, Quantized):
            value = self.value.to(dtype)
        elif dtype == torch.float32:
            value = integer_values(self.value)
        elif self.value.elements == "integer":
            value = self.value.codes.to(dtype)
        else:
            value = integer_values(self.value).to(dtype)
        return self._contracted_last(value)

    def float8(self) -> Tensor:
        """[rows, contracted]: the codes as floating point of 8 bits."""
        assert isinstance(self.value, Quantized)
        return self._contracted_last(self.value.codes.view(fp8_ops.DTYPES[self.value.elements]))

    def narrow_dtypes(self) -> tuple[torch.dtype, ...]:
        """Dtypes of 16 bits that hold the factors."""
        if isinstance(self.value, Quantized):
            return _NARROW if self.value.zero_point is None else ()
        assert not isinstance(self.value, _WITHOUT_FACTORS)
        return (self.value.dtype,) if self.value.dtype in _NARROW else ()

    def scale(self) -> Tensor | None:
        """fp32 scale of each row, [rows, 1] or one element; None where there is none to apply."""
        if not isinstance(self.value, Quantized) or not self.scaled:
            return None
        return self.value.scale.reshape(-1, 1)

    def flat_scale(self) -> Tensor | None:
        """fp32 scale of each row, [rows] or one element; None where there is none to apply."""
        scale = self.scale()
        return None if scale is None else scale.reshape(-1)


def product(a: Operand, b: Operand, dtype: torch.dtype, bias: Tensor | None = None, *, in_fp8: bool = False) -> Tensor:
    """a [M, K] times the transpose of b [N, K], plus bias [N], rounded once to dtype [M, N].

    in_fp8: two quantized operands are fp8 whose scales may wait, and the device multiplies them as such.
    """
    if in_fp8 and isinstance(a.value, Quantized) and isinstance(b.value, Quantized):
        return fp8_ops.fp8_matmul(a.float8(), b.float8(), a.flat_scale(), b.flat_scale(), bias, dtype)
    quantized = isinstance(a.value, Quantized) or isinstance(b.value, Quantized)
    if not quantized or a.scale_is_contracted or b.scale_is_contracted:
        return F.linear(a.dense(dtype), b.dense(dtype), None if bias is None else bias.to(dtype))
    y = sums(a, b)
    return kernels.finish(y, a.scale(), b.scale(), bias, dtype)


def sums(a: Operand, b: Operand) -> Tensor:
    """fp32 [M, N]: the products of the factors, exact, summed up in fp32."""
    if kernels.multiplies_narrow(a.value_device):
        narrow = [dtype for dtype in a.narrow_dtypes() if dtype in b.narrow_dtypes()]
        if narrow:
            return torch.mm(a.factors(narrow[0]), b.factors(narrow[0]).t(), out_dtype=torch.float32)
    return torch.mm(a.factors(), b.factors().t())
