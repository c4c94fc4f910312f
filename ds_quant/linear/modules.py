"""Linear layers whose matrix products see quantized operands: the modules.

`plan` says which products see what, `simulated` and `int8` compute them.

Weights stay the Parameters they were: shared with an embedding where they were tied, partitioned by ZeRO-3 where they
were, in Conv1D's (in, out) layout where they were.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ds_quant.base.number_formats import FOUR_SIX
from ds_quant.config import ActivationConfig, GradientConfig, LinearConfig, WeightConfig
from ds_quant.linear import recomputation
from ds_quant.linear.fused_outputs import parts_of
from ds_quant.linear.int8 import Int8Linear
from ds_quant.linear.operands import input_ways, quantize_input, quantize_weight, weight_ways
from ds_quant.linear.recipe import NUM_STREAMS, Codes, Plan, plan_of
from ds_quant.linear.shapes import out_features
from ds_quant.linear.shared_inputs import ArrivingInput, SharedInputs
from ds_quant.linear.simulated import SimulatedLinear
from ds_quant.linear.step_key import StepKey, count_forwards
from ds_quant.linear.weight_codes import WeightCodes


class QuantizedModule(nn.Module):
    """What a linear layer gains by conversion. Base of QuantLinear, QuantConv1D and of a user's own classes.

    A subclass has a Parameter `weight` of two dimensions and a Parameter `bias` or None, and sets `transposed` where
    its weight is (in, out).
    """

    transposed = False
    weight: Tensor
    quant_config: LinearConfig
    step_key: StepKey
    _quant_plan: Plan
    _full_forward_plan: Plan
    _shared_inputs: SharedInputs
    _weight_codes: WeightCodes
    is_alone = False
    """Whether it was made directly and :func:`ds_quant.convert` has not yet made it part of a model."""

    def configure_quantization(
        self,
        config: LinearConfig,
        step_key: StepKey,
        index: int = 0,
        shared_inputs: SharedInputs | None = None,
        *,
        name: str = "",
    ) -> None:
        """Set what is quantized. `index` numbers the layers of a model, so that each draws its own random bits.

        Layers that are given the same `shared_inputs` quantize an input that they share once. `name`: in the model.

        Raises:
            ConfigError: `gradient.split_qkv` names the layer, and its features do not make three equal parts.
        """
        self.quant_config = config
        self.step_key = step_key
        self.is_alone = False
        parts = parts_of(config, name, out_features(self, transposed=self.transposed))
        self._quant_plan = plan_of(config, transposed=self.transposed, stream=NUM_STREAMS * index, parts=parts)
        self._full_forward_plan = self._quant_plan.full_forward
        step_key.full_forward_from = config.forward_full_precision_from
        if self._quant_plan.stochastic or config.forward_full_precision_from is not None:
            recomputation.follow()
        self._shared_inputs = shared_inputs or SharedInputs()
        self._weight_codes = WeightCodes()
        self._arriving_input: ArrivingInput | None = None

    def configure_alone(self, config: LinearConfig | dict[str, Any]) -> None:
        """Set what is quantized in a layer that is made directly. Without a model or an engine it counts its own steps.

        Raises:
            ConfigError: in its first training forward, keys that only an engine applies.
        """
        config = LinearConfig.parse(config)
        self.configure_quantization(config, StepKey(torch.initial_seed()))
        self.is_alone = True
        count_forwards(self, self.step_key, config)

    @property
    def _plan_in_force(self) -> Plan:
        """What it quantizes at this step."""
        return self._quant_plan if self.step_key.quantizes_forward else self._full_forward_plan

    def watch_input(self) -> None:
        """Identify inputs by the tensors the module is called with, where other hooks pass on aliases of them."""
        if self._arriving_input is None:
            self._arriving_input = ArrivingInput()
            self.register_forward_pre_hook(self._arriving_input, prepend=True)

    def quantized_forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out], in the autocast dtype where autocast is on and in x's dtype otherwise.

        Raises:
            ValueError: x and weight differ in dtype and autocast is off.
        """
        if x.is_meta:  # nothing to quantize, and autocast knows no such device
            weight = self.weight.t() if self.transposed else self.weight
            return nn.functional.linear(x, weight, getattr(self, "bias", None))
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        elif dtype != self.weight.dtype:
            raise ValueError(
                f"{type(self).__name__}: got an input of {dtype} for a weight of {self.weight.dtype}; allowed: the "
                "same dtype; fix: cast the input, or turn autocast on"
            )
        plan = self._plan_in_force
        local_key = replicated_key = None
        if plan.stochastic:
            # `simulated` derives subkeys in Python, from keys that need no device; in graphs all is on the device.
            in_python = self.quant_config.backend != "int8" and not torch.compiler.is_compiling()
            device = torch.device("cpu") if in_python else x.device
            local_key, replicated_key = self.step_key.keys_of_call(plan.stream, device)
        if self.quant_config.backend == "int8":
            return self._int8_forward(x, dtype, plan, local_key)
        bias = getattr(self, "bias", None)
        share = self._loss_share(plan)
        return SimulatedLinear.apply(x.to(dtype), self.weight, bias, plan, dtype, local_key, replicated_key, share)

    def _int8_forward(self, x: Tensor, dtype: torch.dtype, plan: Plan, key: Tensor | None) -> Tensor:
        inputs: tuple[Tensor | None, ...] = (None, None, None)
        weights: tuple[Tensor | None, ...] = (None, None, None)
        if plan.activation:
            inputs = self._input_codes(x, dtype, plan, key)
        # Compiled code makes them in the graph: what is kept in Python would be compiled in as it was.
        reads = not torch.compiler.is_compiling() and self.training and not torch.is_inference_mode_enabled()
        keeps, received = reads and self._weight_codes.may_keep(self.weight), None
        if plan.weight and keeps:
            ways = weight_ways(plan, forward=True, backward=True)
            weights = self._weight_codes.get(self.weight, functools.partial(quantize_weight, plan=plan, ways=ways))
        elif plan.weight:
            received = self._weight_codes if reads else None
            found = None if received is None else received.find(self.weight)
            weights = found or quantize_weight(self.weight, plan, weight_ways(plan, forward=True, backward=False))
        elif reads:
            self._weight_codes.forget()
        if not plan.activation or plan.original_operands:
            x = x.to(dtype)  # it is held for the backward: in the narrower dtype
        bias = getattr(self, "bias", None)
        share = self._loss_share(plan)
        return Int8Linear.apply(x, self.weight, bias, *inputs, *weights, keeps, received, plan, dtype, key, share)

    def _loss_share(self, plan: Plan) -> float:
        # Asked for where it counts only: compiled code is made for it.
        return self.step_key.loss_share if plan.weight and plan.weight.dampening else 1.0

    def _input_codes(self, x: Tensor, dtype: torch.dtype, plan: Plan, key: Tensor | None) -> Codes:
        activation = plan.activation
        ways = input_ways(plan, trains=torch.is_grad_enabled() and self.weight.requires_grad)
        # Layers that round stochastically each draw their own bits, as in the simulated backend.
        if torch.compiler.is_compiling() or activation is None or activation.rounding == "stochastic":
            return quantize_input(x, plan, dtype, key, ways)
        how = (activation, dtype, ways)
        source = x if self._arriving_input is None else self._arriving_input.of(x)
        codes = self._shared_inputs.find(source, how)
        if codes is None:
            codes = quantize_input(x, plan, dtype, key, ways)
            self._shared_inputs.keep(source, how, codes)
        return codes

    def describe(self) -> str:
        """One line such as ``W8 channel, A8 token (int8: Y)``."""
        return describe(self.quant_config, quantizes_forward=self.step_key.quantizes_forward)


