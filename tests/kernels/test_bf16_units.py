"""Which devices multiply bf16 fast."""

import pytest
import torch

from ds_quant.kernels import bf16_units
from ds_quant.kernels.bf16_units import multiplies_bf16_fast

CPU = torch.device("cpu")
NATIVE = {"avx2", "avx512f", "avx512_vnni", "avx512_bf16"}


@pytest.mark.parametrize(
    ("machine", "flags", "limits", "fast"),
    [
        ("x86_64", {"avx2"}, {}, False),
        ("x86_64", {"avx2", "avx512f", "avx512_vnni"}, {}, False),
        ("x86_64", NATIVE, {}, True),
        ("x86_64", {"amx_bf16"}, {}, True),
        ("AMD64", NATIVE, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, True),
        ("x86_64", NATIVE, {"ONEDNN_MAX_CPU_ISA": "avx2"}, False),
        ("x86_64", NATIVE, {"DNNL_MAX_CPU_ISA": "AVX512_CORE_VNNI"}, False),
        ("x86_64", NATIVE, {"ATEN_CPU_CAPABILITY": "avx2"}, False),
        ("x86_64", NATIVE, {"ATEN_CPU_CAPABILITY": "avx512"}, True),
        ("aarch64", {"asimddp", "bf16"}, {}, True),
        ("aarch64", {"asimddp"}, {}, False),
        ("arm64", {"asimddp"}, {}, False),
        ("ppc64le", set(), {}, False),
    ],
)
def test_processors(monkeypatch, machine, flags, limits, fast):
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in limits.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(bf16_units.platform, "machine", lambda: machine)
    monkeypatch.setattr(bf16_units, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert multiplies_bf16_fast(CPU) == fast
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not multiplies_bf16_fast(CPU)


def test_cuda_counts_where_bf16_is_not_emulated(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: including_emulation)
    assert not multiplies_bf16_fast(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: True)
    assert multiplies_bf16_fast(torch.device("cuda"))
