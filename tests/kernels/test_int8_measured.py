"""Which way multiplies a shape: measured once, kept on disk, and never taken from what is damaged."""

import functools
import json
import math
import threading

import pytest
import torch

from ds_quant.kernels.int8 import aten, matmul, measured
from ds_quant.kernels.int8.measured import Measured, bucket, read, write
from ds_quant.numerics import products as reference

WAYS = {"triton": lambda: 1, "int_mm": lambda: 2}


class Clock:
    """A timer that gives what it was told to, and counts."""

    def __init__(self, *times):
        self.times, self.calls = list(times), 0

    def __call__(self, ways):
        self.calls += 1
        return self.times.pop(0)


def test_a_shape_is_measured_once(tmp_path):
    path = tmp_path / "cache" / "times.json"
    clock = Clock({"triton": 2.0, "int_mm": 1.0}, {"triton": 1.0, "int_mm": 3.0})
    table = Measured(path, clock)
    assert table.known("a") is None
    for _ in range(2):
        assert (table.quickest("a", WAYS), table.quickest("b", WAYS)) == ("int_mm", "triton")
    assert table.known("a") == "int_mm"
    assert clock.calls == 2
    other = Measured(path, None)
    assert (other.quickest("a", WAYS), other.quickest("b", WAYS)) == ("int_mm", "triton")
    assert [file.name for file in path.parent.iterdir()] == ["times.json"]


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[1]", "null", '{"a": 1}', '{"a": {}}', '{"a": {"triton": 0, "int_mm": 1}}'),
        *('{"a": {"triton": NaN, "int_mm": 1}}', '{"a": {"triton": "x"}}', '{"a": {"triton": 1}}', "\0" * 40),
    ],
)
def test_what_is_damaged_is_measured_again(tmp_path, content):
    path = tmp_path / "times.json"
    path.write_text(content)
    clock = Clock({"triton": 2.0, "int_mm": 1.0})
    assert Measured(path, clock).quickest("a", WAYS) == "int_mm"
    assert clock.calls == 1
    assert read(path) == {"a": {"triton": 2.0, "int_mm": 1.0}}


def test_a_way_that_fails_is_tried_again_by_the_next_process(tmp_path):
    path = tmp_path / "times.json"
    table = Measured(path, Clock({"triton": math.inf, "int_mm": 1.0}))
    assert [table.quickest("a", WAYS) for _ in range(2)] == ["int_mm"] * 2
    assert read(path) == {}


