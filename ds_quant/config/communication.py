"""`ds_quant.communication`: how gradients and weights cross the wire."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ds_quant.config.deepspeed_json import SECTION
from ds_quant.config.section import Allowed, Rule, Section
from ds_quant.config.values import (
    FlatBlock,
    RanksPerNode,
    Rounding,
    WireBits,
    flat_block_size,
    nothing,
)


class GradientCommunicationConfig(Section):
    """How gradients cross the wire."""

    where: ClassVar[str] = f"{SECTION}.communication.gradient"

    bits: WireBits
    """Bits of a code, 4 or 8. Required."""
    block_size: FlatBlock = Field(default_factory=flat_block_size)
    """Consecutive elements that share a scale. Default 256 at 8 bits, 128 at 4."""
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


class WeightCommunicationConfig(Section):
    """How weights cross the wire: updated ones once a step at ZeRO stages 1 and 2, those of a layer before its forward
    and its backward at stage 3."""

    where: ClassVar[str] = f"{SECTION}.communication.weight"

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
