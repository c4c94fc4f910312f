"""The Triton kernel without a GPU: in Triton's interpreter, and compiled for two of them."""

import re
from pathlib import Path

import pytest
import torch
from offline_triton import accesses, compiler, has_triton_from, require_triton, resources, run_in_interpreter

from ds_quant.kernels.adamw.work import AdamWWork
from ds_quant.numerics import code_map, fold_key, quantize_blockwise
from ds_quant.numerics.adam import adamw_scalars

HERE = Path(__file__).parent
MOST_REGISTERS = {True: 72, False: 64}
"""A thread of a program that has whole blocks, from Triton 3.8 on and before: 7 and 8 programs of 4 warps to a
multiprocessor."""


@pytest.fixture(scope="module", autouse=True)
def needs_triton():
    require_triton()


def test_interpreter():
    run_in_interpreter(HERE / "adamw_triton_in_interpreter.py")


FORMATS = {
    "8/8": (("power", 8, 256), ("power", 8, 256)),
    "float 8/8": (("float", 8, 256), ("float", 8, 256)),
    "4/4": (("power", 4, 128), ("power", 4, 128)),
    "m4v8": (("power", 4, 128), ("power", 8, 256)),
    "m4vlog": (("power", 4, 128), ("log", 4, 128)),
    "m8v32": (("power", 8, 256), None),
    "linear 4/4 of 32": (("linear", 4, 32), ("linear", 4, 32)),
    "8/8 of 2048": (("power", 8, 2048), ("power", 8, 2048)),
}


def make_work(length, layouts, dtype=torch.float32, grad_dtype=None, stochastic=True):
    moments = [torch.zeros(length), torch.zeros(length)]
    for number, layout in enumerate(layouts):
        if layout:
            kind = code_map(layout[0], layout[1], signed=number == 0)
            moments[number] = quantize_blockwise(moments[number], kind, block_size=layout[2])
    key = tuple(fold_key(1).tolist()) if stochastic and layouts[1] else None
    return AdamWWork(
        torch.zeros(length, dtype=dtype),
        torch.zeros(length, dtype=grad_dtype or dtype),
        *moments,
        adamw_scalars(1e-3, (0.9, 0.999), 1e-8, 0.01, 2),
        None,
        key,
        0,
    )


@pytest.fixture
def compile_for(monkeypatch, tmp_path):
    """Compiles a launch exactly as if it were made on a GPU of a compute capability, and gives the PTX and cubin."""
    from ds_quant.kernels.adamw.triton_kernel import kernel

    compile_launch = compiler(kernel, monkeypatch, tmp_path)
    return lambda launch, capability: compile_launch(launch, capability).asm


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", FORMATS)
def test_compiles(name, capability, compile_for, tmp_path):
    """No spills, wide accesses, no product fused into a sum, divisions and roots rounded to nearest."""
    from ds_quant.kernels.adamw.triton_kernel import launches

    layouts = FORMATS[name]
    whole, tail = launches(make_work(2 * 4096 + 1, layouts))
    code = compile_for(whole, capability)
    used, ptx = resources(code["cubin"], tmp_path), code["ptx"]
    seen = accesses(ptx)
    print(name, f"sm_{capability}", used, dict(seen))
    assert used["REG"] <= MOST_REGISTERS[has_triton_from(3, 8)]
    assert (used["STACK"], used["LOCAL"]) == (0, 0)
    # Parameters, gradients and 32-bit moments four at a time, 8-bit codes four and 4-bit codes eight at a time.
    num_full = 2 * layouts.count(None)
    codes = sum(2 if layout[1] == 8 else 1 for layout in layouts if layout)
    scales = sum(2 if layout[0] == "log" else 1 for layout in layouts if layout)
    narrow = {"ld.b32": codes + scales, "st.b32": codes + scales}
    assert seen == {"ld.v4.b32": 4 + num_full, "st.v4.b32": 2 + num_full, **narrow}
    assert_exact(ptx)
    used = resources(compile_for(tail, capability)["cubin"], tmp_path)
    assert (used["STACK"], used["LOCAL"]) == (0, 0)


def assert_exact(ptx):
    assert not re.search(r"\bfma\.|\bmad\.\w*\.?f32", ptx)
    assert "div.rn.f32" in ptx
    assert "sqrt.rn.f32" in ptx
    assert not re.search(r"\bdiv\.(full|approx)", ptx)
    # Sums and products keep denormals.
    assert not re.search(r"\b(add|sub|mul)\.\w*\.?ftz", ptx)


