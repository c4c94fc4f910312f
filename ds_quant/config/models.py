"""The `ds_quant` section of the DeepSpeed JSON: what may be written, what it means, what it defaults to.

`QuantConfig.load` takes the whole DeepSpeed config. JSON objects of a single part go through the `parse` of their
class (`LinearConfig.parse({...})`); both raise `ConfigError` with every problem found. Neither torch nor DeepSpeed is
imported here.
"""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from ds_quant.deepspeed_json import (
    SECTION,
    TRIPWIRE,
    has_tripwire,
    misspelt_section,
    near_miss_keys,
    read_deepspeed_config,
    resolve_auto,
    strip_tripwire,
    unresolved_auto,
)
from ds_quant.errors import ConfigError, fail, problem
from ds_quant.section import Allowed, BlockSection, Rule, Section, allowed_values

__all__ = [
    "SECTION",
    "TRIPWIRE",
    "ActivationConfig",
    "CommunicationConfig",
    "ConfigError",
    "DiagnosticsConfig",
    "GradientCommunicationConfig",
    "GradientConfig",
    "LinearConfig",
    "MomentConfig",
    "OptimizerConfig",
    "QuantConfig",
    "WeightConfig",
    "has_tripwire",
    "json_schema",
    "near_miss_keys",
    "problem",
    "read_deepspeed_config",
    "resolve_auto",
    "strip_tripwire",
    "unresolved_auto",
]


# ---- values


def _exact_int(value: Any) -> Any:
    # A Literal of integers would take 8.0, and a union with False would take 0.
    if type(value) is not int:
        raise PydanticCustomError("exact_int", "an integer is wanted")
    return value


def _node_size(value: Any) -> Any:
    if not isinstance(value, bool) and _exact_int(value) < 2:
        raise PydanticCustomError("node_size", "two ranks or more are wanted")
    return value


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        raise PydanticCustomError("power_of_two", "a power of two is wanted")
    return value


def _pattern(value: str) -> str:
    if not value.strip():
        raise PydanticCustomError("empty_pattern", "an empty pattern matches nothing")
    return value


def _class_name(value: str) -> str:
    if not all(part.isidentifier() or part == "<locals>" for part in value.split(".")):
        raise PydanticCustomError("class_name", "a class name or its dotted path is wanted")
    return value


Bits = Annotated[int, Field(ge=2, le=8), Allowed("an integer from 2 to 8")]
WireBits = Annotated[Literal[4, 8], BeforeValidator(_exact_int), Allowed("4 or 8")]
LinearBlock = Annotated[
    int, Field(ge=16, le=4096), AfterValidator(_power_of_two), Allowed("a power of two from 16 to 4096")
]
FlatBlock = Annotated[
    int, Field(ge=32, le=4096), AfterValidator(_power_of_two), Allowed("a power of two from 32 to 4096")
]
RanksPerNode = Annotated[
    bool | Annotated[int, Field(ge=2)],  # ge for the JSON schema
    BeforeValidator(_node_size),
    Allowed("false, true for the ranks that the launcher has put on a node, or their number, 2 or more"),
]
Rounding = Literal["nearest", "stochastic"]
# JSON arrays come as lists, which strict mode would refuse for a tuple.
Patterns = Annotated[
    tuple[Annotated[str, AfterValidator(_pattern)], ...],
    Field(strict=False),
    Allowed("a list of shell patterns, none of them empty"),
]
ClassNames = Annotated[
    tuple[Annotated[str, AfterValidator(_class_name)], ...],
    Field(strict=False),
    Allowed("a list of class names or dotted paths of classes, no patterns"),
]


