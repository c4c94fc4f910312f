"""On which kind of processor a figure was made: to the last digit, runs end alike on the same kind alone."""

from __future__ import annotations

from typing import Any

from ds_quant.cli.shared import processors


def kind(processor: str) -> str:
    """The kind that the column `processor` means."""
    # Lines of the CSV that tell no instructions were all made with these.
    return processor if processors.WITH in processor else f"{processor}{processors.WITH}{processors.VNNI}"


def where(device: str) -> dict[str, Any]:
    """What `results.of_run` says of the machine."""
    import torch

    from ds_quant.cli.shared.tables import environment

    found = environment(torch.device(device))
    return {**found, "processor": processors.kind(torch.device(device))}
