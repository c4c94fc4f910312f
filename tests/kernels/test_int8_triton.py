"""The int8 products of `triton_int8` without a GPU: in Triton's interpreter, and compiled for two of them."""

import re
from pathlib import Path

import pytest
import torch
from offline_triton import compiler, has_triton_from, require_triton, resources, run_in_interpreter

HERE = Path(__file__).parent
# M and N for which the table gives each tile, multiples of it and not.
SIZES = {"128x256": 4096, "128x128": 1536, "64x128": 1024, "64x64": 512}
LAYOUTS = {"padded": "NT", "b by rows": "NN", "a by columns": "TN"}
"""The first is that of layers, in all their products."""
MOST_REGISTERS = {
    80: {"128x256": 255, "128x128": 255, "64x128": 255, "64x64": 168},
    90: {"128x256": 255, "128x128": 128, "64x128": 168, "64x64": 128},
    100: {"128x256": 255, "128x128": 255, "64x128": 255, "64x64": 168},
}
"""Of a thread. With 65536 on a multiprocessor: 1, 2, 3 and 4 programs for sm_90, 1, 1, 2 and 3 for sm_80 and sm_100."""
MOST_BEFORE_3_8 = {**MOST_REGISTERS, 80: {**MOST_REGISTERS[80], "64x64": 128}}
"""Up to Triton 3.7, sm_80 has 4 of the smallest."""
MOST_SHARED_MEMORY = 99 * 1024
"""Bytes that sm_86 and sm_89 have for one program."""
LDS = 64 * 1024
"""Bytes that gfx942 has for one."""


@pytest.fixture(scope="module", autouse=True)
def needs_triton():
    require_triton()


def test_interpreter():
    run_in_interpreter(HERE / "int8_triton_in_interpreter.py")


def test_quantizers_in_interpreter():
    run_in_interpreter(HERE / "int8_quantize_in_interpreter.py")


