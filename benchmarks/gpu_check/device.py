"""Step 1: what the device is, its bandwidth, and its rate in bf16."""

from __future__ import annotations

import torch

from benchmarks.device_timing import Timer
from benchmarks.gpu_check.recording import Record

_HOPPER = (9, 0)
_ROUNDS = 5


def run(record: Record) -> None:
    """Measure copies and GEMMs."""
    device = record.device
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        record.row(
            "device",
            name=found.name,
            capability=f"{found.major}.{found.minor}",
            multiprocessors=found.multi_processor_count,
            memory_gb=found.total_memory / 1e9,
            cuda=torch.version.cuda or "",
            hip=torch.version.hip or "",
            cudnn=str(torch.backends.cudnn.version()),
        )
    figures = {
        "copy_tb_per_s": _copy(record, record.pick(2**31, 2**20)),
        "bf16_tflops": _gemm(record, record.pick(8192, 64)),
    }
    # Predictions are made for one kind of GPU: another is not measured by them.
    expected = device.type == "cpu" or torch.cuda.get_device_capability(device) == _HOPPER
    for key, value in figures.items():
        if expected:
            record.measure(key, value)
        else:
            record.not_measured(key, "predictions are for compute capability 9.0")


def _copy(record: Record, num_bytes: int) -> float:
    """TB/s, bytes read and written."""
    source = torch.zeros(num_bytes // 4, device=record.device)
    target = torch.empty_like(source)
    timed = Timer(lambda: target.copy_(source), record.device, iterations=10).measure(_ROUNDS)
    rate = 2 * source.nbytes / timed.device / 1e12
    record.row("rates", what=f"copy of {num_bytes / 2**20:.0f} MiB", ms=timed.device * 1e3, rate=rate, unit="TB/s")
    return rate


def _gemm(record: Record, size: int) -> float:
    """TF/s."""
    a, b = (torch.randn(size, size, device=record.device, dtype=torch.bfloat16) for _ in range(2))
    timed = Timer(lambda: torch.mm(a, b), record.device, iterations=10).measure(_ROUNDS)
    rate = 2 * size**3 / timed.device / 1e12
    record.row("rates", what=f"bf16 GEMM of {size}^3", ms=timed.device * 1e3, rate=rate, unit="TF/s")
    return rate
