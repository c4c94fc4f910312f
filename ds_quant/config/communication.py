"""`ds_quant.communication`: how gradients and weights cross the wire."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from ds_quant.base.number_formats import FORMATS, FOUR_SIX, SCALE_RULES, WIRE_FORMATS
from ds_quant.config.deepspeed_json import SECTION
from ds_quant.config.section import Allowed, BlockSection, Rule, Section, bits_or_format
from ds_quant.config.values import (
    FlatBlock,
    RanksPerNode,
    Rounding,
    WireBits,
    WireFormatName,
    flat_block_size,
    not_null,
    nothing,
)

# Null is no value of either, only what their absence is to Python.
_BITS_SCHEMA = WithJsonSchema({"type": "integer", "enum": [4, 8]})
_FORMAT_SCHEMA = WithJsonSchema({"type": "string", "enum": list(WIRE_FORMATS)})


def _own_size(name: str | None) -> int:
    """Elements of the blocks that a format has by itself; 0 where it has none."""
    return FORMATS[name].block_size if name else 0


def _block_size(data: dict[str, Any]) -> int:
    name = data.get("format")
    return _own_size(name) or (128 if name else flat_block_size(data))


class GradientCommunicationConfig(BlockSection):
    """How gradients cross the wire."""

    where: ClassVar[str] = f"{SECTION}.communication.gradient"
    null_is_absent: ClassVar[tuple[str, ...]] = ("bits", "format", "scale_rule")

    bits: Annotated[WireBits | None, BeforeValidator(not_null), _BITS_SCHEMA] = None
    """Bits of a code, 4 or 8. Required, or `format` in its place."""
    format: Annotated[WireFormatName | None, BeforeValidator(not_null), _FORMAT_SCHEMA] = None
    """In place of `bits`, 4 bits of another kind (docs/formats.md): `fp4_e2m1`, with an fp32 scale for `block_size`
    elements; `mxfp4` (32 elements, a power of two as scale); `nvfp4`, `nvint4` (16 elements, an fp8 scale and one fp32
    for each piece)."""
    scale_rule: Annotated[
        Literal["floor", "up", "four_six"] | None, Allowed('"floor" or "up" (mxfp4), or "four_six" (nvfp4)')
    ] = None
    """As for the operands of `linear`. Default: `floor` of `mxfp4`, 6 of `nvfp4`."""
    block_size: FlatBlock = Field(default_factory=_block_size)
    """Consecutive elements that share a scale. Default 256 at 8 bits, 128 at 4; formats with blocks of their own take
    no other."""
    rounding: Rounding = "nearest"
    """`nearest` (ties to even) or `stochastic`."""
    error_feedback: bool = False
    """Add to a gradient what its last transmission lost. Takes 2 bytes an element of the gradient on every rank, 4
    where steps may be skipped."""
    rotation: Literal["none", "hadamard"] = "none"
    """`hadamard` rotates each block before it is quantized, which spreads outliers over the block."""
    hierarchical: RanksPerNode = False
    """Sum inside the node first, in the gradients' dtype, and quantize between nodes only: `true`, or the number of
    ranks in a node."""

    def rules(self) -> Iterator[Rule]:
        yield from bits_or_format(self, "4 or 8")
        rules = {"mxfp4": SCALE_RULES, "nvfp4": (FOUR_SIX,)}.get(self.format or "", ())
        if self.scale_rule is not None and self.scale_rule not in rules:
            allowed = '"floor" or "up" with format "mxfp4", "four_six" with "nvfp4"'
            yield "scale_rule", self.scale_rule, allowed, "remove it"
        if self._block_size_is_idle() and "block_size" in self.model_fields_set:
            allowed = f'absent with format "{self.format}", whose blocks have {_own_size(self.format)} elements'
            yield "block_size", self.block_size, allowed, "remove it"

    def _block_size_is_idle(self) -> bool:
        return _own_size(self.format) > 0


class WeightCommunicationConfig(Section):
    """How weights cross the wire: updated ones once a step at ZeRO stages 1 and 2, those of a layer before its forward
    and its backward at stage 3."""

    where: ClassVar[str] = f"{SECTION}.communication.weight"

    left_out: ClassVar[dict[str, tuple[str, str]]] = {
        "format": ("bits: differences of weights cross the wire as integers", "use bits, or remove it")
    }

    mode: Literal["codes", "difference"]
    """`codes`: of a weight that its layers quantize by channel, the codes that they compute with, and scales: training
    stays what it is, bit for bit. All other parameters cross the wire in their dtype. `difference`, at stages 1
    and 2: of all parameters, codes of what the owner's fp32 weights are above what the ranks have. Required."""
    bits: WireBits | None = None
    """Of `difference`: bits of a code, 4 or 8. Required there."""
    block_size: FlatBlock | None = None
    """Of `difference`: consecutive elements that share a scale. Default 256 at 8 bits, 128 at 4."""
    rounding: Rounding | None = None
    """Of `difference`: `nearest` (ties to even) or `stochastic`. Default `nearest` at 8 bits, `stochastic` at 4."""
    rotation: Literal["none", "hadamard"] = "none"
    """Of `difference`: `hadamard` rotates each block before it is quantized, which spreads outliers over the block."""
    hierarchical: RanksPerNode = False
    """At stages 1 and 2: send codes between nodes once, each rank to those of its own number in other nodes, and pass
    them on inside the nodes: `true`, or the number of ranks in a node."""
    whole_every: Annotated[int, Field(ge=1), Allowed("an integer, 1 or more: steps of the optimizer")] | None = None
    """Of `difference`: the first step and each of so many sends whole weights. Default 1000."""

    def rules(self) -> Iterator[Rule]:
        if self.mode == "difference":
            if self.bits is None:
                yield "bits", None, "4 or 8", "add it"
            return
        for key in ("bits", "block_size", "rounding", "rotation", "whole_every"):
            value = getattr(self, key)
            if value is not None and value != "none":
                yield key, value, 'only with mode "difference"', "remove it: codes are those of ds_quant.linear.weight"


class CommunicationConfig(Section):
    """What crosses the wire in few bits."""

    where: ClassVar[str] = f"{SECTION}.communication"

    gradient: GradientCommunicationConfig | None = None
    """Absent: gradients are reduced by DeepSpeed."""
    weight: WeightCommunicationConfig | None = None
    """Absent: weights are gathered by DeepSpeed."""

    def rules(self) -> Iterator[Rule]:
        if not (self.gradient or self.weight):
            yield nothing(self, "gradient or weight")
