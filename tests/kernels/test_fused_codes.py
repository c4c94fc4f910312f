"""Inductor's kernels of codes, of int8 after a norm and of fp8 layers, compiled for a GPU that is not there."""

import re

import pytest
from offline_triton import compile_generated, require_triton, resources

from benchmarks import generated


@pytest.mark.slow
def test_every_tile_compiles_without_spills(monkeypatch, tmp_path):
    """With divisions that are rounded to nearest, as codes are defined; one tile at least loads 16 bytes at a time."""
    require_triton()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    (graph,) = generated.norm_to_codes("fused, as layers do", 8192, 2048)
    assert len(graph.kernels) == 1
    loads = []
    for tile, compiled in compile_generated(graph.code, tmp_path, 90):
        used, ptx = resources(compiled.asm["cubin"], tmp_path), compiled.asm["ptx"]
        print(tile, used)
        assert (used["STACK"], used["LOCAL"]) == (0, 0)
        assert "div.rn.f32" in ptx
        loads.append(re.findall(r"\bld\.global\S*\.v4\.b32", ptx))
    assert len(loads) > 1
    assert any(loads)


@pytest.mark.slow
@pytest.mark.parametrize(("gradient", "scales"), [("e5m2", ""), ("e4m3", ", a scale a tensor")])
def test_kernels_of_an_fp8_layer_compile_without_spills(gradient, scales, monkeypatch, tmp_path):
    """All of them, forward and backward; every code is a quotient that is rounded to nearest."""
    require_triton()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    graphs = generated.layer(generated.linear, f"fp8, {gradient} gradient{scales}", 2048, 8192)
    assert len(graphs) == 2
    for graph in graphs:
        ptx = ""
        for tile, compiled in compile_generated(graph.code, tmp_path, 90):
            used = resources(compiled.asm["cubin"], tmp_path)
            print(tile, used)
            assert (used["STACK"], used["LOCAL"]) == (0, 0)
            ptx += compiled.asm["ptx"]
        assert "div.rn.f32" in ptx
        assert "div.full.f32" not in ptx
        assert "div.approx" not in ptx
