"""The `ds_quant` section of the DeepSpeed JSON: what may be written, what it means, what it defaults to.

`QuantConfig.load` takes the whole DeepSpeed config. JSON objects of a single part go through the `parse` of their
class (`LinearConfig.parse({...})`); both raise `ConfigError` with every problem found. Neither torch nor DeepSpeed is
imported here.
"""

from collections.abc import Iterator
from typing import Any, Self

from ds_quant.base.errors import ConfigError, fail
from ds_quant.config.communication import CommunicationConfig
from ds_quant.config.deepspeed_json import SECTION, TRIPWIRE, has_tripwire, misspelt_section, read_deepspeed_config
from ds_quant.config.diagnostics import DiagnosticsConfig
from ds_quant.config.linear import LinearConfig
from ds_quant.config.operands import OscillationResetConfig
from ds_quant.config.optimizer import OptimizerConfig
from ds_quant.config.section import Rule, Section


class QuantConfig(Section):
    """The `ds_quant` section."""

    enabled: bool = True
    """False: a plain DeepSpeed run; the rest is still validated."""
    linear: LinearConfig | None = None
    """The operands of the linears. Absent: full precision."""
    optimizer: OptimizerConfig | None = None
    """The states of the optimizer. Absent: 32 bits."""
    communication: CommunicationConfig | None = None
    """Gradients and weights on the wire. Absent: DeepSpeed's own collectives."""
    diagnostics: DiagnosticsConfig | None = None
    """What is measured inside training. Absent: nothing, at no cost."""

    def rules(self) -> Iterator[Rule]:
        if self.enabled and not (self.linear or self.optimizer or self.communication or self.diagnostics):
            keys = "at least one of linear, optimizer, communication or diagnostics"
            yield "", self, keys, "it quantizes nothing, and measures nothing: say what"
        if self.communication and self.communication.weight and self.communication.weight.mode == "codes":
            yield from self._weight_rules()
        weight = self.communication.weight if self.communication else None
        if self.linear and self.linear.weight and self.linear.weight.oscillation_reset:
            yield from self._reset_rules(self.linear.weight.oscillation_reset)
        if self.optimizer and self.optimizer.master and weight and weight.mode == "difference":
            allowed = '"codes" with optimizer.master, whose masters are in the weights that a replica would replace'
            yield "communication.weight.mode", "difference", allowed, "remove optimizer.master, or use mode codes"

    def _reset_rules(self, reset: OscillationResetConfig) -> Iterator[Rule]:
        problems = {
            "optimizer.master, whose masters are in the weights": self.optimizer and self.optimizer.master,
            "communication.weight, after which a rank holds most weights in few bits": self.communication
            and self.communication.weight,
        }
        for problem, is_there in problems.items():
            if is_there:
                key = problem.partition(",")[0]
                yield "linear.weight.oscillation_reset", reset, f"absent with {problem}", f"remove it, or {key}"

    def _weight_rules(self) -> Iterator[Rule]:
        """What a gather of codes needs: layers that see W in no other way, and find the same codes again."""
        where, fix = "communication.weight.mode", 'change that, or remove "weight" from communication'
        linear = self.linear
        problems = {
            "linear.weight": not (linear and linear.weight),
            "linear.weight.bits": linear and linear.weight and linear.weight.format,
            'linear.weight.granularity "channel"': linear and linear.weight and linear.weight.granularity != "channel",
            "linear.weight.symmetric true": linear and linear.weight and not linear.weight.symmetric,
            'linear.weight.rounding "nearest"': linear and linear.weight and linear.weight.rounding != "nearest",
            "no linear.weight.trust_distance": linear and linear.weight and linear.weight.trust_distance is not None,
            "no linear.weight.dampening": linear and linear.weight and linear.weight.dampening is not None,
            "no linear.rotation": linear and linear.rotation,
            "no linear.forward_full_precision_from": linear and linear.forward_full_precision_from is not None,
            'linear.backward_operands "quantized"': linear and linear.backward_operands != "quantized",
        }
        needs = [need for need, is_missing in problems.items() if is_missing]
        if needs:
            yield where, "codes", f"only with {', '.join(needs)}: layers must compute with the codes alone", fix

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
