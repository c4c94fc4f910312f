"""`ds_quant.linear.weight`, `.activation` and `.gradient`: how each operand of linear layers is quantized."""

from collections.abc import Callable, Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from ds_quant.base.number_formats import FORMATS, FOUR_SIX, MS_EDEN, NamedFormat
from ds_quant.config.deepspeed_json import SECTION
from ds_quant.config.section import Allowed, BlockSection, Rule, Section, allowed_values, bits_or_format
from ds_quant.config.values import (
    Bits,
    FormatName,
    GradientRounding,
    LinearBlock,
    Patterns,
    Rounding,
    exact_int,
    not_null,
)

# Null is no value of either, only what their absence is to Python.
_BITS_SCHEMA = WithJsonSchema({"type": "integer", "minimum": 2, "maximum": 8})
_FORMAT_SCHEMA = WithJsonSchema({"type": "string", "enum": list(FORMATS)})


def _granularity(usual: str) -> Callable[[dict[str, Any]], Any]:
    """`block` for formats whose blocks are fixed."""

    def default(data: dict[str, Any]) -> str:
        named = FORMATS.get(data.get("format") or "")
        return "block" if named and named.block_size else usual

    return default


def _block_size(data: dict[str, Any]) -> int:
    named = FORMATS.get(data.get("format") or "")
    return named.block_size if named and named.block_size else 128


class OperandConfig(BlockSection):
    """What the operands have in common: integers of some bits, or a format by its name."""

    null_is_absent: ClassVar[tuple[str, ...]] = ("bits", "format", "scale_rule")

    bits: Annotated[Bits | None, BeforeValidator(not_null), _BITS_SCHEMA] = None
    """Bits of an integer code, 2 to 8. Either this or `format` is required."""
    format: Annotated[FormatName | None, BeforeValidator(not_null), _FORMAT_SCHEMA] = None
    """In place of `bits`, with backend `simulated` (`fp8`: `fp8_e4m3`, of gradients also `fp8_e5m2`): floating point
    of 8, 6 or 4 bits (`fp8_e4m3`, ...) with scales as `granularity` says, or a format with blocks of its own: `mxfp8`,
    `mxfp6`, `mxfp4`, `mxint8` (32 elements, a power of two as scale), `nvfp4`, `nvint4` (16 elements, an fp8 scale and
    one fp32 for the tensor)."""
    scale_rule: Annotated[
        Literal["floor", "up", "four_six"] | None, Allowed('"floor" or "up" (mx...), or "four_six" (nvfp4)')
    ] = None
    """The power of two of a block of `mx...`: `floor` (default), as OCP MX 1.0 has it, where the largest elements may
    saturate; `up`, the smallest one with which none does. Of `nvfp4`, `four_six`: each block takes that one of two
    scales, which make its largest element 4 or 6, that loses less. Absent: 6."""

    @property
    def named_format(self) -> NamedFormat | None:
        """What `format` names."""
        return FORMATS[self.format] if self.format else None

    def rules(self) -> Iterator[Rule]:
        yield from super().rules()
        yield from bits_or_format(self, "an integer from 2 to 8")
        named = self.named_format
        if self.scale_rule == FOUR_SIX:
            if self.format != "nvfp4":
                yield "scale_rule", FOUR_SIX, 'only with format "nvfp4", whose elements lack a 5', "remove it"
        elif self.scale_rule is not None and (named is None or named.scale != "e8m0"):
            allowed = "only with a format whose scales are powers of two (mxfp8, mxfp6, mxfp4, mxint8)"
            yield "scale_rule", self.scale_rule, allowed, "remove it"
        if named is not None:
            yield from self._format_rules(named)

    def _format_rules(self, named: NamedFormat) -> Iterator[Rule]:
        if not getattr(self, "symmetric", True):
            yield "symmetric", False, f'true with format "{self.format}", which has no zero point', "remove it"
        if getattr(self, "range", "narrow") == "full":
            yield "range", "full", f'"narrow" with format "{self.format}"', "remove it, or use bits"
        if not named.block_size:
            return
        granularity = getattr(self, "granularity", "block")
        if granularity != "block":
            allowed = f'"block" with format "{self.format}", whose scales are those of {named.block_size} elements'
            yield "granularity", granularity, allowed, "remove it"
        if "block_size" in self.model_fields_set and getattr(self, "block_size", None) != named.block_size:
            allowed = f'{named.block_size} with format "{self.format}"'
            yield "block_size", getattr(self, "block_size", None), allowed, "remove it"