class QuantLinear(QuantizedModule, nn.Linear):
    """nn.Linear with quantized products. Made by :func:`ds_quant.convert`, or directly.

    One that is made directly counts its own training forwards as steps, until `convert` or `initialize` takes it into a
    model. Keys that only an engine applies are refused in training before that.

    Args:
        in_features: as in nn.Linear, and so are out_features, bias, device and dtype.
        config: what to quantize; `ds_quant.QuantConfig.load(...).linear` or the JSON object.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        config: LinearConfig | dict,
    ):
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.configure_alone(config)

    def forward(self, input: Tensor) -> Tensor:
        return self.quantized_forward(input)


def describe(config: LinearConfig, *, quantizes_forward: bool = True) -> str:
    """A linear configuration in one line: ``W8 channel, A8 token, G8 outer stochastic for dX+dW (simulated)``.

    With backend int8 or fp8 the products that run on such units stand at its end: ``(int8: Y, dX, dW)``. Where the
    forward is to be in full precision it says from which step on, or, once `quantizes_forward` is False, since when.
    """
    parts = []
    for letter, operand in (("W", config.weight), ("A", config.activation), ("G", config.gradient)):
        if operand is None:
            continue
        text = f"{letter}{operand.bits or ' ' + str(operand.format)} {operand.granularity}"
        if operand.granularity == "block" and not (isinstance(operand, GradientConfig) and operand.format):
            text += f" of {operand.block_size}"
        if isinstance(operand, WeightConfig) and operand.block_rows > 1:
            text += f" x {operand.block_rows}"
        if isinstance(operand, WeightConfig) and operand.trust_distance is not None:
            text += f" trusted within {operand.trust_distance:.3g}"
        if isinstance(operand, WeightConfig) and operand.dampening is not None:
            text += f" dampened by {operand.dampening:.3g}"
        if isinstance(operand, WeightConfig) and operand.oscillation_reset is not None:
            text += f" reset where it swings every {operand.oscillation_reset.every} steps"
        if operand.scale_rule == "up":
            text += " scales up"
        if operand.scale_rule == FOUR_SIX:
            text += " 4/6"
        if not operand.symmetric:
            text += " asymmetric"
        if isinstance(operand, ActivationConfig) and operand.range == "full":
            text += " full range"
        if isinstance(operand, GradientConfig) and operand.split_qkv:
            text += f" with q, k and v apart in {', '.join(operand.split_qkv)}"
        if not isinstance(operand, WeightConfig) and operand.split_mean:
            text += " less its mean"
        if isinstance(operand, ActivationConfig) and operand.outlier_share is not None:
            text += f" with {operand.outlier_share:.3g} of the channels in 8 bits"
        if operand.rounding != "nearest":
            text += f" {operand.rounding}"
        parts.append(text)
    if config.gradient:
        parts[-1] += " for " + "+".join({"input": "dX", "weight": "dW"}[name] for name in config.gradient.used_for)
    if config.rotation:
        drawn = " with drawn signs" if config.rotation.signs == "drawn" else ""
        parts.append(f"Hadamard {config.rotation.block_size}{drawn} for {'+'.join(config.rotated_products())}")
    if config.backward_operands == "original":
        parts.append("original operands in the backward")
    if config.forward_full_precision_from is not None:
        when = "from" if quantizes_forward else "since"
        parts.append(f"forward in full precision {when} step {config.forward_full_precision_from}")
    backend: str = config.backend
    if backend != "simulated":
        narrow = plan_of(config, transposed=False, stream=0).both_quantized
        backend += ": " + (", ".join(narrow) or "no product, each has an unquantized operand")
    return ", ".join(parts) + f" ({backend})"
