"""Keys of a step: what they are, and that no device computes them or is waited for."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ds_quant.linear import step_key
from ds_quant.linear.step_key import StepKey
from ds_quant.numerics.random import derive_key, fold_key

CPU, META = torch.device("cpu"), torch.device("meta")


class OnDevice(TorchDispatchMode):
    """Names and arguments of the operations that touch the meta device, which stands for a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, list | tuple) else [result]
        if any(isinstance(t, torch.Tensor) and t.is_meta for t in (*args, *results)):
            self.found.append((func.overloadpacket.__name__, dict(kwargs or {})))
        return result


def test_what_keys_are():
    key = StepKey(seed=2**70 + 5, rank=3)
    for step, micro_step in ((0, 0), (7, 2), (7, 1 << 32)):
        key.set(step, micro_step)
        key.begin_forward()
        local, replicated = fold_key(5, step, micro_step, 4), fold_key(5, step, micro_step, 0)
        for number in range(3):
            if number:
                call = step_key._CALLS | number
                want = derive_key(local, call), derive_key(replicated, call)
            else:
                want = local, replicated
            got = key.keys_of_call(8, CPU)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert torch.equal(key.keys_of_call(12, CPU)[0], local)


def test_no_device_computes_keys_or_is_waited_for():
    """One table a micro step is sent, and none where a layer is called again but its own."""
    key = StepKey(seed=1)
    key.local(META)
    sent = [("_to_copy", True), ("unbind", None)]
    for step in (1, 2):
        with OnDevice() as device:
            key.set(step)
        assert [(name, kwargs.get("non_blocking")) for name, kwargs in device.found] == sent
        key.begin_forward()
        with OnDevice() as device:
            for stream in (0, 4, 8):
                keys = key.keys_of_call(stream, META)
        assert device.found == []
        assert [t.shape for t in keys] == [(2,), (2,)]
        with OnDevice() as device:
            key.keys_of_call(4, META)
        assert [(name, kwargs.get("non_blocking")) for name, kwargs in device.found] == sent


def test_cuda_graphs_do_not_hold_keys():
    assert torch.Tag.cudagraph_unsafe in torch.ops.ds_quant.next_keys.default.tags
