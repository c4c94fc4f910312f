"""Memory of messages is allocated once, however sizes change, and no two takers share it."""

from types import SimpleNamespace

import pytest
import torch

from ds_quant.comm import buffers as buffers_module
from ds_quant.comm.buffers import ALIGNMENT, Buffers

CPU = torch.device("cpu")


def begin(buffer):
    return buffer.untyped_storage().data_ptr()


def test_what_is_given_back_is_used_again():
    buffers = Buffers()
    first, second = buffers.take(1000, CPU), buffers.take(1000, CPU)
    assert begin(first) != begin(second), "two that are taken share nothing"
    known = {begin(first), begin(second)}
    buffers.give_back(first)
    buffers.give_back(second)
    for size in (1000, 1, 0, 999, 64):
        pair = [buffers.take(size, CPU), buffers.take(size, CPU)]
        assert {begin(buffer) for buffer in pair} == known
        assert all(buffer.dtype == torch.uint8 and buffer.shape == (size,) for buffer in pair)
        assert all(buffer.is_contiguous() and buffer.data_ptr() % ALIGNMENT == 0 for buffer in pair)
        for buffer in pair:
            buffers.give_back(buffer)


def test_the_smallest_that_fits_is_taken():
    buffers = Buffers()
    taken = {size: buffers.take(size, CPU) for size in (640, 64, 6400)}
    for buffer in taken.values():
        buffers.give_back(buffer)
    assert begin(buffers.take(100, CPU)) == begin(taken[640])
    assert begin(buffers.take(100, CPU)) == begin(taken[6400])
    assert begin(buffers.take(10, CPU)) == begin(taken[64])


def test_a_larger_one_takes_the_place_of_a_smaller():
    """Buckets grow after the first step: what has become too small must not stay for good."""
    buffers = Buffers()
    for size in (100, 1000, 10_000, 9_999, 100):
        buffer = buffers.take(size, CPU)
        assert buffers.num_bytes == 0, "taken"
        buffers.give_back(buffer)
    assert buffers.num_bytes == -(-10_000 // ALIGNMENT) * ALIGNMENT


def test_steps_alike_take_the_same_memory(rng):
    buffers = Buffers()
    sizes = [int(size) for size in rng.integers(1, 5000, 12)]

    def step():
        taken = [buffers.take(size, CPU) for size in sizes]
        for number in rng.permutation(len(taken)):
            buffers.give_back(taken[number])

    step()
    first = buffers.num_bytes
    for _ in range(5):
        step()
    assert sum(sizes) <= first
    assert buffers.num_bytes <= len(sizes) * -(-max(sizes) // ALIGNMENT) * ALIGNMENT, "however orders mix them"
    assert len(buffers._free[CPU]) == len(sizes)


def test_nothing_is_allocated_once_sizes_have_been_seen(rng):
    buffers = Buffers()
    sizes = sorted(int(size) for size in rng.integers(1, 5000, 12))
    seen = []
    for _ in range(3):
        taken = [buffers.take(size, CPU) for size in sizes]
        seen.append({begin(buffer) for buffer in taken})
        for buffer in taken:
            buffers.give_back(buffer)
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.enable_grad, torch.inference_mode], ids=lambda mode: mode.__name__
)
def test_modes_of_autograd_leave_buffers_usable(mode):
    """An all_reduce of a metric under inference_mode() must not spoil the buffers of the next step."""
    buffers = Buffers()
    with mode():
        first = buffers.take(1000, CPU)
        buffers.give_back(first)
    with mode():
        again = buffers.take(100, CPU)
        assert begin(again) == begin(first)
        buffers.give_back(again)
    second = buffers.take(1000, CPU)
    assert begin(second) == begin(first), "a short use has not cut it"
    second[:] = 7
    second.view(torch.float32)[3] = 1.0
    assert not second.is_inference()


def test_devices_are_kept_apart():
    buffers = Buffers()
    meta = buffers.take(64, torch.device("meta"))
    buffers.give_back(meta)
    assert buffers.take(64, CPU).device == CPU
    assert buffers.num_bytes == 64, "the one of the other device lies there still"


def test_streams_of_any_accelerator_are_kept_apart(monkeypatch):
    """Its memory may still be in use by what the other stream was told."""
    device, stream = torch.device("xpu", 0), SimpleNamespace(stream_id=7)
    module = SimpleNamespace(current_stream=lambda asked: {device: stream}[asked])
    monkeypatch.setattr(torch, "get_device_module", lambda asked: module)
    first = buffers_module._place(device)
    assert buffers_module._place(device) == first
    stream.stream_id = 8
    assert buffers_module._place(device) != first
