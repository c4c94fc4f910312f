"""What one linear layer quantizes: its configuration in the terms of its three products.

With tokens as rows, X [tokens, in], W [out, in] and the output gradient G [tokens, out]:

    forward   Y  = X W^T + b     contracts `in`
    dX        dX = G W           contracts `out`
    dW        dW = G^T X         contracts `tokens`

Each of X, W and G is quantized or left alone as the configuration says. A scale that does not lie on the contracted
axis commutes with the sum, so that such a product needs the integer values only, and the scales once at its end.

Gradient granularity `outer` keeps every scale off the contracted axis: for dX the scale of W (one per output feature)
is multiplied into G, which is then quantized per token; for dW the scale of X (one per token) is multiplied into G,
which is then quantized per output feature. The other operand then takes part with its integer values alone, and X and
W are quantized once for all three products.

With `backward_operands: original` the backward sees the unquantized X and W, as in the published version of
Chitsaz et al., EMNLP 2024 (arXiv 2407.11722); the bias gradient is always the sum of the unquantized G. Gradients pass
the quantizers of X and W unchanged (straight-through estimator without a clipping mask).

`simulated` and `int8` compute these products; with backend `fp8` it is `simulated`, on the device's units for fp8.
"""

from typing import Any, NamedTuple

from torch import Tensor

from ds_quant.base.number_formats import MS_EDEN
from ds_quant.config import LinearConfig
from ds_quant.config.operands import OperandConfig
from ds_quant.numerics.format import Format, Group, Integers, named_format, quantize_to
from ds_quant.numerics.integer import Quantized, symmetric_levels
from ds_quant.numerics.minifloat import Minifloat
from ds_quant.numerics.random import derive_key

# The four quantizers of one layer draw from streams of their own.
STREAM_WEIGHT, STREAM_ACTIVATION, STREAM_GRAD_INPUT, STREAM_GRAD_WEIGHT = range(4)
NUM_STREAMS = 4

# The JSON's granularities as those of a matrix: W [out, in], X and G [tokens, features].
_WEIGHT = {"tensor": "tensor", "channel": "row", "block": "block"}
_ACTIVATION = {"tensor": "tensor", "token": "row", "channel": "column", "block": "block"}
_GRADIENT = {"tensor": "tensor", "token": "row", "channel": "column", "block": "block"}


class Quantizer(NamedTuple):
    """How one operand is quantized; `fold`: after the other operand's scale was multiplied in.

    `format_name`: of `base.number_formats`, "" for integers; `turned`: of the transposed matrix, whose blocks are
    of consecutive rows. The first fields are those of layers that were pickled by version 0.1.
    """

    bits: int
    granularity: str
    symmetric: bool
    rounding: str
    block_size: int = 128
    fold: bool = False
    full_range: bool = False
    format_name: str = ""
    block_rows: int = 1
    scale_rule: str = "floor"
    turned: bool = False
    split_mean: bool = False
    """Of X and G: the mean of the tokens is taken off first, see `token_means`."""
    outlier_share: float = 0.0
    """Of X: the features that take 8 bits, see `outlier_channels`."""
    trust_distance: float = 0.0
    """Of W, and so is the next: what its gradient loses and gains, see `weight_gradients`."""
    dampening: float = 0.0
    parts: int = 1
    """Of G: how many parts of its features have scales of their own, see `fused_outputs`."""

    @property
    def levels(self) -> float:
        """`symmetric_levels`, which the int8 kernels take."""
        return symmetric_levels(self.bits, full_range=self.full_range)

    @property
    def format(self) -> Format[Integers | Minifloat]:
        """What its codes and scales are."""
        if self.format_name:
            return named_format(
                self.format_name,
                self.granularity,
                self.block_size,
                block_rows=self.block_rows,
                scale_rule=MS_EDEN if self.rounding == MS_EDEN else self.scale_rule,
            )
        elements = Integers(self.bits, self.symmetric, self.full_range)
        return Format(elements, Group(self.granularity, self.block_size))

    def of_rows(self) -> "Quantizer":
        """For a matrix [free, contracted] that is quantized for one product: scales of rows, of blocks, or of all."""
        rows = "row" if self.granularity == "column" else self.granularity
        return self._replace(granularity=rows, fold=False, turned=False)

    def __call__(self, x: Tensor, key: Tensor | None, stream: int) -> Quantized:
        subkey = derive_key(key, stream) if key is not None and self.rounding == "stochastic" else None
        return quantize_to(x, self.format, rounding=self.rounding, key=subkey)


