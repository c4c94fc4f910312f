"""`ds_quant.linear`: how the operands of linear layers are quantized."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ds_quant.config.deepspeed_json import SECTION
from ds_quant.config.section import Allowed, BlockSection, Rule, Section, allowed_values
from ds_quant.config.values import (
    Bits,
    ClassNames,
    LinearBlock,
    Patterns,
    Rounding,
    nothing,
)


class WeightConfig(BlockSection):
    """How the weight of a linear is quantized."""

    where: ClassVar[str] = f"{SECTION}.linear.weight"

    bits: Bits
    """Bits of a code, 2 to 8. Required."""
    granularity: Literal["tensor", "channel", "block"] = "channel"
    """What shares a scale: the tensor, an output feature, or `block_size` consecutive input features."""
    block_size: LinearBlock = 128
    """Consecutive input features that share a scale; a tail block where it does not divide. For granularity `block`."""
    symmetric: bool = True
    """Codes -(2^(b-1)-1) to 2^(b-1)-1 around zero, or all 2^b levels between minimum and maximum."""
    rounding: Rounding = "nearest"
    """`nearest` (ties to even) or `stochastic`, for weights with backend `simulated` only."""


class ActivationConfig(BlockSection):
    """How the input of a linear is quantized."""

    where: ClassVar[str] = f"{SECTION}.linear.activation"

    bits: Bits
    """Bits of a code, 2 to 8. Required."""
    granularity: Literal["tensor", "token", "channel", "block"] = "token"
    """What shares a scale: the tensor, a row, an input feature, or `block_size` consecutive input features of a row."""
    block_size: LinearBlock = 128
    """Consecutive input features that share a scale; a tail block where it does not divide. For granularity `block`."""
    symmetric: bool = True
    """Symmetric codes around zero (see `range`), or all 2^b levels between minimum and maximum."""
    range: Literal["narrow", "full"] = "narrow"
    """Of symmetric codes: `narrow`, -(2^(b-1)-1) to 2^(b-1)-1 with a scale of absmax / (2^(b-1)-1); or `full`, all 2^b
    codes from -2^(b-1) on with a scale of absmax / ((2^b-1)/2), as servers of compressed-tensors quantize."""
    rounding: Rounding = "nearest"
    """`nearest` (ties to even) or `stochastic`."""

    def rules(self) -> Iterator[Rule]:
        yield from super().rules()
        if self.range == "full" and not self.symmetric:
            reason = '"narrow" with symmetric false: asymmetric codes use all 2^b levels anyway'
            yield "range", "full", reason, "remove it, or set symmetric to true"


class GradientConfig(Section):
    """How the output gradient of a linear is quantized in its backward products."""

    where: ClassVar[str] = f"{SECTION}.linear.gradient"

    bits: Bits
    """Bits of a code, 2 to 8. Required."""
    granularity: Literal["tensor", "token", "channel", "outer"] = "outer"
    """What shares a scale: the tensor, a row, an output feature, or (`outer`) a row for the input gradient and an
    output feature for the weight gradient, after the other operand's scale is folded in."""
    used_for: Annotated[
        tuple[Literal["weight", "input"], ...],
        Field(strict=False),
        Allowed('a list of "weight", "input" or both, each once'),
    ] = ("weight", "input")
    """Which backward products see the quantized gradient; the others get the original."""
    symmetric: bool = True
    """Codes -(2^(b-1)-1) to 2^(b-1)-1 around zero, or all 2^b levels between minimum and maximum."""
    rounding: Rounding = "nearest"
    """`nearest` (ties to even) or `stochastic`."""

    def rules(self) -> Iterator[Rule]:
        if not self.used_for or len(set(self.used_for)) < len(self.used_for):
            fix = 'list each product once, or leave "gradient" out to quantize none'
            yield "used_for", list(self.used_for), allowed_values(GradientConfig, "used_for"), fix


