"""Quantizers of layers in floating point as Inductor generates them for a GPU, compiled for one that is not there."""

import pytest
import torch
from offline_triton import compile_generated, require_triton, resources

from benchmarks.generated_code import generate
from ds_quant.base.number_formats import FORMATS
from ds_quant.kernels.simulated import compiled
from ds_quant.numerics.format import named_format


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_compiles_for_hopper_without_spills(monkeypatch, tmp_path, name, rounding):
    """Each kernel in one of the tiles at least that Inductor would choose among; quotients are rounded to nearest."""
    require_triton()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    how = named_format(name, "row"), rounding

    def call(x, key):
        codes, scale, *_ = compiled._quantize(x, how, None, key if rounding == "stochastic" else None)
        return codes, scale

    (graph,) = generate(call, torch.empty(8192, 2048, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int64))
    assert (graph.libraries, graph.operators) == ([], [])
    fits, divides = dict.fromkeys(graph.kernels, False), False
    for _, found in compile_generated(graph.code, tmp_path, 90):
        used = resources(found.asm["cubin"], tmp_path)
        fits[found.metadata.name] |= (used["STACK"], used["LOCAL"]) == (0, 0)
        divides |= "div.rn.f32" in found.asm["ptx"]
    assert list(fits) == graph.kernels
    assert all(fits.values()), fits
    assert divides
