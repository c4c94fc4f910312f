"""`ds_quant.linear`: which operands of linear layers are quantized, where, and what multiplies them."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from ds_quant.base.number_formats import MS_EDEN
from ds_quant.config.deepspeed_json import SECTION
from ds_quant.config.operands import ActivationConfig, GradientConfig, WeightConfig
from ds_quant.config.section import NOTHING, Allowed, Rule, Section, allowed_values
from ds_quant.config.values import ClassNames, Patterns, exact_int, nothing

_OTHER_BACKEND = 'use that, or backend "simulated"'
_FREE_SCALES = {"weight": ("channel", "tensor"), "activation": ("token", "tensor"), "gradient": ("outer", "tensor")}
"""Granularities of which no product contracts what has scales of its own."""
_PRODUCTS = {"output": "Y", "input": "dX", "weight": "dW"}


class RotationConfig(Section):
    """A randomized Hadamard rotation of both operands of a product, along what it contracts, before they are quantized.

    It spreads outliers over a block and cancels in the product. An operand that is not quantized is rotated, too.
    """

    where: ClassVar[str] = f"{SECTION}.linear.rotation"

    block_size: Annotated[Literal[16, 32, 64, 128], BeforeValidator(exact_int), Allowed("16, 32, 64 or 128")] = 16
    """Consecutive elements that are rotated together; a tail is rotated in parts."""
    used_for: Annotated[
        tuple[Literal["output", "input", "weight"], ...] | None,
        Field(strict=False),
        Allowed('a list of "output", "input", "weight" or some of them, each once'),
    ] = None
    """Products whose operands are rotated: the output, the input gradient, the weight gradient; each with at least one
    operand that is quantized. Null (default): all whose two operands are quantized."""
    signs: Literal["fixed", "drawn"] = "fixed"
    """Of the matrix: the same for all products, steps and ranks, or `drawn` for each product and call."""

    def rules(self) -> Iterator[Rule]:
        if self.used_for is not None and (not self.used_for or len(set(self.used_for)) < len(self.used_for)):
            fix = "list each product once, or remove the key for all"
            yield "used_for", list(self.used_for), allowed_values(RotationConfig, "used_for"), fix


class ExcludeBlocksConfig(Section):
    """Blocks at the ends of a model whose layers stay in full precision: shares of their number, rounded up."""

    where: ClassVar[str] = f"{SECTION}.linear.exclude_blocks"

    first: Annotated[float, Field(ge=0, lt=1), Allowed("a number from 0 on and below 1")] = 0.0
    """Share of the blocks, from the input on."""
    last: Annotated[float, Field(ge=0, lt=1), Allowed("a number from 0 on and below 1")] = 0.0
    """Share of the blocks, up to the output."""

    def rules(self) -> Iterator[Rule]:
        if not 0 < self.first + self.last < 1:
            yield "", self.model_dump(), "first and last of more than 0 and less than 1 together", "change them"


class LinearConfig(Section):
    """Which operands of the linears are quantized, how, and in which modules."""

    where: ClassVar[str] = f"{SECTION}.linear"

    weight: WeightConfig | None = None
    """Absent: weights are not quantized."""
    activation: ActivationConfig | None = None
    """Absent: inputs are not quantized."""
    gradient: GradientConfig | None = None
    """Absent: output gradients are not quantized."""
    backend: Literal["simulated", "int8", "fp8"] = "simulated"
    """`int8` runs the products on integer units, `fp8` on units for 8-bit floating point, where the device has them;
    `simulated` computes the same functions in floating point."""
    backward_operands: Literal["quantized", "original"] = "quantized"
    """Whether the backward products use the quantized input and weight, or the originals."""
    rotation: RotationConfig | None = None
    """With backend `simulated`: operands are rotated before they are quantized. Absent: they are not."""
    include: Patterns = ("*",)
    """Shell patterns on module names (`*` crosses dots): what is quantized. Default all linears."""
    include_classes: ClassNames = ()
    """Subclasses of nn.Linear or Conv1D with a forward of their own that computes what these do, by class name or
    dotted path: they are quantized, too."""
    exclude: Patterns | None = None
    """Shell patterns on module names: what is not. Null (default): the model's output heads. `[]`: nothing."""
    exclude_blocks: ExcludeBlocksConfig | None = None
    """Which blocks are not, by depth. Absent: none."""
    forward_full_precision_from: (
        Annotated[
            int,
            Field(ge=1),
            Allowed(
                "an integer, 1 or more: a step (of a share: the share times all steps, which DeepSpeed cannot know)"
            ),
        ]
        | None
    ) = None
    """So many optimizer steps see `weight` and `activation`; those after it compute as if the two were absent, forward
    and backward, with `gradient` as before. Absent: all steps see them."""

    def rules(self) -> Iterator[Rule]:
        if not (self.weight or self.activation or self.gradient):
            yield nothing(self, "weight, activation or gradient")
        if not self.include:
            yield "include", [], "a list of shell patterns, at least one", 'remove it for ["*"], or remove the section'
        yield from self._mean_rules()
        if self.activation and self.activation.outlier_share is not None:
            yield from self._outlier_rules(self.activation.outlier_share)
        if self.rotation:
            yield from self._rotation_rules(self.rotation)
        yield from self._folding_rules()
        if self.gradient and self.gradient.rounding == MS_EDEN:
            yield from self._eden_rules(self.gradient)
        if self.gradient and self.gradient.split_qkv:
            yield from self._fused_rules(self.gradient)
        if self.forward_full_precision_from is not None:
            yield from self._full_precision_rules(self.forward_full_precision_from)
        if self.backend == "int8":
            yield from self._int8_rules()
        elif self.backend == "fp8":
            yield from self._fp8_rules()

    def _mean_rules(self) -> Iterator[Rule]:
        for name, operand in (("activation", self.activation), ("gradient", self.gradient)):
            if operand and operand.split_mean and self.backend != "simulated":
                fix = 'remove it, or use backend "simulated"'
                yield f"{name}.split_mean", True, f'false with backend "{self.backend}"', fix
        if not (self.gradient and self.gradient.split_mean):
            return
        if self.backward_operands == "original":
            allowed = 'false with backward_operands "original"'
            yield "gradient.split_mean", True, allowed, "remove one of the two"
        elif "weight" in self.gradient.used_for and not (self.activation and self.activation.split_mean):
            allowed = "with activation.split_mean as well: the weight gradient needs both means"
            yield "gradient.split_mean", True, allowed, 'add that, or set gradient.used_for to ["input"]'

    def _outlier_rules(self, share: float) -> Iterator[Rule]:
        if self.backend != "simulated":
            fix = 'remove it, or use backend "simulated"'
            yield "activation.outlier_share", share, f'absent with backend "{self.backend}"', fix
        mixed = [name for product, name in (("Y", "output"), ("dW", "weight")) if product in self.rotated_products()]
        if mixed:
            allowed = f"absent with a rotation for {', '.join(mixed)}, which spreads the features over each other"
            fix = 'remove one of the two, or set rotation.used_for to ["input"]'
            yield "activation.outlier_share", share, allowed, fix

    def _full_precision_rules(self, step: int) -> Iterator[Rule]:
        if not (self.weight or self.activation):
            allowed = "absent without weight and activation: the forward is in full precision from the first step on"
            yield "forward_full_precision_from", step, allowed, "remove it"
        if self.gradient and self.gradient.split_mean and "weight" in self.gradient.used_for:
            allowed = "false with forward_full_precision_from, which takes the other mean away from the weight gradient"
            yield "gradient.split_mean", True, allowed, 'remove one of the two, or set gradient.used_for to ["input"]'

    def rotated_products(self) -> tuple[str, ...]:
        """Those of ("Y", "dX", "dW") whose operands are rotated."""
        if not self.rotation:
            return ()
        found = self._products_with(2) if self.rotation.used_for is None else self.rotation.used_for
        return tuple(name for product, name in _PRODUCTS.items() if product in found)

    def _products_with(self, count: int) -> list[str]:
        """The products that have `count` quantized operands or more."""
        gradients = self.gradient.used_for if self.gradient else ()
        backward = self.backward_operands == "quantized"
        found = {
            "output": (bool(self.weight), bool(self.activation)),
            "input": ("input" in gradients, bool(self.weight) and backward),
            "weight": ("weight" in gradients, bool(self.activation) and backward),
        }
        return [name for name, operands in found.items() if sum(operands) >= count]

    def _rotation_rules(self, rotation: RotationConfig) -> Iterator[Rule]:
        if self.backend != "simulated":
            reason = f'absent with backend "{self.backend}", whose products share their operands'
            yield "rotation", rotation, reason, 'remove it, or use backend "simulated"'
        if self.weight and "Y" in self.rotated_products():
            for key in ("trust_distance", "dampening", "oscillation_reset"):
                if (value := getattr(self.weight, key)) is not None:
                    allowed = "absent with a rotated output, whose codes are of mixed weights"
                    yield f"weight.{key}", value, allowed, 'remove it, or leave "output" out of rotation.used_for'
        quantized = self._products_with(1)
        if rotation.used_for is None and not self._products_with(2):
            allowed = f"with products that quantize one operand alone, a list of some of them: {', '.join(quantized)}"
            yield "rotation.used_for", None, allowed, "write it, or remove rotation"
        elif not set(rotation.used_for or ()) <= set(quantized):
            allowed = f"products with an operand that is quantized ({', '.join(quantized)})"
            yield "rotation.used_for", list(rotation.used_for or ()), allowed, "take out the others, or quantize more"
        rotated = self.rotated_products()
        mixed = "whose scales lie on an axis that rotation mixes"
        if "Y" in rotated and self.activation and self.activation.granularity == "channel":
            allowed = f'"tensor", "token" or "block" with a rotated output, not one {mixed}'
            yield "activation.granularity", "channel", allowed, "use one of them, or leave the output out of rotation"
        for product, name, granularity in (("dX", "input", "channel"), ("dW", "weight", "token")):
            used = product in rotated and self.gradient and name in self.gradient.used_for
            if used and self.gradient and self.gradient.granularity == granularity:
                allowed = f'"outer", "tensor" or "block" with a rotated {name} gradient, not one {mixed}'
                fix = f'use one of them, or leave "{name}" out of rotation'
                yield "gradient.granularity", granularity, allowed, fix

    def _eden_rules(self, gradient: GradientConfig) -> Iterator[Rule]:
        fix = 'use that, or gradient.rounding "stochastic"'
        rotated = self.rotated_products()
        missing = [name for name in gradient.used_for if _PRODUCTS[name] not in rotated]
        if missing or not self.rotation or self.rotation.signs != "drawn":
            names = ", ".join(gradient.used_for)
            allowed = f'with rotation.signs "drawn" and a rotation for {names}: else nothing makes it unbiased'
            yield "gradient.rounding", MS_EDEN, allowed, fix
        elif gradient.granularity == "block" and gradient.block_size > self.rotation.block_size:
            allowed = f'at most rotation.block_size, {self.rotation.block_size}, with rounding "{MS_EDEN}"'
            yield "gradient.block_size", gradient.block_size, allowed, "use that, or larger blocks of the rotation"
        if self.forward_full_precision_from is not None:
            allowed = '"nearest" or "stochastic" with forward_full_precision_from, which ends all rotation'
            yield "gradient.rounding", MS_EDEN, allowed, "use one of them, or remove forward_full_precision_from"

    def _fused_rules(self, gradient: GradientConfig) -> Iterator[Rule]:
        got = list(gradient.split_qkv)
        if self.backend != "simulated":
            fix = 'remove it, or use backend "simulated"'
            yield "gradient.split_qkv", got, f'absent with backend "{self.backend}"', fix
        mixed = [name for name in gradient.used_for if _PRODUCTS[name] in self.rotated_products()]
        if mixed:
            allowed = f"absent with a rotation for {', '.join(mixed)}"
            yield "gradient.split_qkv", got, allowed, "remove one of the two"

    def _folding_rules(self) -> Iterator[Rule]:
        if self.backward_operands == "original" or not self.gradient or self.gradient.granularity != "outer":
            return
        fix = 'set gradient.granularity to "token" or "channel", or backward_operands to "original"'
        rotated = self.rotated_products()  # which fold nothing
        folds = [name for name in self.gradient.used_for if _PRODUCTS[name] not in rotated]
        if "input" in folds and self.weight and self.weight.granularity == "block":
            reason = '"tensor" or "channel": a gradient of granularity "outer" cannot fold a scale per block'
            yield "weight.granularity", "block", reason, fix
        outliers = self.activation and self.activation.outlier_share is not None
        if "weight" in folds and self.activation and outliers and self.backend == "simulated":
            reason = 'absent: a gradient of granularity "outer" cannot fold two scales per token'
            yield "activation.outlier_share", self.activation.outlier_share, reason, fix
        granularity = self.activation.granularity if self.activation else "token"
        if "weight" in folds and granularity in ("block", "channel"):
            reason = f'"tensor" or "token": a gradient of granularity "outer" cannot fold a scale per {granularity}'
            yield "activation.granularity", granularity, reason, fix

    def _int8_rules(self) -> Iterator[Rule]:
        fitting = []
        for name in _FREE_SCALES:
            operand = getattr(self, name)
            if operand and operand.format:
                allowed = 'bits with backend "int8", whose products are of integers'
                yield f"{name}.format", operand.format, allowed, _OTHER_BACKEND
                continue
            if operand and not operand.symmetric:
                reason = 'true with backend "int8": a zero point has no place in an integer product'
                yield f"{name}.symmetric", False, reason, _OTHER_BACKEND
            fitting.append(name)
        yield from self._scale_rules(fitting)
        if self.weight and self.weight.rounding == "stochastic":
            reason = '"nearest" with backend "int8": forward and backward must find the same codes'
            yield "weight.rounding", "stochastic", reason, _OTHER_BACKEND

    def _fp8_rules(self) -> Iterator[Rule]:
        fitting = []
        for name in _FREE_SCALES:
            operand = getattr(self, name)
            formats = ("fp8_e4m3", "fp8_e5m2") if name == "gradient" else ("fp8_e4m3",)
            if operand and operand.format not in formats:
                words = " or ".join(f'"{each}"' for each in formats)
                got = operand.format or NOTHING
                yield f"{name}.format", got, f'{words} with backend "fp8"', _OTHER_BACKEND
                continue
            fitting.append(name)
        yield from self._scale_rules(fitting)

    def _scale_rules(self, names: list[str]) -> Iterator[Rule]:
        """Products on units have their scales applied at their end."""
        for name in names:
            operand = getattr(self, name)
            if operand and operand.granularity not in _FREE_SCALES[name]:
                words = " or ".join(f'"{granularity}"' for granularity in _FREE_SCALES[name])
                reason = f'{words} with backend "{self.backend}": any other scale lies on a contraction axis'
                yield f"{name}.granularity", operand.granularity, reason, _OTHER_BACKEND
        if "gradient" in names:
            yield from self._one_scale_rules()

    def _one_scale_rules(self) -> Iterator[Rule]:
        """A gradient with one scale folds none in, so that the other operand's would lie on the contraction axis."""
        gradient = self.gradient
        if not gradient or gradient.granularity != "tensor" or self.backward_operands == "original":
            return
        others = {"input": ("weight", self.weight), "weight": ("activation", self.activation)}
        for product, (name, other) in others.items():
            if product in gradient.used_for and other and other.granularity in ("channel", "token"):
                allowed = f'"outer" with backend "{self.backend}" and {name}.granularity "{other.granularity}"'
                fix = f'use that, or {name}.granularity "tensor", or backend "simulated"'
                yield "gradient.granularity", "tensor", allowed, fix