class OscillationResetConfig(Section):
    """Weights that swing between two codes are set to their code's value every so many steps (OsciReset)."""

    where: ClassVar[str] = f"{SECTION}.linear.weight.oscillation_reset"

    every: Annotated[int, Field(ge=2), Allowed("an integer, 2 or more: steps")] = 200
    """Optimizer steps from one reset to the next."""
    watched_steps: Annotated[int, Field(ge=1), Allowed("an integer, 1 or more: steps")] = 50
    """So many of them, up to the reset, are watched; fewer than `every`."""
    ratio: Annotated[float, Field(gt=1, allow_inf_nan=False), Allowed("a number above 1")] = 16.0
    """Weights are reset whose quantized value has moved so many times as far as they have."""
    first_step: Annotated[int, Field(ge=0), Allowed("an integer, 0 or more: a step")] = 0
    """No reset before this step."""

    def rules(self) -> Iterator[Rule]:
        if self.watched_steps >= self.every:
            allowed = f"fewer than every, {self.every}"
            yield "watched_steps", self.watched_steps, allowed, "lower it, or raise every"


class WeightConfig(OperandConfig):
    """How the weight of a linear is quantized."""

    where: ClassVar[str] = f"{SECTION}.linear.weight"

    granularity: Literal["tensor", "channel", "block"] = Field(default_factory=_granularity("channel"))
    """What shares a scale: the tensor, an output feature, or `block_size` consecutive input features. Default
    `channel`, with a format that has blocks of its own `block`."""
    block_size: LinearBlock = Field(default_factory=_block_size)
    """Consecutive input features that share a scale; a tail block where it does not divide. For granularity `block`."""
    block_rows: Annotated[Literal[1, 16], BeforeValidator(exact_int), Allowed("1 or 16")] = 1
    """Output features that share a scale as well, with format `nvfp4` or `nvint4`: 16 for tiles of 16 x 16."""
    symmetric: bool = True
    """Codes -(2^(b-1)-1) to 2^(b-1)-1 around zero, or all 2^b levels between minimum and maximum."""
    rounding: Rounding = "nearest"
    """`nearest` (ties to even) or `stochastic`, for weights with backend `simulated` only."""
    trust_distance: Annotated[float, Field(gt=0, lt=0.5), Allowed("a number above 0 and below 0.5")] | None = None
    """Weights farther than so many steps between codes from their quantized value get no gradient: those near a
    threshold, which oscillate (QuEST's trust estimator). With integers. Absent: all get theirs."""
    dampening: Annotated[float, Field(gt=0, allow_inf_nan=False), Allowed("a number above 0")] | None = None
    """lambda of lambda * sum (w - Q(w))^2, which is added to the loss by its gradient: weights are pulled to the values
    of their codes (Nagel et al. 2022). Absent: none."""
    oscillation_reset: OscillationResetConfig | None = None
    """Weights that swing between two codes are set to their code's value, at ZeRO stages 0 to 2. Absent: none are."""

    def rules(self) -> Iterator[Rule]:
        yield from super().rules()
        if self.block_rows != 1 and self.format not in ("nvfp4", "nvint4"):
            yield "block_rows", self.block_rows, '1, or 16 with format "nvfp4" or "nvint4"', "remove it"
        for key in ("trust_distance", "dampening", "oscillation_reset"):
            value = getattr(self, key)
            if value is not None and self.rounding == "stochastic":
                allowed = 'absent with rounding "stochastic", whose weights have no code of their own'
                yield key, value, allowed, "remove one of the two"
        if self.trust_distance is not None and self.named_format and self.named_format.elements != "integer":
            allowed = f'absent with format "{self.format}", whose values are not evenly spaced'
            yield "trust_distance", self.trust_distance, allowed, "remove it, or use bits, mxint8 or nvint4"


