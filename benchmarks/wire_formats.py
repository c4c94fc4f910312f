"""What a message in each 4-bit format takes to make and to add, beside int4: `python -m benchmarks.wire_formats`.

One process with one thread quantizes a piece of fp32 into a message, and adds a message to its own piece, as one of two
ranks does. Formats take turns; processor seconds are compared, which other jobs do not move much.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.timing import ratios, spread, take_turns
from ds_quant.cli.shared.tables import environment
from ds_quant.kernels import wire
from ds_quant.kernels.wire import Parts, WireFormat, code_bytes, scale_bytes

FORMATS = {
    "int4, blocks of 128": WireFormat(4, 128),
    "fp4_e2m1, blocks of 128": WireFormat(4, 128, "none", "fp4_e2m1"),
    "mxfp4": WireFormat(4, 32, "none", "mxfp4"),
    "nvfp4": WireFormat(4, 16, "none", "nvfp4"),
    "nvfp4, four_six": WireFormat(4, 16, "none", "nvfp4", "four_six"),
    "nvint4": WireFormat(4, 16, "none", "nvint4"),
}
BASE = "int4, blocks of 128"
NUMEL = 1 << 19
ROUNDS, WARM_UP = 21, 2
KEY = (1, 2)


def main() -> None:
    """Measure, and print a line for each format: nanoseconds an element, and in brackets times those of int4."""
    torch.set_num_threads(1)
    where = environment(torch.device("cpu"))
    print(f"{where['processor']}, 1 thread, torch {where['torch']}, {where['commit']}")
    x, columns = torch.randn(NUMEL), {}
    for title in ("quantizing", "stochastically", "summing"):
        calls = {name: _call(title, x, fmt) for name, fmt in FORMATS.items()}
        seconds = take_turns(calls, rounds=ROUNDS, warm_up=WARM_UP, device=torch.device("cpu"), clock=time.process_time)
        times = ratios(seconds, BASE)
        columns[title] = {
            name: f"{spread(seconds[name]).p50 * 1e9 / NUMEL:.2f} ({times[name].p50:.1f})" for name in FORMATS
        }
    print("| | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name in FORMATS:
        print(f"| {name} | " + " | ".join(column[name] for column in columns.values()) + " |")


def _call(title: str, x: torch.Tensor, fmt: WireFormat) -> Callable[[], None]:
    """One of the operations of a rank with a single piece."""
    codes_at = scale_bytes(NUMEL, fmt)
    source, start, numel, scale_at, at = (np.array([value]) for value in (0, 0, NUMEL, 0, codes_at))
    parts = Parts(source, start, numel, scale_at, at, np.zeros(1, dtype=np.uint64))
    message = torch.zeros(codes_at + code_bytes(NUMEL, fmt), dtype=torch.uint8)
    if title != "summing":
        key = KEY if title == "stochastically" else None
        return lambda: wire.quantize([x], parts, message, fmt, key=key)
    wire.quantize([x], parts, message, fmt)
    received, total = message[None], torch.empty(NUMEL)
    return lambda: wire.reduce([x], parts, received, 0, fmt, output=total)


if __name__ == "__main__":
    main()