@pytest.fixture
def compile_for(monkeypatch, tmp_path):
    """Compiles what `launch_of` makes with the tiles of a GPU."""
    from ds_quant.kernels.int8 import triton

    compile_launch = compiler(triton.kernel, monkeypatch, tmp_path)

    def compile_for_gpu(capability, *sizes, **options):
        tiles = triton.ROCM_TILES if isinstance(capability, str) else triton.tiles_for(capability // 10)
        monkeypatch.setattr(triton, "tiles_of", lambda device: tiles)
        return compile_launch(launch_of(*sizes, **options), capability)

    return compile_for_gpu


def launch_of(layout, m, n, k, dtype=torch.bfloat16, has_vectors=True):
    from ds_quant.kernels.int8.triton import launch

    a = torch.empty((m, k) if layout[0] == "N" else (k, m), dtype=torch.int8)
    b = torch.empty((k, n) if layout[1] == "N" else (n, k), dtype=torch.int8)
    vectors = (torch.empty(m), torch.empty(n), torch.empty(n, dtype=torch.bfloat16)) if has_vectors else ()
    return launch(
        a if layout[0] == "N" else a.t(),
        b if layout[1] == "N" else b.t(),
        torch.empty(m, n, dtype=dtype),
        *vectors,
    )


def assert_instructions(ptx, capability, layout):
    """All products on the integer tensor cores, and what each layout costs as the module docstring has it."""
    products = set(re.findall(r"\b(?:w?g?mma\.(?:mma_async\.)?sync\.aligned|tcgen05\.mma)\.\S+", ptx))
    if capability == 90:
        pattern = r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8"
    elif capability == 100 and has_triton_from(3, 8):
        pattern = r"tcgen05\.mma\.cta_group::1\.kind::i8"
    else:
        pattern = r"mma\.sync\.aligned\.m16n8k32\.row\.col(\.satfinite)?\.s32\.s8\.s8\.s32"
    assert products
    assert all(re.fullmatch(pattern, name) for name in products), products
    assert not re.search(r"\bfma\.|\bmad\.\w*\.?f32", ptx)
    num_along_k = (layout[0] == "N") + (layout[1] == "T")
    # Whole 16 bytes at a time wherever they are contiguous along k.
    assert ("cp.async.cg" in ptx) == (num_along_k > 0)
    assert ("ld.shared.b8" in ptx) == (capability == 80 and num_along_k < 2)
    assert ("cp.async.ca" in ptx) == (capability == 80 and num_along_k < 2)
    assert bool(re.search(r"\bst\.shared(::cta)?\.b8", ptx)) == (capability == 90 and num_along_k < 2)
    # Nothing loads single bytes.
    assert not re.search(r"\bld\.global\S*b8", ptx)


@pytest.mark.parametrize(
    ("name", "product", "capability"),
    [
        *((name, "padded", capability) for name in SIZES for capability in MOST_REGISTERS),
        *(("128x256", product, capability) for product in list(LAYOUTS)[1:] for capability in (80, 90)),
    ],
)
def test_compiles(name, product, capability, compile_for, tmp_path):
    layout = LAYOUTS[product]
    for size in (SIZES[name], SIZES[name] + 16):
        compiled = compile_for(capability, layout, size, size, 4 * size)
        used, shared = resources(compiled.asm["cubin"], tmp_path), compiled.metadata.shared
        print(name, product, f"sm_{capability}", size, used, shared)
        spilled = 8 if (name, capability) == ("128x256", 100) and has_triton_from(3, 8) else 0
        assert (used["STACK"], used["LOCAL"]) == (spilled, 0)
        most = (MOST_REGISTERS if has_triton_from(3, 8) else MOST_BEFORE_3_8)[capability][name]
        assert used["REG"] <= most
        assert shared <= MOST_SHARED_MEMORY
        assert_instructions(compiled.asm["ptx"], capability, layout)


@pytest.mark.parametrize("name", SIZES)
def test_compiles_for_amd(name, compile_for, monkeypatch):
    """On integer matrix units, without spills, within LDS: whichever tile is chosen, for even sizes and others."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for size in (SIZES[name], SIZES[name] + 16):
        compiled = compile_for("gfx942", "NT", size, size, 4 * size)
        code = compiled.asm["amdgcn"]
        assert re.findall(r"v_mfma\w+", code)
        assert all(found.startswith("v_mfma_i32") and found.endswith("_i8") for found in re.findall(r"v_mfma\w+", code))
        assert re.findall(r"\.vgpr_spill_count:\s*(\d+)", code) == ["0"]
        print(name, size, compiled.metadata.shared)
        assert compiled.metadata.shared <= LDS
        assert 64 * compiled.metadata.num_warps <= 1024  # threads


def test_tiles_of_gpus(monkeypatch):
    """By what is installed and where a launch is; `test_compiles` tells which of them spill, on each Triton."""
    from ds_quant.kernels.int8 import triton
    from ds_quant.kernels.int8.triton import AMPERE_TILES, BLACKWELL_TILES, TILES, choose_tile, tiles_for

    for tiles in (AMPERE_TILES, BLACKWELL_TILES):
        assert choose_tile(4096, 4096, tiles) == tiles[0] != TILES[0]
        assert choose_tile(1, 1, tiles) == TILES[-1]
    assert has_triton_from(3, 8) == triton._IS_NEW
    monkeypatch.setattr(triton, "_IS_NEW", False)
    assert [tiles_for(major) for major in (8, 9, 10, 12)] == [TILES] * 4
    monkeypatch.setattr(triton, "_IS_NEW", True)
    assert [tiles_for(major) for major in (8, 9, 10, 12)] == [AMPERE_TILES, TILES, BLACKWELL_TILES, TILES]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert triton.tiles_of(torch.device("cuda", 93)) == AMPERE_TILES
    monkeypatch.setattr(triton, "tiles_of", lambda device: AMPERE_TILES)
    launch = launch_of("NT", 4096, 4096, 64)
    assert launch.options["num_stages"] == AMPERE_TILES[0].num_stages
    assert launch.grid == ((4096 // AMPERE_TILES[0].m) * (4096 // AMPERE_TILES[0].n),)


def test_table():
    from ds_quant.kernels.int8.triton import TILES, choose_tile

    names = dict(zip(SIZES, TILES, strict=True))
    for name, size in SIZES.items():
        assert f"{names[name].m}x{names[name].n}" == name
        assert choose_tile(size, size) == choose_tile(size + 16, size + 16) == names[name]
    assert choose_tile(1, 1) == choose_tile(1, 100_000) == choose_tile(100_000, 1) == TILES[-1]
    assert choose_tile(64, 100_000) == names["64x128"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32], ids=str)
@pytest.mark.parametrize("capability", [80, 90])
def test_other_results(dtype, capability, compile_for, tmp_path):
    compiled = compile_for(capability, "NT", 512, 512, 512, dtype, has_vectors=False)
    assert resources(compiled.asm["cubin"], tmp_path)["LOCAL"] == 0
    assert_instructions(compiled.asm["ptx"], capability, "NT")
    # fp16 without a detour is the same: what fp32 does not hold is Inf.
    conversions = set(re.findall(r"\bcvt\.r\S*s32", compiled.asm["ptx"]))
    expected = {torch.int32: set(), torch.float32: {"cvt.rn.f32.s32"}, torch.float16: {"cvt.rn.f16.s32"}}
    assert conversions == expected[dtype]


@pytest.mark.parametrize("capability", [80, 90])
def test_odd_sizes(capability, compile_for, tmp_path):
    """Copied operands: no size is a multiple of anything, and one row or column."""
    for m, n, k in ((1000 - 1, 50257, 77), (1, 33, 15), (33, 1, 4097)):
        compiled = compile_for(capability, "TN", m, n, k)
        used = resources(compiled.asm["cubin"], tmp_path)
        print(m, n, k, used)
        assert (used["STACK"], used["LOCAL"]) == (0, 0)
        assert_instructions(compiled.asm["ptx"], capability, "NT")


def test_launches_do_not_compile_again(compile_for):
    """New numbers of tokens are the same kernel, save that the tile divides them or not."""
    from ds_quant.kernels.int8.triton import kernel

    kernel.device_caches.clear()
    for num_tokens in (4096, 8192, 16384):
        compile_for(90, "NT", num_tokens, 4096, 1024)
    assert len(kernel.device_caches[90][0]) == 1
    for num_tokens in (4096 + 16, 8192 + 48):
        compile_for(90, "NT", num_tokens, 4096, 1024)
    assert len(kernel.device_caches[90][0]) == 2


# ---- the quantizers


def quantizer_launches(monkeypatch, kind, dtype, is_stochastic):
    """Those of an operand or a gradient of 8192 tokens and 3072 features."""
    from ds_quant.kernels.int8 import triton_quantize

    found = []
    monkeypatch.setattr(triton_quantize, "run", lambda launch, device: found.append(launch))
    key = torch.zeros(2, dtype=torch.int64) if is_stochastic else None
    x = torch.empty(8192, 3072, dtype=dtype)
    if kind == "gradient":
        scales = {"column_scale": torch.empty(3072), "row_scale": torch.empty(8192)}
        triton_quantize.quantize_gradient(x, 127.0, **scales, key=key, row_stream=1, column_stream=2, sums=True)
    else:
        triton_quantize.quantize_operand(x, 127.0, granularity=kind, key=key, stream=1)
    return found


KINDS = {
    "row": ["group_kernel"],
    "column": ["group_kernel"],
    "tensor": ["scan_kernel", "tile_kernel"],
    "gradient": ["scan_kernel", "tile_kernel"],
}


@pytest.mark.parametrize(
    ("kind", "capability", "roundings"),
    [
        *(("row", 90, (False, True)), ("column", 90, (False,)), ("tensor", 90, (True,)), ("gradient", 90, (True,))),
        *((kind, capability, (True,)) for kind in ("row", "gradient") for capability in (80, 100)),
        *((kind, 100, (True,)) for kind in ("column", "tensor")),
    ],
)
def test_quantizers_compile(kind, capability, roundings, monkeypatch, tmp_path):
    """No spills; operands and codes, turned ones as well, in 16 bytes at a time; divisions rounded to nearest."""
    for is_stochastic in roundings:
        launches = quantizer_launches(monkeypatch, kind, torch.bfloat16, is_stochastic)
        assert [launch.kernel.fn.__name__ for launch in launches] == KINDS[kind]
        for launch in launches:
            compiled = compiler(launch.kernel, monkeypatch, tmp_path)(launch, capability)
            used, ptx = resources(compiled.asm["cubin"], tmp_path), compiled.asm["ptx"]
            print(kind, launch.kernel.fn.__name__, f"sm_{capability}", launch.grid, used)
            assert (used["STACK"], used["LOCAL"]) == (0, 0)
            assert not re.search(r"\b(ld|st)\.global\S*\.b8\b", ptx)
            assert not re.search(r"\bfma\.|\bdiv\.(?!rn\.f32)\S*f32", ptx)
            assert re.search(r"\bld\.global\S*v4\.b32", ptx)
            if launch.kernel.fn.__name__ != "scan_kernel":
                # Each thread stores as much of its codes as it does of its turned ones.
                assert len(re.findall(r"\bst\.global\S*v4\.b32", ptx)) % 2 == 0
                assert re.search(r"\bst\.global\S*v4\.b32", ptx)
            if launch.kernel.fn.__name__ != "scan_kernel":
                assert is_stochastic == (str(0x21F0AAAD) in ptx)


@pytest.mark.parametrize("kind", ["row", "column", "gradient"])
def test_quantizers_compile_for_amd(kind, monkeypatch, tmp_path):
    """Without spills, and within LDS; divisions are whole sequences, whose last steps round to nearest."""
    for launch in quantizer_launches(monkeypatch, kind, torch.bfloat16, True):
        compiled = compiler(launch.kernel, monkeypatch, tmp_path)(launch, "gfx942")
        code = compiled.asm["amdgcn"]
        assert re.findall(r"\.vgpr_spill_count:\s*(\d+)", code) == ["0"]
        assert compiled.metadata.shared <= LDS
        if launch.kernel.fn.__name__ != "scan_kernel":
            assert "v_div_fixup_f32" in code


def test_new_keys_and_streams_do_not_compile_again(monkeypatch, tmp_path):
    from ds_quant.kernels.int8 import triton_quantize
    from ds_quant.kernels.int8.quantize_kernels import group_kernel

    launches = []
    monkeypatch.setattr(triton_quantize, "run", lambda launch, device: launches.append(launch))
    compile_launch = compiler(group_kernel, monkeypatch, tmp_path)
    group_kernel.device_caches.clear()
    for stream in (0, 1, 2, 16, 2**31 + 5, (3 << 32) + 16):
        x, key = torch.empty(8192, 768, dtype=torch.bfloat16), torch.tensor([stream, 7])
        triton_quantize.quantize_operand(x, 127.0, granularity="row", key=key, stream=stream)
        compile_launch(launches[-1], 90)
    assert len(group_kernel.device_caches[90][0]) == 1