class LinearConfig(Section):
    """Which operands of the linears are quantized, how, and in which modules."""

    where: ClassVar[str] = f"{SECTION}.linear"

    weight: WeightConfig | None = None
    """Absent: weights are not quantized."""
    activation: ActivationConfig | None = None
    """Absent: inputs are not quantized."""
    gradient: GradientConfig | None = None
    """Absent: output gradients are not quantized."""
    backend: Literal["simulated", "int8"] = "simulated"
    """`int8` runs the products on integer units; `simulated` computes the same function in floating point."""
    backward_operands: Literal["quantized", "original"] = "quantized"
    """Whether the backward products use the quantized input and weight, or the originals."""
    include: Patterns = ("*",)
    """Shell patterns on module names (`*` crosses dots): what is quantized. Default all linears."""
    include_classes: ClassNames = ()
    """Subclasses of nn.Linear or Conv1D with a forward of their own that computes what these do, by class name or
    dotted path: they are quantized, too."""
    exclude: Patterns | None = None
    """Shell patterns on module names: what is not. Null (default): the model's output heads. `[]`: nothing."""

    def rules(self) -> Iterator[Rule]:
        if not (self.weight or self.activation or self.gradient):
            yield nothing(self, "weight, activation or gradient")
        if not self.include:
            yield "include", [], "a list of shell patterns, at least one", 'remove it for ["*"], or remove the section'
        yield from self._folding_rules()
        if self.backend == "int8":
            yield from self._int8_rules()

    def _folding_rules(self) -> Iterator[Rule]:
        if self.backward_operands == "original" or not self.gradient or self.gradient.granularity != "outer":
            return
        fix = 'set gradient.granularity to "token" or "channel", or backward_operands to "original"'
        if "input" in self.gradient.used_for and self.weight and self.weight.granularity == "block":
            reason = '"tensor" or "channel": a gradient of granularity "outer" cannot fold a scale per block'
            yield "weight.granularity", "block", reason, fix
        granularity = self.activation.granularity if self.activation else "token"
        if "weight" in self.gradient.used_for and granularity in ("block", "channel"):
            reason = f'"tensor" or "token": a gradient of granularity "outer" cannot fold a scale per {granularity}'
            yield "activation.granularity", granularity, reason, fix

    def _int8_rules(self) -> Iterator[Rule]:
        fix = 'use that, or backend "simulated"'
        operands = {"weight": ("channel", "tensor"), "activation": ("token", "tensor"), "gradient": ("outer", "tensor")}
        for name, granularities in operands.items():
            operand = getattr(self, name)
            if operand and not operand.symmetric:
                reason = 'true with backend "int8": a zero point has no place in an integer product'
                yield f"{name}.symmetric", False, reason, fix
            if operand and operand.granularity not in granularities:
                words = " or ".join(f'"{granularity}"' for granularity in granularities)
                reason = f'{words} with backend "int8": any other scale lies on a contraction axis'
                yield f"{name}.granularity", operand.granularity, reason, fix
        yield from self._int8_gradient_rules()
        if self.weight and self.weight.rounding == "stochastic":
            reason = '"nearest" with backend "int8": forward and backward must find the same codes'
            yield "weight.rounding", "stochastic", reason, fix

    def _int8_gradient_rules(self) -> Iterator[Rule]:
        """A gradient with one scale folds none in, so that the other operand's would lie on the contraction axis."""
        gradient = self.gradient
        if not gradient or gradient.granularity != "tensor" or self.backward_operands == "original":
            return
        others = {"input": ("weight", self.weight), "weight": ("activation", self.activation)}
        for product, (name, other) in others.items():
            if product in gradient.used_for and other and other.granularity in ("channel", "token"):
                allowed = f'"outer" with backend "int8" and {name}.granularity "{other.granularity}"'
                fix = f'use that, or {name}.granularity "tensor", or backend "simulated"'
                yield "gradient.granularity", "tensor", allowed, fix
