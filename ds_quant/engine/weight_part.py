"""What gathers of weights have in common at all ZeRO stages: what they count and report."""

from typing import Any

import torch

from ds_quant.comm.statistics import Statistics, Traffic
from ds_quant.config import WeightCommunicationConfig
from ds_quant.engine.parts import Part


class WeightPart(Part):
    """Counts what crosses the wire to gather weights, step by step."""

    def __init__(self, engine: Any, config: WeightCommunicationConfig) -> None:
        super().__init__(engine)
        self.config = config
        # On an accelerator, reading errors has the host wait for it at the end of a step: only where somebody looks.
        with_errors = torch.device(engine.device).type == "cpu" or engine.monitor.enabled
        self.statistics = Statistics(with_errors=with_errors and config.mode == "difference")
        self.last_step = self.total = Traffic(0, 0, 0.0, 0.0)
        self.num_steps = 0

    def after_step(self, *, is_whole: bool) -> None:
        if not is_whole:
            return
        self.last_step = self.statistics.take()
        self.total = self.total.plus(self.last_step)
        self.num_steps += 1
        if self.engine.monitor.enabled and self.last_step.sent_bytes:
            figures: dict[str, float] = {"weight_wire_bytes": self.last_step.sent_bytes}
            if self.last_step.squared_norm:
                figures["weight_quantization_error"] = self.last_step.relative_error
            samples = self.engine.global_samples
            events = [(f"Train/ds_quant/{name}", value, samples) for name, value in figures.items()]
            self.engine.monitor.write_events(events)

    def summary(self) -> dict[str, Any]:
        """Of the steps of this process, for its rank: figures for a report; None where nothing crossed a wire."""
        return self.total.summary(self.num_steps, "weight_")
