"""What is done to the engine that DeepSpeed has made: it gets its parts, and what was promised is counted."""

from typing import Any

import torch

from ds_quant.base.log import say
from ds_quant.diagnostics.collector import TrainingDiagnostics
from ds_quant.engine.communication import Communication
from ds_quant.engine.diagnostics import Diagnostics, second_moments
from ds_quant.engine.masters import Masters
from ds_quant.engine.micro_steps import MicroSteps
from ds_quant.engine.moments import Moments
from ds_quant.engine.oscillation_reset import OscillationReset
from ds_quant.engine.parameter_methods import restore_methods
from ds_quant.engine.parts import Part
from ds_quant.engine.preparation import Prepared
from ds_quant.engine.quant_engine import extend
from ds_quant.engine.release import Release
from ds_quant.engine.steps import Steps
from ds_quant.engine.weight_communication import WeightCommunication
from ds_quant.engine.weight_fetches import WeightFetches
from ds_quant.engine.weights import Weights
from ds_quant.engine.whole_weights import gather_elsewhere
from ds_quant.kernels.fp8_units import fp8_units
from ds_quant.kernels.integer_units import integer_units
from ds_quant.linear.convert import check_still_converted, coverage, step_key_of
from ds_quant.optim.muon import QuantMuon


def attach(engine: Any, prepared: Prepared) -> None:
    """Extend a live engine by the parts that the section asks for, and tell the user what is quantized.

    Raises ConfigError where the engine does not hold what was prepared.
    """
    quant = prepared.quant
    restore_methods(engine.module)
    parts: list[Part] = [micro_steps := MicroSteps(engine)]
    if quant.optimizer and quant.optimizer.master:
        parts.append(Masters(engine, quant.optimizer.master))
    if quant.optimizer and quant.optimizer.release_gradients:
        parts.append(Release(engine))
    if quant.optimizer:
        if isinstance(engine.basic_optimizer, QuantMuon):
            from ds_quant.engine.muon import keep_momentum  # not above: it brings torch's compiler with it

            keep_momentum(engine)
        parts.append(Moments(engine))
        for line in prepared.moment_lines:
            say(line)
    if quant.linear:
        parts += _linear_parts(engine, prepared, micro_steps)
    if quant.communication and quant.communication.gradient:
        parts.append(Communication(engine, quant.communication.gradient))
    if quant.communication and quant.communication.weight:
        part = WeightFetches if engine.zero_optimization_partition_weights() else WeightCommunication
        parts.append(part(engine, quant.communication.weight))
        gather_elsewhere()
    if quant.diagnostics and prepared.choice:
        collector = TrainingDiagnostics(engine, quant.diagnostics, prepared.choice, second_moments)
        parts.append(Diagnostics(engine, collector))
    extend(engine, parts)


def _linear_parts(engine: Any, prepared: Prepared, micro_steps: MicroSteps) -> list[Part]:
    """The parts that quantized layers need; says which layers those are."""
    parts: list[Part] = []
    check_still_converted(engine.module, prepared.converted)
    step_key = step_key_of(engine.module)
    if step_key is not None:
        parts.append(Steps(engine, step_key, micro_steps))
    weight = prepared.quant.linear and prepared.quant.linear.weight
    if weight and weight.oscillation_reset and engine.optimizer is not None:
        parts.append(OscillationReset(engine, weight.oscillation_reset))
    backend = prepared.quant.linear and prepared.quant.linear.backend
    if backend == "int8":
        parts.append(Weights(engine))
        units = integer_units(torch.device(engine.device))  # warns by itself where it is slow
        if units.is_fast:
            say(units.line())
    elif backend == "fp8":
        say(fp8_units(torch.device(engine.device)).line())
    for line in coverage(engine.module).lines():
        say(line)
    return parts
