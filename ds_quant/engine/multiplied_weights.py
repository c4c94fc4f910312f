"""Weights whose codes quantized layers multiply as they came over the wire, instead of quantizing the weight again."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ds_quant.comm.received_codes import ReceivedCodes
from ds_quant.comm.weight_layout import Weight
from ds_quant.linear.modules import QuantizedModule
from ds_quant.linear.operands import arrange_weight, weight_ways
from ds_quant.linear.recipe import Codes

_Parameter = Any
"""A torch.nn.Parameter."""


class MultipliedWeights:
    """The layers of a model with backend `int8`, by the Parameter that they have."""

    def __init__(self, model: nn.Module) -> None:
        self._layers: dict[int, list[QuantizedModule]] = {}
        for module in model.modules():
            if isinstance(module, QuantizedModule) and module.quant_config.backend == "int8":
                self._layers.setdefault(id(module.weight), []).append(module)

    def is_wanted(self, parameter: _Parameter) -> bool:
        """Whether a layer has looked for codes in a training forward, as compiled ones never do."""
        return any(layer._weight_codes.wanted for layer in self._of(parameter))

    def hand_over(self, parameter: _Parameter, codes: Tensor, scale: Tensor) -> None:
        """Have its layers multiply these codes, which are those of the Parameter as it is now."""
        arranged: dict[str, Codes] = {}
        for layer in self._of(parameter):
            if layer._weight_codes.wanted:
                ways = weight_ways(layer._quant_plan, forward=True, backward=True)
                if ways not in arranged:
                    arranged[ways] = arrange_weight(codes, scale, ways)
                layer._weight_codes.receive(parameter, arranged[ways])

    def drop(self, parameter: _Parameter) -> None:
        """Its layers have no codes of it."""
        for layer in self._of(parameter):
            layer._weight_codes.drop()

    def renew(self, parameter: _Parameter) -> None:
        """The codes that were handed over are those of the Parameter still, though weights were said to be written."""
        for layer in self._of(parameter):
            layer._weight_codes.renew()

    def _of(self, parameter: _Parameter) -> Iterable[QuantizedModule]:
        return self._layers.get(id(parameter), ())


class UpdatedCodes:
    """What a step gathers of one flat group of weights that layers multiply the codes of."""

    def __init__(self, multiplied: MultipliedWeights, weights: Iterable[tuple[Weight, _Parameter]]) -> None:
        self._multiplied = multiplied
        self._weights = [(weight, parameter) for weight, parameter in weights if weight.coding]
        self._coming: list[tuple[ReceivedCodes, _Parameter]] = []

    def make_room(self, flat: Tensor) -> list[ReceivedCodes]:
        """For the codes of a gather to come, in the order of the group; those that layers have kept are freed."""
        self._coming = []
        for weight, parameter in self._weights:
            self._multiplied.drop(parameter)
            if weight.coding and self._multiplied.is_wanted(parameter):
                self._coming.append((ReceivedCodes(weight.shape, weight.coding, weight.start, flat.device), parameter))
        return [received for received, _ in self._coming]

    def hand_over(self) -> None:
        """They are here, and nothing writes the weights any more."""
        coming, self._coming = self._coming, []
        for received, parameter in coming:
            self._multiplied.hand_over(parameter, received.codes, received.scale)
