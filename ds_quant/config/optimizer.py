"""`ds_quant.optimizer`: how the optimizer's states are stored."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from ds_quant.base.code_maps import MAP_BITS, UNSIGNED_MAPS, map_bits
from ds_quant.config.deepspeed_json import SECTION
from ds_quant.config.section import Allowed, BlockSection, OneOf, Rule, Section
from ds_quant.config.values import (
    FlatBlock,
    Patterns,
    Rounding,
    exact_int,
    flat_block_size,
    nothing,
)


def _moment_map(data: dict[str, Any]) -> str:
    """`float` at 8 bits, `power` at 4, else the first that has the bits."""
    preferred = {8: "float", 4: "power"}.get(data["bits"])
    return preferred or next(name for name, allowed in MAP_BITS.items() if data["bits"] in allowed)


MomentBits = Annotated[int, OneOf(map_bits, lambda values: f"{', '.join(map(str, values[:-1]))} or {values[-1]}")]
MapName = Annotated[str, OneOf(lambda: tuple(MAP_BITS), lambda values: ", ".join(f'"{value}"' for value in values))]


class MomentConfig(BlockSection):
    """How a state of the optimizer is stored."""

    where: ClassVar[str] = f"{SECTION}.optimizer.exp_avg(_sq)"
    left_out: ClassVar[dict[str, tuple[str, str]]] = {
        "format": (
            "bits and map: second moments explode in number formats",
            'write "bits": 8, whose map "float" loses what fp8_e4m3 does of first moments, or 4',
        )
    }

    bits: MomentBits
    """Bits of a code, 4 or 8. Required."""
    map: MapName = Field(default_factory=_moment_map)
    """What a code means: `float` (8 bits only) exponent and three bits of mantissa; `power` a power of it (8 bits:
    exp_avg its signed fourth power, exp_avg_sq its eighth; 4 bits: exp_avg its signed square, exp_avg_sq the eighth
    power of (c + 3) / 18; other states as exp_avg); `linear` itself; `dynamic` bitsandbytes' map; `log` (4 bits of
    exp_avg_sq only) 16 values between the smallest and the largest of a block, spaced nearly evenly in their
    logarithm, with two scales to a block. Default `float` at 8 bits, `power` at 4."""
    granularity: Literal["block", "tensor", "channel"] = "block"
    """What shares a scale. `tensor` and `channel` are the paper's: map `linear`, and whole parameters only."""
    block_size: FlatBlock = Field(default_factory=flat_block_size)
    """Consecutive elements that share a scale, for granularity `block`. Default 256 at 8 bits, 128 at 4."""
    rounding: Rounding | None = None
    """`stochastic` or `nearest`. Null (default): stochastic. `nearest` is refused per block for all but exp_avg_sq: it
    keeps moving what no longer has a gradient."""

    def rules(self) -> Iterator[Rule]:
        yield from super().rules()
        if self.bits not in MAP_BITS[self.map]:
            names = ", ".join(f'"{name}"' for name, allowed in MAP_BITS.items() if self.bits in allowed)
            yield "map", self.map, f"{names} with {self.bits} bits", "set one of them, or remove it"
        if self.granularity != "block" and self.map != "linear":
            yield (
                "map",
                self.map,
                f'"linear" with granularity "{self.granularity}"',
                'set it, or use granularity "block"',
            )


SECOND_MOMENTS = ("exp_avg_sq",)
"""States without a sign, which only scale updates."""

MasterBits = Annotated[Literal[16, 24], BeforeValidator(exact_int), Allowed("24 or 16")]


class MasterConfig(Section):
    """What ZeRO keeps of a parameter beside its bf16 weight, in place of an fp32 master."""

    where: ClassVar[str] = f"{SECTION}.optimizer.master"

    bits: MasterBits
    """24: 8 bits beside the weight, which make it an fp32 number without its last 8 bits. 16: the weight alone.
    Required."""
    rounding: Rounding = Field(default_factory=lambda data: "nearest" if data["bits"] == 24 else "stochastic")
    """How a step rounds the new master. Default `nearest` at 24 bits; `stochastic` at 16, where updates that are small
    beside a bf16 step would be lost."""


class OptimizerConfig(Section):
    """Which states of the optimizer are stored in few bits: those that `optimizer.type` has."""

    where: ClassVar[str] = f"{SECTION}.optimizer"

    exp_avg: MomentConfig | None = None
    """The first moment of Adam and AdamW, and of Muon's AdamW; the moment of Lion. Absent: 32 bits."""
    exp_avg_sq: MomentConfig | None = None
    """The second moment of Adam, AdamW and AdEMAMix, and of Muon's AdamW. Absent: 32 bits."""
    momentum_buffer: MomentConfig | None = None
    """The momentum of SGD and Muon. Absent: 32 bits; of Muon the dtype of the gradients, as DeepSpeed keeps it."""
    exp_avg_fast: MomentConfig | None = None
    """The fast moment of AdEMAMix. Absent: 32 bits."""
    exp_avg_slow: MomentConfig | None = None
    """The slow moment of AdEMAMix, in 8 bits at least. Absent: 32 bits."""
    master: MasterConfig | None = None
    """The master weights, at ZeRO stages 1 to 3 with bf16. Absent: fp32, as DeepSpeed keeps them."""
    release_gradients: bool = False
    """Step parameters as their gradients come in the backward, so that gradients never exist all at once. At ZeRO
    stage 2 with `master`, without clipping and accumulation (docs/masters.md)."""
    exclude: Patterns = ()
    """Shell patterns on parameter names: those keep 32-bit states. Default none."""

    def states(self) -> dict[str, MomentConfig]:
        """Those that are stored in few bits."""
        found = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in found.items() if isinstance(value, MomentConfig)}

    def rules(self) -> Iterator[Rule]:
        if not (self.states() or self.master):
            yield nothing(self, "exp_avg, exp_avg_sq, momentum_buffer, exp_avg_fast, exp_avg_slow or master")
        if self.release_gradients and not self.master:
            reason = "true beside master: fp32 masters take gradients of fp32, which are made of a whole partition"
            yield "release_gradients", True, reason, 'add "master": {"bits": 24}, or remove release_gradients'
        for name, state in self.states().items():
            if name not in SECOND_MOMENTS and state.map in UNSIGNED_MAPS:
                others = ", ".join(f'"{other}"' for other in MAP_BITS if other not in UNSIGNED_MAPS)
                yield f"{name}.map", state.map, f"{others} (its codes have no sign)", "remove it, or set one of them"
            if name not in SECOND_MOMENTS and state.rounding == "nearest" and state.granularity == "block":
                reason = (
                    '"stochastic": rounded to nearest, small values never decay, and parameters whose gradients have '
                    "ended move on for ever"
                )
                yield f"{name}.rounding", "nearest", reason, "remove it; checkpoints written with it go on"
        if self.exp_avg_slow and self.exp_avg_slow.bits < 8:
            reason = "8: a step changes it by so little that rounding to fewer bits is noise beyond its size"
            yield "exp_avg_slow.bits", self.exp_avg_slow.bits, reason, "set 8, or remove exp_avg_slow for 32 bits"
