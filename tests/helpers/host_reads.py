"""Where the host reads what a tensor holds: on an accelerator it would wait there. On the CPU it shows all the same."""

import traceback
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
    aten.unique_dim.default,
}
"""Operations whose result the host needs, or whose shape depends on what a tensor holds."""
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
METHODS = ("tolist", "numpy", "cpu")
"""What reads memory on the CPU, or does nothing there, without an operation."""


class Reads(TorchDispatchMode):
    """Counts reads by the innermost file and function outside of torch that asks for one."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in READS or _takes_mask(function, args) or _repeats_by_tensor(function, args, kwargs):
            self.count()
        return function(*args, **kwargs)

    def count(self):
        frames = [frame for frame in traceback.extract_stack()[:-2] if "/torch/" not in frame.filename]
        _, package, path = frames[-1].filename.rpartition("/ds_quant/")
        path = f"ds_quant/{path}" if package else Path(path).name
        self.found[f"{path}:{frames[-1].name}"] += 1


def _takes_mask(function, args):
    """x[mask] has as many elements as the mask has ones; x[mask] = ... looks for them."""
    if function not in (
        aten.index.Tensor,
        aten.index_put.default,
        aten.index_put_.default,
        aten._index_put_impl_.default,
    ):
        return False
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def _repeats_by_tensor(function, args, kwargs):
    return function is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None


@contextmanager
def reads():
    """Within it, reads are counted; yields them by file and function."""
    counting = Reads()
    with counting, pytest.MonkeyPatch.context() as patch:
        for name in METHODS:
            patch.setattr(torch.Tensor, name, _counted(getattr(torch.Tensor, name), counting))
        yield counting.found


def _counted(method, counting):
    def call(*args, **kwargs):
        counting.count()
        return method(*args, **kwargs)

    return call