# ---- linear


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
            remedy = 'list each product once, or leave "gradient" out to quantize none'
            yield "used_for", list(self.used_for), allowed_values(GradientConfig, "used_for"), remedy


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
            yield _nothing(self, "weight, activation or gradient")
        if not self.include:
            yield "include", [], "a list of shell patterns, at least one", 'remove it for ["*"], or remove the section'
        yield from self._folding_rules()
        if self.backend == "int8":
            yield from self._int8_rules()

    def _folding_rules(self) -> Iterator[Rule]:
        if self.backward_operands == "original" or not self.gradient or self.gradient.granularity != "outer":
            return
        remedy = 'set gradient.granularity to "token" or "channel", or backward_operands to "original"'
        if "input" in self.gradient.used_for and self.weight and self.weight.granularity == "block":
            reason = '"tensor" or "channel": a gradient of granularity "outer" cannot fold a scale per block'
            yield "weight.granularity", "block", reason, remedy
        granularity = self.activation.granularity if self.activation else "token"
        if "weight" in self.gradient.used_for and granularity in ("block", "channel"):
            reason = f'"tensor" or "token": a gradient of granularity "outer" cannot fold a scale per {granularity}'
            yield "activation.granularity", granularity, reason, remedy

    def _int8_rules(self) -> Iterator[Rule]:
        remedy = 'use that, or backend "simulated"'
        operands = {"weight": ("channel", "tensor"), "activation": ("token", "tensor"), "gradient": ("outer", "tensor")}
        for name, granularities in operands.items():
            operand = getattr(self, name)
            if operand and not operand.symmetric:
                reason = 'true with backend "int8": a zero point has no place in an integer product'
                yield f"{name}.symmetric", False, reason, remedy
            if operand and operand.granularity not in granularities:
                words = " or ".join(f'"{granularity}"' for granularity in granularities)
                reason = f'{words} with backend "int8": any other scale lies on a contraction axis'
                yield f"{name}.granularity", operand.granularity, reason, remedy
        yield from self._int8_gradient_rules()
        if self.weight and self.weight.rounding == "stochastic":
            reason = '"nearest" with backend "int8": forward and backward must find the same codes'
            yield "weight.rounding", "stochastic", reason, remedy

    def _int8_gradient_rules(self) -> Iterator[Rule]:
        """A gradient with one scale folds none in, so that the other operand's would lie on the contraction axis."""
        gradient = self.gradient
        if not gradient or gradient.granularity != "tensor" or self.backward_operands == "original":
            return
        others = {"input": ("weight", self.weight), "weight": ("activation", self.activation)}
        for product, (name, other) in others.items():
            if product in gradient.used_for and other and other.granularity in ("channel", "token"):
                allowed = f'"outer" with backend "int8" and {name}.granularity "{other.granularity}"'
                remedy = f'use that, or {name}.granularity "tensor", or backend "simulated"'
                yield "gradient.granularity", "tensor", allowed, remedy


def _nothing(section: Section, keys: str) -> Rule:
    return "", section.model_dump(exclude_unset=True), f"at least one of {keys}", "it quantizes nothing: say what"


# ---- optimizer


def _flat_block_size(data: dict[str, Any]) -> int:
    return 256 if data["bits"] == 8 else 128


def _moment_map(data: dict[str, Any]) -> Literal["float", "power"]:
    return "float" if data["bits"] == 8 else "power"


class MomentConfig(BlockSection):
    """How a moment of Adam is stored."""

    where: ClassVar[str] = f"{SECTION}.optimizer.exp_avg(_sq)"

    bits: WireBits
    """Bits of a code, 4 or 8. Required."""
    map: Literal["float", "power", "linear", "dynamic"] = Field(default_factory=_moment_map)
    """What a code means: `float` (8 bits only) exponent and three bits of mantissa; `power` a power of it (8 bits:
    exp_avg its signed fourth power, exp_avg_sq its eighth; 4 bits: exp_avg its signed square, exp_avg_sq the eighth
    power of (c + 3) / 18); `linear` itself; `dynamic` bitsandbytes' map. Default `float` at 8 bits, `power` at 4."""
    granularity: Literal["block", "tensor", "channel"] = "block"
    """What shares a scale. `tensor` and `channel` are the paper's: map `linear`, and whole parameters only."""
    block_size: FlatBlock = Field(default_factory=_flat_block_size)
    """Consecutive elements that share a scale, for granularity `block`. Default 256 at 8 bits, 128 at 4."""
    rounding: Rounding | None = None
    """`stochastic` or `nearest`. Null (default): stochastic. `nearest` is refused for exp_avg per block, where it keeps
    moving what no longer has a gradient."""

    def rules(self) -> Iterator[Rule]:
        yield from super().rules()
        if self.map == "float" and self.bits != 8:
            yield "map", "float", '"power", "linear", "dynamic" with 4 bits', "set one of them, or remove it"
        if self.granularity != "block" and self.map != "linear":
            yield (
                "map",
                self.map,
                f'"linear" with granularity "{self.granularity}"',
                'set it, or use granularity "block"',
            )


class OptimizerConfig(Section):
    """Which moments of Adam are stored in few bits."""

    where: ClassVar[str] = f"{SECTION}.optimizer"

    exp_avg: MomentConfig | None = None
    """The first moment. Absent: 32 bits."""
    exp_avg_sq: MomentConfig | None = None
    """The second moment. Absent: 32 bits."""
    exclude: Patterns = ()
    """Shell patterns on parameter names: those keep 32-bit moments. Default none."""

    def rules(self) -> Iterator[Rule]:
        if not (self.exp_avg or self.exp_avg_sq):
            yield _nothing(self, "exp_avg or exp_avg_sq")
        if self.exp_avg and self.exp_avg.rounding == "nearest" and self.exp_avg.granularity == "block":
            reason = (
                '"stochastic": rounded to nearest, small values never decay, and parameters whose gradients have ended '
                "move on for ever"
            )
            yield "exp_avg.rounding", "nearest", reason, "remove it; checkpoints written with it go on"


