"""One backend more, for one operation: chosen by the environment, in the report, and nowhere else."""

import subprocess
import sys

import pytest
import torch

from ds_quant.base.errors import ConfigError
from ds_quant.kernels import choice, registry
from ds_quant.kernels.adamw.ops import adamw_
from ds_quant.kernels.int8 import ops
from ds_quant.numerics import products as reference

CPU = torch.device("cpu")


@pytest.fixture
def toy(monkeypatch):
    """A backend that serves only by choice and has one operation: twice the scale."""
    monkeypatch.setattr(registry, "BACKENDS", [*registry.BACKENDS])
    monkeypatch.setattr(registry, "CHOICES", [*choice.CHOICES])
    monkeypatch.setattr(choice, "CHOICES", registry.CHOICES)
    monkeypatch.setattr(ops.quantize_rows, "implementations", {**ops.quantize_rows.implementations})
    registry.add_backend(registry.Backend("toy", ("cpu",), by_choice=True))

    @ops.quantize_rows.by("toy")
    def quantize_rows(x, levels, *, column_scale=None, key=None):
        codes, scale = reference.quantize_rows(x, levels, column_scale=column_scale, key=key)
        return codes, 2 * scale

    yield quantize_rows
    registry._serving.cache_clear()


def test_a_backend_serves_what_it_has_where_it_is_chosen(toy, monkeypatch):
    x = torch.randn(3, 20)
    codes, scale = reference.quantize_rows(x, 127.0)
    monkeypatch.delenv("DS_QUANT_KERNELS", raising=False)
    assert torch.equal(ops.quantize_rows(x, 127.0)[1], scale)
    usual = dict(registry.report("cpu"))
    assert not any("toy" in text or __name__ in text for text in usual.values())

    monkeypatch.setenv("DS_QUANT_KERNELS", "toy")
    got = ops.quantize_rows(x, 127.0)
    assert torch.equal(got[0], codes)
    assert torch.equal(got[1], 2 * scale)
    assert ops.quantize_rows.on(CPU) is toy
    compiled = torch.compile(lambda x: ops.quantize_rows(x, 127.0), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x)[1], 2 * scale)
    assert ops.quantize_rows.on(torch.device("meta")) is reference.quantize_rows
    assert torch.equal(ops.quantize_tensor(x, 127.0)[1], reference.quantize_tensor(x, 127.0)[1])

    title = ops.FAMILY.title
    found = dict(registry.report("cpu"))
    assert f"cpu: {__name__} (quantize_rows)" in found[title].split("; ")
    assert found | {title: usual[title]} == usual
    assert ops.quantize_rows.after("toy", CPU) is not toy


def test_the_environment_may_name_it_only_where_there_is_one(toy, monkeypatch):
    monkeypatch.setenv("DS_QUANT_KERNELS", "toys")
    with pytest.raises(
        ConfigError, match='got "toys"; allowed: reference or triton or compiled or toy; fix: correct it'
    ):
        adamw_.implementation("cpu")


def test_the_file_of_a_backend_is_all_that_it_takes(tmp_path):
    """`wire/triton.py`, say: nothing imports it but the registry, when it is chosen."""
    (tmp_path / "triton.py").write_text(
        "from ds_quant.kernels.wire import ops\nops.quantize.by('triton')(lambda *arguments, **options: None)\n"
    )
    program = (
        "import os, sys; from ds_quant.kernels import registry, wire; wire.__path__.append(sys.argv[1]);"
        "registry.BACKENDS[0] = registry.BACKENDS[0]._replace(is_usable=lambda family: True);"
        "print(wire.quantize.implementation('cuda')); os.environ['DS_QUANT_KERNELS'] = 'triton';"
        "print(wire.quantize.implementation('cuda')); print(wire.reduce.implementation('cuda'))"
    )
    run = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, timeout=600)
    assert run.stdout.splitlines() == [
        "cuda: ds_quant.kernels.wire.compiled",
        "cuda: ds_quant.kernels.wire.triton",
        "cuda: ds_quant.kernels.wire.compiled",
    ], run.stderr


@pytest.fixture
def a_gpu(monkeypatch):
    """One of a compute capability that the test sets, as far as the registry asks."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.delenv("DS_QUANT_KERNELS", raising=False)

    def set_capability(capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        registry._serving.cache_clear()
        registry._is_ready.cache_clear()

    yield set_capability
    registry._serving.cache_clear()
    registry._is_ready.cache_clear()


def test_gpus_sum_over_ranks_and_step_small_parameters_in_triton(a_gpu, monkeypatch):
    from ds_quant.kernels import adamw, wire

    gpu = torch.device("cuda", 0)
    a_gpu((9, 0))
    assert wire.reduce.on(gpu) is wire.cuda.reduce
    assert adamw_.on(gpu) is adamw.cuda.adamw_
    monkeypatch.setenv("DS_QUANT_KERNELS", "compiled")
    assert wire.reduce.on(gpu) is wire.compiled.reduce
    assert adamw_.on(gpu) is adamw.compiled.adamw_


def test_gpus_pad_their_operands_where_triton_multiplies_them(a_gpu, monkeypatch):
    from ds_quant.kernels.int8 import compiled, cuda, triton

    gpu = torch.device("cuda", 0)
    a_gpu((9, 0))
    assert ops.pads(gpu)
    assert ops.padded_matmul.on(gpu) is cuda.padded_matmul
    assert ops.quantize_operand.on(gpu) is triton.triton_quantize.quantize_operand
    monkeypatch.setenv("DS_QUANT_KERNELS", "triton")
    assert ops.padded_matmul.on(gpu) is triton.padded_matmul
    for choice_made in ("compiled", "reference"):
        monkeypatch.setenv("DS_QUANT_KERNELS", choice_made)
        assert not ops.pads(gpu)
    monkeypatch.setenv("DS_QUANT_KERNELS", "compiled")
    assert ops.scaled_matmul.on(gpu) is compiled.scaled_matmul
    assert not ops.pads(CPU)
    monkeypatch.delenv("DS_QUANT_KERNELS")
    a_gpu((7, 5))
    assert not ops.pads(gpu)
    a_gpu((9, 0))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not ops.pads(gpu)


def test_reports_leave_out_what_is_not_called(a_gpu):
    assert "padded_matmul" not in dict(registry.report("cpu"))[ops.FAMILY.title]
    a_gpu((9, 0))
    assert "padded_matmul" in dict(registry.report("cuda"))[ops.FAMILY.title]
