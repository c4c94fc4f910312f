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
    def quantize_rows(x, bits, *, column_scale=None, key=None, full_range=False):
        codes, scale = reference.quantize_rows(x, bits, column_scale=column_scale, key=key, full_range=full_range)
        return codes, 2 * scale

    yield quantize_rows
    registry._serving.cache_clear()


def test_a_backend_serves_what_it_has_where_it_is_chosen(toy, monkeypatch):
    x = torch.randn(3, 20)
    codes, scale = reference.quantize_rows(x, 8)
    monkeypatch.delenv("DS_QUANT_KERNELS", raising=False)
    assert torch.equal(ops.quantize_rows(x, 8)[1], scale)
    usual = dict(registry.report("cpu"))
    assert not any("toy" in text or __name__ in text for text in usual.values())

    monkeypatch.setenv("DS_QUANT_KERNELS", "toy")
    got = ops.quantize_rows(x, 8)
    assert torch.equal(got[0], codes)
    assert torch.equal(got[1], 2 * scale)
    assert ops.quantize_rows.on(CPU) is toy
    compiled = torch.compile(lambda x: ops.quantize_rows(x, 8), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x)[1], 2 * scale)
    assert ops.quantize_rows.on(torch.device("meta")) is reference.quantize_rows
    assert torch.equal(ops.quantize_tensor(x, 8)[1], reference.quantize_tensor(x, 8)[1])

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
    run = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, timeout=200)
    assert run.stdout.splitlines() == [
        "cuda: ds_quant.kernels.wire.compiled",
        "cuda: ds_quant.kernels.wire.triton",
        "cuda: ds_quant.kernels.wire.compiled",
    ], run.stderr