# ---- communication


class GradientCommunicationConfig(Section):
    """How gradients cross the wire."""

    where: ClassVar[str] = f"{SECTION}.communication.gradient"

    bits: WireBits
    """Bits of a code, 4 or 8. Required."""
    block_size: FlatBlock = Field(default_factory=_flat_block_size)
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


class CommunicationConfig(Section):
    """What crosses the wire in few bits."""

    where: ClassVar[str] = f"{SECTION}.communication"

    gradient: GradientCommunicationConfig | None = None
    """Absent: gradients are reduced by DeepSpeed."""

    def rules(self) -> Iterator[Rule]:
        if not self.gradient:
            yield _nothing(self, "gradient")


# ---- diagnostics


def _path(value: str) -> str:
    if not value.strip() or "\0" in value:
        raise PydanticCustomError("empty_path", "an empty path names no folder")
    return value


ON_CHECKPOINTS = ("sharpness", "landscape")
"""Diagnostics that move the weights: on checkpoints only."""


class DiagnosticsConfig(Section):
    """What is measured inside training, and how often."""

    where: ClassVar[str] = f"{SECTION}.diagnostics"

    every: Annotated[int, Field(ge=1), Allowed("an integer, 1 or more: steps of the optimizer")]
    """Optimizer steps between two looks. Required."""
    kinds: Annotated[
        tuple[
            Literal[
                "outliers",
                "gradient_error",
                "gradient_norms",
                "moments",
                "quantization_error",
                "oscillation",
                "sharpness",
                "landscape",
            ],
            ...,
        ]
        | None,
        Field(strict=False),
        Allowed(
            'a list of "outliers", "gradient_error", "gradient_norms", "moments", "quantization_error", "oscillation", '
            "each once"
        ),
    ] = None
    """What is measured. Null (default): all that this run has the components for."""
    output_dir: Annotated[str, AfterValidator(_path), Allowed("a path")] = "diagnostics"
    """Folder of the JSON files, the CSV and the report. Written by rank 0."""
    report: bool = True
    """Keep report.html up to date; needs matplotlib and jinja2."""
    gradient: GradientConfig | None = None
    """The quantizer whose `gradient_error` is measured. Null (default): the run's own, of `linear` or
    `communication`."""
    exp_avg_sq: MomentConfig | None = None
    """The storage of the second moment that `moments` measures. Null (default): the run's own."""

    def rules(self) -> Iterator[Rule]:
        if self.kinds is None:
            return
        kinds = list(self.kinds)
        moving = [kind for kind in kinds if kind in ON_CHECKPOINTS]
        if moving:
            remedy = f"take it out, and run python launchers/diagnose.py {moving[0]} CHECKPOINT"
            reason = "what leaves the weights alone: ZeRO holds them in 16 bits, which swallow such small changes"
            yield "kinds", kinds, reason, remedy
        elif not kinds or len(set(kinds)) < len(kinds):
            yield "kinds", kinds, allowed_values(DiagnosticsConfig, "kinds"), "list each kind once, or remove the key"


# ---- the section


class QuantConfig(Section):
    """The `ds_quant` section."""

    enabled: bool = True
    """False: a plain DeepSpeed run; the rest is still validated."""
    linear: LinearConfig | None = None
    """The operands of the linears. Absent: full precision."""
    optimizer: OptimizerConfig | None = None
    """The moments of Adam. Absent: 32 bits."""
    communication: CommunicationConfig | None = None
    """The gradients on the wire. Absent: DeepSpeed's own reduction."""
    diagnostics: DiagnosticsConfig | None = None
    """What is measured inside training. Absent: nothing, at no cost."""

    def rules(self) -> Iterator[Rule]:
        if self.enabled and not (self.linear or self.optimizer or self.communication or self.diagnostics):
            keys = "at least one of linear, optimizer, communication or diagnostics"
            yield "", self.model_dump(exclude_unset=True), keys, "it quantizes nothing, and measures nothing: say what"

    @classmethod
    def load(cls, source: Any) -> Self:
        """The section of a whole DeepSpeed config (path, dict or base64).

        Without the section, or with `"enabled": false`, the result is `QuantConfig(enabled=False)`.
        """
        config = read_deepspeed_config(source)
        if stray := misspelt_section(config):
            raise ConfigError("\n".join(stray))
        tripwire = has_tripwire(config)
        if SECTION not in config:
            if tripwire:
                place = f"zero_optimization.{TRIPWIRE}"
                raise fail(place, True, f"only with the section {SECTION}", "add the section, or remove this key")
            return cls(enabled=False)
        section = cls.parse(config[SECTION])
        return section if section.enabled else cls(enabled=False)


def json_schema() -> dict[str, Any]:
    """The JSON schema of the section."""
    return QuantConfig.model_json_schema()