class Codes(NamedTuple):
    """A quantized operand: codes int8 [rows, features], and what its rows or features or all of them share.

    On GPUs in memory that is padded, and in the ways that are needed: see `operands`.
    """

    codes: Tensor | None
    scale: Tensor
    """fp32, flat."""
    turned: Tensor | None = None
    """The codes transposed."""

    def way(self, turned: bool) -> Tensor:
        """The codes in a way in which they were made."""
        found = self.turned if turned else self.codes
        assert found is not None
        return found


class Plan(NamedTuple):
    """What one layer quantizes, in the terms of its three products."""

    weight: Quantizer | None
    activation: Quantizer | None
    grad_input: Quantizer | None
    grad_weight: Quantizer | None
    original_operands: bool
    transposed: bool
    stream: int
    in_fp8: bool = False
    """Products of two quantized operands are products of float8 matrices."""
    rotated: tuple[str, ...] = ()
    """Those of ("Y", "dX", "dW") whose operands are rotated first, see `rotated`."""
    rotation_block: int = 0
    signs_drawn: bool = False
    """Each rotation has signs of its own."""

    @property
    def full_forward(self) -> "Plan":
        """What it becomes once the forward is in full precision: that of a layer which quantizes neither W nor X."""
        return self._replace(weight=None, activation=None, rotated=(), rotation_block=0, signs_drawn=False)

    @property
    def stochastic(self) -> bool:
        quantizers = (self.weight, self.activation, self.grad_input, self.grad_weight)
        return self.signs_drawn or any(q is not None and q.rounding != "nearest" for q in quantizers)

    @property
    def both_quantized(self) -> tuple[str, ...]:
        """Those of ("Y", "dX", "dW") whose two operands are quantized."""
        w, x = bool(self.weight), bool(self.activation)
        backward = not self.original_operands
        found = {
            "Y": w and x,
            "dX": bool(self.grad_input) and w and backward,
            "dW": bool(self.grad_weight) and x and backward,
        }
        return tuple(name for name, both in found.items() if both)


def _elements(operand: OperandConfig) -> dict[str, Any]:
    """The fields of a Quantizer that say what a code is."""
    named = operand.named_format
    if named is None:
        assert operand.bits is not None
        return {"bits": operand.bits}
    return {"bits": named.bits, "format_name": operand.format, "scale_rule": operand.scale_rule or "floor"}


def plan_of(config: LinearConfig, *, transposed: bool, stream: int, parts: int = 1) -> Plan:
    """The plan of a layer whose weight is [in, out] if `transposed`. It draws from `stream` and the next three.

    parts: in how many its output gradient is cut, see `fused_outputs`.
    """
    w, a, g = config.weight, config.activation, config.gradient
    weight = activation = grad_input = grad_weight = None
    if w:
        weight = Quantizer(
            granularity=_WEIGHT[w.granularity],
            symmetric=w.symmetric,
            rounding=w.rounding,
            block_size=w.block_size,
            block_rows=w.block_rows,
            trust_distance=w.trust_distance or 0.0,
            dampening=w.dampening or 0.0,
            **_elements(w),
        )
    if a:
        activation = Quantizer(
            granularity=_ACTIVATION[a.granularity],
            symmetric=a.symmetric,
            rounding=a.rounding,
            block_size=a.block_size,
            full_range=a.range == "full",
            split_mean=a.split_mean,
            outlier_share=a.outlier_share or 0.0,
            **_elements(a),
        )
    if g:
        outer = g.granularity == "outer"
        if "input" in g.used_for:
            rows = "row" if outer else _GRADIENT[g.granularity]
            grad_input = Quantizer(
                granularity=rows,
                symmetric=g.symmetric,
                rounding=g.rounding,
                block_size=g.block_size,
                split_mean=g.split_mean,
                fold=outer,
                parts=parts,
                **_elements(g),
            )
        if "weight" in g.used_for:
            columns = "column" if outer else _GRADIENT[g.granularity]
            grad_weight = Quantizer(
                granularity=columns,
                symmetric=g.symmetric,
                rounding=g.rounding,
                block_size=g.block_size,
                split_mean=g.split_mean,
                fold=outer,
                parts=parts,
                turned=columns == "block",
                **_elements(g),
            )
    original = config.backward_operands == "original"
    plan = Plan(weight, activation, grad_input, grad_weight, original, transposed, stream, config.backend == "fp8")
    if not config.rotation:
        return plan
    return plan._replace(
        rotated=config.rotated_products(),
        rotation_block=config.rotation.block_size,
        signs_drawn=config.rotation.signs == "drawn",
    )