class ActivationConfig(OperandConfig):
    """How the input of a linear is quantized."""

    where: ClassVar[str] = f"{SECTION}.linear.activation"

    granularity: Literal["tensor", "token", "channel", "block"] = Field(default_factory=_granularity("token"))
    """What shares a scale: the tensor, a row, an input feature, or `block_size` consecutive input features of a row.
    Default `token`, with a format that has blocks of its own `block`."""
    block_size: LinearBlock = Field(default_factory=_block_size)
    """Consecutive input features that share a scale; a tail block where it does not divide. For granularity `block`."""
    symmetric: bool = True
    """Symmetric codes around zero (see `range`), or all 2^b levels between minimum and maximum."""
    range: Literal["narrow", "full"] = "narrow"
    """Of symmetric codes: `narrow`, -(2^(b-1)-1) to 2^(b-1)-1 with a scale of absmax / (2^(b-1)-1); or `full`, all 2^b
    codes from -2^(b-1) on with a scale of absmax / ((2^b-1)/2), as servers of compressed-tensors quantize."""
    rounding: Rounding = "nearest"
    """`nearest` (ties to even) or `stochastic`."""
    split_mean: bool = False
    """Take the mean over tokens off before quantizing, and add its part in full precision (Averis). Backend `simulated`
    only."""
    outlier_share: Annotated[float, Field(gt=0, lt=1), Allowed("a number above 0 and below 1")] | None = None
    """The share of the input features, rounded up, that take 8 bits in place of fewer: those that have the largest
    magnitudes in the call at hand, so that nothing is held or saved. Backend `simulated` only. Absent: none."""

    def rules(self) -> Iterator[Rule]:
        yield from super().rules()
        bits = self.named_format.bits if self.named_format else self.bits
        if self.outlier_share is not None and bits == 8:
            allowed = "absent where all features have 8 bits"
            yield "outlier_share", self.outlier_share, allowed, "remove it, or use fewer bits"
        if self.range == "full" and not self.symmetric:
            reason = '"narrow" with symmetric false: asymmetric codes use all 2^b levels anyway'
            yield "range", "full", reason, "remove it, or set symmetric to true"


class GradientConfig(OperandConfig):
    """How the output gradient of a linear is quantized in its backward products."""

    where: ClassVar[str] = f"{SECTION}.linear.gradient"

    granularity: Literal["tensor", "token", "channel", "outer", "block"] = Field(default_factory=_granularity("outer"))
    """What shares a scale: the tensor, a row, an output feature, or (`outer`) a row for the input gradient and an
    output feature for the weight gradient, after the other operand's scale is folded in; or (`block`) `block_size`
    consecutive elements of what is contracted, which are output features for the input gradient and tokens for the
    weight gradient. A format that has blocks of its own takes only `block`."""
    block_size: LinearBlock = Field(default_factory=_block_size)
    """Consecutive elements that share a scale; a tail block where it does not divide. For granularity `block`."""
    used_for: Annotated[
        tuple[Literal["weight", "input"], ...],
        Field(strict=False),
        Allowed('a list of "weight", "input" or both, each once'),
    ] = ("weight", "input")
    """Which backward products see the quantized gradient; the others get the original."""
    symmetric: bool = True
    """Codes -(2^(b-1)-1) to 2^(b-1)-1 around zero, or all 2^b levels between minimum and maximum."""
    rounding: GradientRounding = "nearest"
    """`nearest` (ties to even), `stochastic`, or `ms_eden`: nearest, with scales that make it unbiased after a rotation
    with drawn signs (`rotation.signs`); with granularity `block`, and no format whose scales are powers of two."""
    split_mean: bool = False
    """Take the mean over tokens off before quantizing, and add its part in full precision (Averis). Backend `simulated`
    only, and for weight gradients only where that of the activation is, too."""
    split_qkv: Patterns = ()
    """Shell patterns on the names of layers that give queries, keys and values in one, such as `*.c_attn`: each third
    of the output features has scales of its own. With granularity `tensor` or `token`, and backend `simulated`."""

    def rules(self) -> Iterator[Rule]:
        yield from super().rules()
        if not self.used_for or len(set(self.used_for)) < len(self.used_for):
            fix = 'list each product once, or leave "gradient" out to quantize none'
            yield "used_for", list(self.used_for), allowed_values(GradientConfig, "used_for"), fix
        if self.rounding == MS_EDEN:
            yield from self._eden_rules()
        if self.split_qkv and self.granularity not in ("tensor", "token"):
            allowed = f'absent with granularity "{self.granularity}", whose scales are not of many features'
            yield "split_qkv", list(self.split_qkv), allowed, 'remove it, or use granularity "token" or "tensor"'

    def _eden_rules(self) -> Iterator[Rule]:
        with_eden = f'with rounding "{MS_EDEN}"'
        if self.granularity != "block":
            allowed = f'"block" {with_eden}, whose scales correct no more than a block of the rotation'
            yield "granularity", self.granularity, allowed, 'use that, or rounding "stochastic"'
        if not self.symmetric:
            yield "symmetric", False, f"true {with_eden}", 'remove it, or use rounding "stochastic"'
        if self.named_format and self.named_format.scale == "e8m0":
            allowed = f"bits, nvfp4, nvint4, fp8, fp6 or fp4 {with_eden}: powers of two are too coarse to correct with"
            yield "format", self.format, allowed, 'use one of them, or rounding "stochastic"'
        if self.scale_rule == FOUR_SIX:
            yield "scale_rule", FOUR_SIX, f"absent {with_eden}, which finds scales of its own", "remove one of the two"
