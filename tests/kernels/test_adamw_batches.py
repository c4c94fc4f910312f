"""Many small parameters in one launch without a GPU: in Triton's interpreter, and compiled for GPUs."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from offline_triton import accesses, compiler, has_triton_from, require_triton, resources, run_in_interpreter
from works import make_work

FORMATS = {"8/8": (("float", 8), ("float", 8)), "m4v8": (("power", 4), ("float", 8)), "4/4": (("power", 4),) * 2}
MOST_REGISTERS = {True: 96, False: 72}
"""A thread of a program that has whole blocks, from Triton 3.8 on and before: 5 and 7 programs of 4 warps to a
multiprocessor."""
GPT2 = [(50257 * 768,), (1024 * 768,), *[(768,)] * 2] + 12 * [
    *((768,), (768,), (768 * 2304,), (2304,), (768 * 768,), (768,)),
    *((768,), (768,), (768 * 3072,), (3072,), (3072 * 768,), (768,)),
]


@pytest.fixture(autouse=True)
def needs_triton():
    require_triton()


def works_of(numels, name="8/8", dtypes=None):
    rng = np.random.default_rng()
    return [
        make_work(rng, numel, *FORMATS[name], stochastic=(True, True), dtypes=dtypes, stream=number)
        for number, numel in enumerate(numels)
    ]


def test_interpreted():
    run_in_interpreter(Path(__file__).parent / "adamw_batches_in_interpreter.py")


@pytest.mark.parametrize("choice", ["", "triton"])
def test_launches_of_gpt2(monkeypatch, choice):
    """98 of its 148 parameters are biases and norms, and take one launch."""
    from ds_quant.kernels.adamw import cuda, triton, triton_batches, triton_kernel

    large = []
    monkeypatch.setattr(triton_kernel, "adamw_", large.append)
    launched = []
    monkeypatch.setattr(triton_batches, "run", lambda launch, device: launched.append(launch))
    # Nothing is computed here: the smallest one that is not batched stands for a matrix.
    works = []
    for number, (numel,) in enumerate(GPT2):
        (work,) = works_of((min(numel, triton_batches.MOST_ELEMENTS + 1),))
        works.append(work._replace(stream=number))
    (triton if choice else cuda).adamw_(works)
    assert len(GPT2) == 148
    assert (len(launched), len(large)) == (1, 50)
    small = [numel for (numel,) in GPT2 if numel <= triton_batches.MOST_ELEMENTS]
    assert launched[0].grid == (sum(-(-numel // triton_kernel.TILE) for numel in small),)


def test_formats_that_the_kernel_does_not_take_are_compiled(monkeypatch):
    from ds_quant.kernels.adamw import compiled, cuda, triton_batches, triton_kernel

    taken = {}
    monkeypatch.setattr(triton_kernel, "adamw_", lambda work: taken.setdefault("alone", []).append(work))
    monkeypatch.setattr(triton_batches, "adamw_", lambda works: taken.update(together=list(works)))
    monkeypatch.setattr(compiled, "adamw_", lambda works: taken.update(compiled=list(works)))
    rng = np.random.default_rng()
    dynamic = (("dynamic", 8), ("dynamic", 8))
    large, small = triton_batches.MOST_ELEMENTS + 1, 256
    works = [
        make_work(rng, numel, *layouts, stochastic=(False, False), dtypes=None, stream=number)
        for number, (numel, layouts) in enumerate(
            [(large, FORMATS["8/8"]), (large, dynamic), (small, dynamic), (small, FORMATS["4/4"]), (0, FORMATS["8/8"])]
        )
    ]
    cuda.adamw_(works)
    assert {way: [work.stream for work in given] for way, given in taken.items()} == {
        "alone": [0],
        "together": [3],
        "compiled": [1, 2],
    }


@pytest.mark.parametrize("target", [80, 90, 100, "gfx942"])
@pytest.mark.parametrize("name", FORMATS)
def test_compiled_offline(name, target, monkeypatch, tmp_path):
    """Without spills, nothing fused into sums, for every dtype that a parameter has. Whole blocks are read and written
    as widely as by a launch for one tensor."""
    from ds_quant.kernels.adamw import triton_batches, triton_kernel

    compile_for = compiler(triton_batches.kernel, monkeypatch, tmp_path)
    compile_alone = compiler(triton_kernel.kernel, monkeypatch, tmp_path)
    for dtypes in ((torch.float32, torch.float32), (torch.bfloat16, torch.float16)):
        works = works_of((768, 1, 300), name, dtypes)
        whole, tails = triton_batches.launches(works)
        # Half precision changes nothing in what is done to tails.
        for launch in (whole, tails) if dtypes[0] == torch.float32 else (whole,):
            code = compile_for(launch, target).asm
            if target == "gfx942":
                assert re.search(r"\.vgpr_spill_count:\s*0\b", code["amdgcn"])
                continue
            assert not re.search(r"\bfma\.rn\.f32|\bmad\.\w*\.?f32", code["ptx"])
            used = resources(code["cubin"], tmp_path)
            print(name, target, dtypes, used, dict(accesses(code["ptx"])))
            assert (used["STACK"], used["LOCAL"]) == (0, 0)
            if launch is tails:
                continue
            assert used["REG"] <= MOST_REGISTERS[has_triton_from(3, 8)]
            seen = accesses(code["ptx"])
            wide = "v4.b32" if dtypes[0] == torch.float32 else "v2.b32"
            assert seen[f"ld.{wide}"] == 2 * seen[f"st.{wide}"] == 4
            assert not seen.keys() & {"ld.b8", "st.b8", "ld.b16", "st.b16"}
            if target != 90:
                continue
            # The table's row and what is in it, 64 bits each; the rest is as for one tensor.
            (alone,) = triton_kernel.launches(works[0])
            expected = accesses(compile_alone(alone, target).asm["ptx"])
            assert {name: n for name, n in seen.items() if name != "ld.b64"} == {
                name: n for name, n in expected.items() if name != "ld.b64"
            }


def test_new_steps_and_parameters_compile_nothing(monkeypatch, tmp_path):
    from ds_quant.kernels.adamw import triton_batches

    compile_for = compiler(triton_batches.kernel, monkeypatch, tmp_path)
    triton_batches.kernel.device_caches.clear()
    for step, numels in enumerate(((1,), (255, 3000, 16), (257,) * 17, (256,), (512, 768))):
        works = [work._replace(scalars=work.scalars._replace(step_size=float(step))) for work in works_of(numels)]
        (launch,) = triton_batches.launches(works)
        compile_for(launch, 90)
    assert len(triton_batches.kernel.device_caches[90][0]) == 2  # whole blocks, and others


def test_refused_while_a_graph_is_captured(monkeypatch):
    """What a step is passed as numbers would be in the graph as it is now."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from ds_quant.kernels.adamw import ops
    from ds_quant.kernels.transfers import sent

    works = works_of((768, 300))
    with FakeTensorMode():
        on_gpu = [work._replace(param=torch.empty(work.param.shape, device="cuda")) for work in works]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(
        RuntimeError, match="bias corrections and random keys of one step while a CUDA graph is captured"
    ):
        ops.adamw_(on_gpu)
    with pytest.raises(RuntimeError, match="call this once before the graph is captured"):
        sent(np.zeros(3), torch.device("cuda"))
    before = works[0].param.clone()
    ops.adamw_(works)
    assert not torch.equal(works[0].param, before)
