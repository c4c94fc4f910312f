"""The kernel of the sum over ranks: run by Triton's interpreter, and compiled for GPUs that are not here."""

import re
from pathlib import Path

import pytest
import torch
from offline_triton import compiler, require_triton, resources, run_in_interpreter

from ds_quant.kernels.wire.places import Places
from ds_quant.numerics.wire import WireFormat


@pytest.fixture(autouse=True)
def triton_is_here():
    require_triton()


@pytest.fixture
def compile_for(monkeypatch, tmp_path):
    from ds_quant.kernels.wire.triton_sums import kernel

    return compiler(kernel, monkeypatch, tmp_path)


def launch_of(fmt, world_size, *, is_short=False, num_rows=1000, message_bytes=4096):
    from ds_quant.kernels.wire.triton_sums import launch

    column = torch.zeros(3, dtype=torch.int64)
    piece = torch.zeros(num_rows, dtype=torch.int32)
    places = Places(piece, column, column, column, column, column if is_short else None)
    received = torch.zeros(world_size - 1, message_bytes, dtype=torch.uint8)
    return launch(fmt, places, received, world_size // 2, world_size - 1, torch.zeros(num_rows, fmt.block_size))


def test_interpreted():
    run_in_interpreter(str(Path(__file__).parent / "wire_triton_in_interpreter.py"))


def test_one_kernel_for_every_number_of_ranks(compile_for):
    """From 2 to 4096 ranks: one launch of one compiled kernel, whose code does not grow."""
    from ds_quant.kernels.wire.triton_sums import kernel

    kernel.device_caches.clear()
    for number, world_size in enumerate((2, 3, 4, 16, 256, 4096)):
        launch = launch_of(WireFormat(8, 256), world_size, num_rows=16 * number + 1, message_bytes=4 * number + 8)
        compile_for(launch, 90)
    assert len(kernel.device_caches[90][0]) == 1


@pytest.mark.parametrize("target", [80, 90, 100, "gfx942"])
@pytest.mark.parametrize("is_short", [False, True])
@pytest.mark.parametrize("fmt", [WireFormat(8, 256), WireFormat(4, 4096)], ids=str)
def test_compiled_offline(fmt, is_short, target, compile_for, tmp_path):
    """Products are rounded before they are added, denormals stay, no register spills; LDS is free of tiles."""
    compiled = compile_for(launch_of(fmt, 8, is_short=is_short), target)
    code = compiled.asm
    if target == "gfx942":
        assert compiled.metadata.shared == 0
        assert not re.search(r"\bv_(pk_)?(fma|mac)", code["amdgcn"])
        (spilled,) = re.findall(r"\.vgpr_spill_count:\s*(\d+)", code["amdgcn"])
        assert spilled == "0"
        return
    assert not re.search(r"\bfma\.|\bmad\.\w*\.?f32", code["ptx"])
    assert not re.search(r"\b(add|mul)\.\w*\.?ftz", code["ptx"])
    assert resources(code["cubin"], tmp_path)["LOCAL"] == 0