def test_without_a_folder_times_stay_in_memory(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    clock = Clock({"triton": 2.0, "int_mm": 1.0}, {"triton": 2.0, "int_mm": 1.0})
    table = Measured(tmp_path / "file" / "times.json", clock)
    assert [table.quickest(shape, WAYS) for shape in "abab"] == ["int_mm"] * 4
    assert clock.calls == 2
    assert caplog.text.count("set DS_QUANT_CACHE to a folder of your own") == 1


def test_writers_at_once_leave_a_whole_file(tmp_path):
    path = tmp_path / "times.json"

    def work(number):
        for count in range(20):
            write(path, {**read(path), f"{number} {count}": {"triton": 1.0}})

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            json.loads(path.read_text())
    for thread in threads:
        thread.join()
    assert read(path)
    assert [file.name for file in tmp_path.iterdir()] == ["times.json"]


def test_buckets():
    assert [bucket(size) for size in (1, 7, 8, 9, 768, 769, 3072, 14336, 50257)] == [
        *(1, 7, 8, 10, 768, 896, 3072, 14336, 57344)
    ]
    for size in range(1, 5000):
        assert size <= bucket(size) <= size * 1.25 + 1
        assert bucket(bucket(size)) == bucket(size)


@pytest.mark.parametrize("scratch", [1, 4 * 20 * 64, 2**20])
@pytest.mark.parametrize("shape", [(1, 5, 3), (17, 40, 33), (150, 16, 20), (129, 33, 50)], ids=str)
def test_int_mm_of_padded_operands(monkeypatch, shape, scratch):
    """In parts of rows, each of more than 16, none of them a copy of an operand."""
    monkeypatch.setattr(matmul, "_DEVICE_SCRATCH_BYTES", scratch)
    monkeypatch.setattr(matmul, "LEAST_ROWS", 48)
    m, n, k = shape
    a, b = (torch.randint(-127, 128, (rows, k), dtype=torch.int8) for rows in (m, n))
    padded = reference.padded(a), reference.padded(b)
    options = {"row_scale": torch.rand(m), "column_scale": torch.rand(n), "bias": torch.randn(n)}
    calls, real = [], torch._int_mm

    def int_mm(left, right):
        assert left.shape[0] > 16
        assert right.data_ptr() == padded[1].data_ptr()
        assert left.data_ptr() - padded[0].data_ptr() in range(padded[0].numel()) or m <= 16
        calls.append(left.shape[0] * right.shape[1])
        return real(left, right)

    monkeypatch.setattr(torch, "_int_mm", int_mm)
    for dtype in (torch.float32, torch.bfloat16):
        finish = functools.partial(reference.epilogue, **options, dtype=dtype)
        got = aten.int_mm_of_padded(*padded, m, n, finish)
        assert torch.equal(got, reference.padded_matmul(*padded, m, n, **options, dtype=dtype))
    assert max(calls) <= max(scratch // 4, 48 * padded[1].shape[0])


def test_the_quicker_way_multiplies(monkeypatch):
    """The backend's choice, on a CPU that stands for a GPU: both ways, none while a graph is captured."""
    pytest.importorskip("triton")
    from ds_quant.kernels.int8 import cuda
    from ds_quant.kernels.integer_units import IntegerUnits

    clock = Clock({"triton": 2.0, "int_mm": 1.0}, {"triton": 1.0, "int_mm": 2.0})
    table = Measured(None, clock)
    monkeypatch.setattr(cuda, "_table", lambda device: table)
    monkeypatch.setattr(cuda, "integer_units", lambda device: IntegerUnits(True, "tensor cores"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(cuda.triton, "padded_matmul", lambda *args, **options: "triton")
    monkeypatch.setattr(cuda, "by_int_mm", lambda *args, **options: "int_mm")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    a, b = torch.zeros(16, 16, dtype=torch.int8), torch.zeros(32, 16, dtype=torch.int8)
    assert [cuda.padded_matmul(a, b, 16, 32, dtype=torch.float32) for _ in range(2)] == ["int_mm"] * 2
    assert cuda.padded_matmul(a, b, 16, 32, dtype=torch.bfloat16) == "triton"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert cuda.padded_matmul(a, b, 16, 32, dtype=torch.float32) == "int_mm"
    assert cuda.padded_matmul(a, b, 15, 31, dtype=torch.float16) == "triton"
    assert clock.calls == 2
    monkeypatch.setattr(cuda, "integer_units", lambda device: IntegerUnits(False, "tensor cores"))
    assert cuda.padded_matmul(a, b, 16, 32, dtype=torch.float32) == "triton"


def test_times_are_told_by_device_events(monkeypatch):
    """A way that fails has infinite time, and where all fail the first use says so."""

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = now[0]

        def elapsed_time(self, other):
            return other.time - self.time

    now = [0.0]

    def way(cost):
        def run():
            now[0] += cost

        return run

    def fails():
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert measured.device_milliseconds({"a": way(2.0), "b": way(3.0)}) == {"a": 2.0, "b": 3.0}
    assert measured.device_milliseconds({"a": fails, "b": way(3.0)}) == {"a": math.inf, "b": 3.0}
    with pytest.raises(RuntimeError, match="int8 products: got an error from each of "):
        measured.device_milliseconds({"a": fails})
