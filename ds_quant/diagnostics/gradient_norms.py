"""Norms of gradients before clipping, their spikes, and how much of a gradient is near zero (arXiv 2407.11722).

The gradients that linear layers quantize are those of their outputs. What is below 1/254 of the largest magnitude of a
tensor becomes zero under 8 bits with one scale, below 1/14 under 4 bits.
"""

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_quant.base.errors import fail
from ds_quant.diagnostics.measurement import Measurement, Row
from ds_quant.diagnostics.recorder import Recorder, zeros

WINDOW = 50
FACTOR = 3.0
FEWEST = 5
"""A norm is a spike where it exceeds FACTOR times the median of up to WINDOW norms before it, FEWEST at least."""

SAMPLE = 2**18
"""Elements of an output gradient that are counted: whole rows, spread evenly; the largest magnitude is that of all."""

_BELOW = {
    "becomes_zero_4": 1 / 14,
    "becomes_zero_8": 1 / 254,
    "below_2^-12": 2.0**-12,
    "below_2^-16": 2.0**-16,
    "below_2^-24": 2.0**-24,
}
"""Shares by name, and below or at which part of the tensor's largest magnitude they lie."""


def spike_ratios(norms: Sequence[float], window: int = WINDOW) -> list[float | None]:
    """Each norm over the median of up to `window` finite ones before it; None for the first FEWEST and after zeros.

    A norm that is not finite has an infinite ratio.
    """
    ratios: list[float | None] = []
    finite: list[float] = []
    for norm in norms:
        median = statistics.median(finite[-window:]) if len(finite) >= FEWEST else 0.0
        is_finite = norm - norm == 0
        ratios.append((norm / median if is_finite else float("inf")) if median > 0 else None)
        if is_finite:
            finite.append(norm)
    return ratios


def norm_history(
    steps: Sequence[int], norms: Sequence[float], factor: float = FACTOR, window: int = WINDOW
) -> Measurement:
    """The norms of a run's gradients before clipping, one a step, and its spikes.

    Raises:
        ConfigError: no norm at all.
    """
    if not norms:
        raise fail("diagnostics: gradient_norms", "no norm", "the norms of a run", "name a run that logged grad_norm")
    ratios = spike_ratios(norms, window)
    rows: list[Row] = [
        {"step": step, "norm": norm, "over_median": ratio, "spike": int(ratio is not None and ratio > factor)}
        for step, norm, ratio in zip(steps, norms, ratios, strict=True)
    ]
    found = [row["step"] for row in rows if row["spike"]]
    scalars = {
        "spikes": float(len(found)),
        "median_norm": statistics.median(norms),
        "largest_norm": max(norms),
        "largest_over_median": max((ratio for ratio in ratios if ratio is not None), default=float("nan")),
    }
    settings: dict[str, Any] = {"factor": factor, "window": window, "fewest": FEWEST, "spikes_at": found}
    return Measurement("gradient_norms", steps[-1], scalars, rows, settings)


def zero_counts(grad: Tensor) -> Tensor:
    """Elements of G [..., out] that are 0, those at or below each part of the largest magnitude, and all that were
    counted, `SAMPLE` or so: fp64 of shape (7,)."""
    grad = grad.detach().reshape(-1, grad.shape[-1])
    largest = torch.stack(grad.aminmax()).abs().amax().float() if grad.numel() else torch.zeros(())
    magnitude = grad[:: max(1, grad.numel() // SAMPLE)].float().abs()
    counts = [torch.count_nonzero(magnitude <= part * largest) for part in (0.0, *_BELOW.values())]
    return torch.stack([*counts, torch.tensor(magnitude.numel(), device=grad.device)]).double()


class GradientNormRecorder(Recorder):
    """The norm of each parameter's gradient, and how much of each linear layer's output gradient is near zero.

    A norm is that of a micro-batch's gradient on a rank, before reduction and clipping; over several of them the
    root mean square is taken. (The norm of the whole batch's gradient is the engine's `get_global_grad_norm()`.)
    """

    kind = "gradient_norms"
    watches_output_gradients = True
    watches_parameter_gradients = True

    def __init__(self) -> None:
        super().__init__()
        self._layers: dict[int, str] = {}
        self._numels: dict[str, int] = {}
        self._layer_of: dict[str, str] = {}

    def prepare(self, name: str, module: nn.Module) -> None:
        self._layers[id(module.weight)] = name
        self._sums.setdefault(f"{name} output", zeros(2 + len(_BELOW), module.weight))  # type: ignore[arg-type]

    def prepare_parameter(self, name: str, parameter: Tensor) -> None:
        self._numels[name] = int(getattr(parameter, "ds_numel", parameter.numel()))
        if id(parameter) in self._layers:
            self._layer_of[name] = self._layers[id(parameter)]
        self._sums.setdefault(f"{name} parameter", zeros(2, parameter))

    def observe_grad_output(self, name: str, module: nn.Module, x: Tensor, grad_output: Tensor) -> None:
        self._sums[f"{name} output"] += zero_counts(grad_output)

    def observe_parameter_grad(self, name: str, grad: Tensor) -> None:
        sums = self._sums[f"{name} parameter"]
        sums[0] += grad.float().square().sum(dtype=torch.float64)
        sums[1] += 1

    def result(self, step: int | None) -> Measurement:
        norms = {name: self._sums[f"{name} parameter"] for name in self._numels}
        self._check_seen(sum(float(sums[1]) for sums in norms.values()))
        outputs = {name: self._sums[f"{layer} output"] for name, layer in self._layer_of.items()}
        rows: list[Row] = []
        total = 0.0
        for name, sums in norms.items():
            if sums[1]:
                square = float(sums[0] / sums[1])
                total += square
                shares = _shares(outputs.get(name))
                rows.append({"parameter": name, "numel": self._numels[name], "norm": square**0.5, **shares})
        pooled = torch.stack(list(outputs.values())).sum(0) if outputs else None
        scalars = {name: value for name, value in _shares(pooled).items() if value is not None}
        return Measurement(self.kind, step, {"norm": total**0.5, **scalars}, rows, {})


def _shares(counts: Tensor | None) -> dict[str, float | None]:
    names = [f"output_{name}" for name in ("zero", *_BELOW)]
    if counts is None or not counts[-1]:
        return dict.fromkeys(names)
    return dict(zip(names, (counts[:-1] / counts[-1]).tolist(), strict=True))
