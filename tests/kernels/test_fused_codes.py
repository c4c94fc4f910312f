"""Inductor's kernel of a norm and the codes of its output, compiled for a GPU that is not there."""

import re

import pytest
from offline_triton import compile_generated, require_triton, resources

from benchmarks import generated


@pytest.mark.slow
def test_every_tile_compiles_without_spills(monkeypatch, tmp_path):
    """With divisions that are rounded to nearest, as codes are defined; one at least loads 16 bytes at a time."""
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
