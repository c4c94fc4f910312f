"""The codes of a weight as its owners have sent them, put together: a layer may multiply these as they are."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_quant.comm.weight_codes import scale_of
from ds_quant.comm.weight_layout import Coding, Run


class ReceivedCodes:
    """Of one weight, bit for bit what its layers would make of it.

    Args:
        shape: of the weight, two dimensions.
        start: its first element within the group that runs count from.
    """

    def __init__(self, shape: Sequence[int], coding: Coding, start: int, device: torch.device) -> None:
        self.start = start
        channels = shape[0] if coding.side == "row" else shape[1]
        self.codes = torch.empty(*shape, dtype=torch.int8, device=device)
        """int8, of the weight's shape."""
        self.scale = torch.empty(channels, dtype=torch.float32, device=device)
        """fp32, of each row or column."""

    def put(self, run: Run, codes: Tensor, absmax: Tensor) -> None:
        """Take in what `weight_codes.sent_codes` has found of a run of this weight."""
        begin = run.start - self.start
        self.codes.view(-1)[begin : begin + run.numel].copy_(codes)
        if run.kind == "shared" and run.first_column >= 0:  # elements of columns, which come again and again
            absmax = absmax[: run.width]
            columns = torch.arange(run.first_column, run.first_column + len(absmax), device=absmax.device) % run.width
            self.scale[columns] = scale_of(absmax, run.bits)
            return
        first = 0 if run.kind == "columns" else begin // run.width
        self.scale[first : first + len(absmax)] = scale_of(absmax, run.bits)