@pytest.mark.parametrize("capability", [80, 90])
def test_largest_blocks_do_not_spill(capability, compile_for, tmp_path):
    from ds_quant.kernels.adamw.triton_kernel import launches

    for name in ("power", "float"):
        for launch in launches(make_work(4097, ((name, 8, 4096), (name, 8, 4096)))):
            used = resources(compile_for(launch, capability)["cubin"], tmp_path)
            assert (used["STACK"], used["LOCAL"]) == (0, 0)


@pytest.mark.parametrize("layouts", [FORMATS["m4v8"], (("float", 8, 4096), ("power", 8, 4096))], ids=str)
def test_compiles_for_amd(layouts, compile_for, monkeypatch):
    """Within 1024 threads and 64 KiB of LDS, without spills, and with divisions that are rounded to nearest."""
    from ds_quant.kernels.adamw.triton_kernel import launches

    monkeypatch.setattr(torch.version, "hip", "6.4")
    for launch in launches(make_work(2 * 4096 + 1, layouts)):
        assert 64 * launch.options["num_warps"] <= 1024
        code = compile_for(launch, "gfx942")["amdgcn"]
        assert re.search(r"\.vgpr_spill_count:\s*0\b", code)
        (size,) = re.findall(r"\.group_segment_fixed_size:\s*(\d+)", code)
        assert int(size) <= 65536
        # A quotient of its own is an estimate that is refined, and fixed up at the edges of the range.
        assert code.count("v_div_fixup_f32") == code.count("v_div_fmas_f32") > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compiles_for_half_precision(dtype, compile_for, tmp_path):
    from ds_quant.kernels.adamw.triton_kernel import launches

    code = compile_for(launches(make_work(8192, FORMATS["8/8"], dtype, torch.float32))[0], 90)
    seen = accesses(code["ptx"])
    assert (seen["ld.v2.b32"], seen["st.v2.b32"], seen["ld.v4.b32"]) == (2, 2, 2)
    name = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    assert re.search(rf"cvt\.rn\.{name}(x2)?\.f32", code["ptx"])
    assert resources(code["cubin"], tmp_path)["LOCAL"] == 0
    assert_exact(code["ptx"])


def test_launches_do_not_compile_again(compile_for):
    """New keys, scalars and lengths of one format are one kernel, and one for tails."""
    from ds_quant.kernels.adamw.triton_kernel import kernel, launches

    kernel.device_caches.clear()
    for length, key in ((4096 + 3, (0, 1)), (16 * 256 * 16 + 5, (2**32 - 1, 2**31)), (256 + 255, (16, 2**31 - 1))):
        work = make_work(length, FORMATS["m4v8"])._replace(exp_avg_sq_key=key, stream=length)
        scalars = adamw_scalars(1, (0, 1 - 1e-9), 0, 0, length)
        for launch in launches(work._replace(scalars=scalars)):
            compile_for(launch, 90)
    assert len(kernel.device_caches[90][0]) == 2


@pytest.mark.parametrize(
    ("layouts", "reason"),
    [
        ((("dynamic", 8, 256), None), "exp_avg has the dynamic map"),
        ((None, ("linear", 8, 8193)), "exp_avg_sq has blocks of 8193"),
        ((("power", 4, 256), ("power", 8, 128)), "exp_avg has 4 bits and larger blocks"),
    ],
)
def test_formats_that_it_refuses(layouts, reason):
    from ds_quant.kernels.adamw.triton_kernel import adamw_, unsupported

    work = make_work(2 * 8193 if "8193" in reason else 512, layouts, stochastic=False)
    assert unsupported(work).startswith(reason)
    with pytest.raises(ValueError, match="allowed: others"):
        adamw_(work)


def test_maps_that_it_refuses():
    from ds_quant.kernels.adamw.triton_kernel import unsupported

    work = make_work(512, FORMATS["8/8"])
    for changes in ({"exponent": 16}, {"levels": 1000, "offset": 900}, {"levels": 300}):
        strange = work.exp_avg_sq._replace(code_map=work.exp_avg_sq.code_map._replace(**changes))
        assert "a map of its own" in unsupported(work._replace(exp_avg_sq=strange))
    assert unsupported(work) is None
