"""Weights that swing between two codes: the paper's explanation of why 4-bit weights fail (arXiv 2407.11722).

The codes of a fixed sample of each layer's weights are sampled every so many steps. Between two looks a code has
changed or not; a change in the direction against that of the weight's last change is a reversal, as in Nagel et al.
2022 (arXiv 2203.11086, equations 4 and 5, there step by step). A weight that learns crosses thresholds in one
direction; one that oscillates sits at a threshold and reverses. The distance to the nearest decision threshold (where
rounding to nearest would choose another code), in units of the scale, is 0.25 on average for weights spread evenly
between the codes and at most 0.5; oscillating weights gather near 0.
"""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from ds_quant.base.errors import fail
from ds_quant.diagnostics.measurement import Measurement, Row
from ds_quant.diagnostics.recorder import Recorder, weight_matrix, zeros
from ds_quant.linear.modules import QuantizedModule
from ds_quant.linear.recipe import Quantizer
from ds_quant.numerics.format import Integers
from ds_quant.numerics.integer import divide, expand_scale
from ds_quant.numerics.random import fold_key, random_bits

SAMPLE = 65536
"""Weights of a layer that are followed."""

NEAR = 0.05
"""Scales from a threshold that count as near; of evenly spread weights a tenth is."""

_SUMS = ("sampled", "near", "distance", "compared", "changed", "reversed", "returned", "compared_twice")


def sample_indices(name: str, numel: int, seed: int = 0, count: int = SAMPLE) -> Tensor:
    """Which elements of a layer are followed: int64, those of the same name, size and seed always the same."""
    if numel <= count:
        return torch.arange(numel)
    stream = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    key = fold_key(seed % 2**64, stream=stream)
    high, low = random_bits(key, (2, count))
    return ((high << 31) ^ low) % numel


def codes_and_distances(weight: Tensor, quantizer: Quantizer, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Of weight [out, in] at flat `indices`: the codes (int16), and each weight's distance from the nearest threshold.

    Distances are fp32 in units of the scale, 0 to 0.5; weights of a zero scale are 0.5 away.
    """
    q = quantizer._replace(rounding="nearest")(weight, None, 0)
    indices = indices.to(weight.device)
    scale = expand_scale(q).expand(weight.shape).reshape(-1)[indices]
    values = weight.float().reshape(-1)[indices]
    steps = torch.where(scale > 0, divide(values, scale), 0.0)
    return q.codes.reshape(-1)[indices].to(torch.int16), 0.5 - (steps - steps.round()).abs()


class OscillationRecorder(Recorder):
    """Codes of the sampled weights of every layer that quantizes its weight, compared from look to look.

    One object serves a whole run: `reset` ends a look and keeps its codes. Weights are alike on all ranks, so sums over
    ranks change no share.
    """

    kind = "oscillation"
    watches_inputs = True

    def __init__(self, seed: int = 0, count: int = SAMPLE):
        super().__init__()
        self.seed, self.count = seed, count
        self._quantizers: dict[str, Quantizer] = {}
        self._history: dict[str, list[Tensor]] = {}
        self._direction: dict[str, Tensor] = {}
        self._seen: set[str] = set()

    def prepare(self, name: str, module: nn.Module) -> None:
        if isinstance(module, QuantizedModule) and module._quant_plan.weight is not None:
            if not isinstance(module._quant_plan.weight.format.elements, Integers):
                raise fail(
                    "diagnostics: oscillation",
                    module._quant_plan.weight.format_name,
                    "weights in integers (bits, mxint8, nvint4), whose thresholds are evenly spaced",
                    "leave oscillation out",
                )
            if "Y" in module._quant_plan.rotated:
                raise fail(
                    "diagnostics: oscillation",
                    "weights that are rotated before they are quantized",
                    "weights whose codes are of single elements",
                    "leave oscillation out",
                )
            self._quantizers[name] = module._quant_plan.weight
            self._sums.setdefault(name, zeros(len(_SUMS), module.weight))

    def reset(self) -> None:
        super().reset()
        self._seen.clear()

    def observe_input(self, name: str, module: nn.Module, x: Tensor) -> None:
        if name not in self._seen:
            self._seen.add(name)
            self.look(name, weight_matrix(module))

    def look(self, name: str, weight: Tensor) -> None:
        """Take the codes of weight [out, in] as the next look at the layer, where its weight is quantized."""
        if name not in self._quantizers:
            return
        indices = sample_indices(name, weight.numel(), self.seed, self.count)
        codes, distance = codes_and_distances(weight, self._quantizers[name], indices)
        numel = codes.numel()
        history = [earlier.to(codes.device) for earlier in self._history.get(name, []) if earlier.numel() == numel]
        counts = torch.zeros(len(_SUMS), dtype=torch.float64, device=weight.device)
        counts[0], counts[1], counts[2] = numel, (distance < NEAR).sum(), distance.double().sum()
        if history:
            move = (codes - history[-1]).sign().to(torch.int8)
            last = self._direction.get(name, torch.zeros_like(move)).to(move.device)
            counts[3], counts[4], counts[5] = numel, (move != 0).sum(), (move * last < 0).sum()
            self._direction[name] = torch.where(move != 0, move, last)
        if len(history) > 1:
            counts[6], counts[7] = ((codes == history[-2]) & (codes != history[-1])).sum(), numel
        self._history[name] = [*history[-1:], codes]
        self._sums[name] += counts

    def state_dict(self) -> dict[str, Any]:
        """The state that the next look is compared with, as CPU tensors, for a resumed run."""
        return {
            "codes": {name: [codes.cpu() for codes in history] for name, history in self._history.items()},
            "directions": {name: direction.cpu() for name, direction in self._direction.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`; layers with a different sample start over."""
        self._history = {name: list(history) for name, history in state["codes"].items()}
        self._direction = dict(state["directions"])

    def result(self, step: int | None) -> Measurement:
        if not self._quantizers:
            raise fail(
                "diagnostics: oscillation",
                "a model whose weights are not quantized",
                "layers with ds_quant.linear.weight",
                "name quantizers for it: ds_quant.linear in the JSON of the run, or --quantizers CONFIG.json",
            )
        self._check_seen(sum(float(sums[0]) for sums in self._sums.values()))
        rows: list[Row] = [
            {"layer": name, "bits": self._quantizers[name].bits, **_shares(sums)}
            for name, sums in self._sums.items()
            if sums[0]
        ]
        total = sum(self._sums.values(), torch.zeros_like(next(iter(self._sums.values()))))
        scalars = {name: value for name, value in _shares(total).items() if value is not None}
        first = next(iter(self._quantizers.values()))
        settings: dict[str, Any] = {
            "seed": self.seed,
            "weights_a_layer": self.count,
            "near": NEAR,
            "weight": first._asdict(),
        }
        return Measurement(self.kind, step, scalars, rows, settings)


def _shares(sums: Tensor) -> dict[str, float | None]:
    """Shares of the sampled weights; None before there were looks enough."""
    found = dict(zip(_SUMS, sums.tolist(), strict=True))
    compared, twice = found["compared"], found["compared_twice"]
    return {
        "changed": found["changed"] / compared if compared else None,
        "reversed": found["reversed"] / compared if twice else None,
        "returned": found["returned"] / twice if twice else None,
        "near_threshold": found["near"] / found["sampled"],
        "mean_distance": found["distance"] / found["sampled"],
    }
