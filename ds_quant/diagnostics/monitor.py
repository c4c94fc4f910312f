"""Measurements as events of DeepSpeed's monitor: TensorBoard, Weights & Biases, Comet or CSV, as its JSON says."""

from collections.abc import Iterable
from typing import Any

from ds_quant.diagnostics.measurement import Measurement

PREFIX = "Train/ds_quant"


def events(measurements: Iterable[Measurement], samples: int) -> list[tuple[str, float, int]]:
    """(name, value, samples seen) of each scalar, named Train/ds_quant/KIND/NAME."""
    return [
        (f"{PREFIX}/{found.kind}/{name}", value, samples)
        for found in measurements
        for name, value in found.scalars.items()
    ]


def write_events(engine: Any, measurements: Iterable[Measurement]) -> None:
    """Hand them to the engine's monitor where one is on; that writes on rank 0."""
    if engine.monitor.enabled:
        engine.monitor.write_events(events(measurements, engine.global_samples))
