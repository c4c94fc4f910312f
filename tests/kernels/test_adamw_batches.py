"""Many small parameters in one launch without a GPU: in Triton's interpreter, and compiled for GPUs."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from offline_triton import compiler, require_triton, resources, run_in_interpreter
from works import make_work

FORMATS = {"8/8": (("float", 8), ("float", 8)), "m4v8": (("power", 4), ("float", 8)), "4/4": (("power", 4),) * 2}
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
    from ds_quant.kernels.adamw import compiled, cuda, triton, triton_batches, triton_kernel

    large = []
    monkeypatch.setattr(triton_kernel, "adamw_", large.append)
    monkeypatch.setattr(compiled, "adamw_", large.extend)
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


@pytest.mark.parametrize("target", [80, 90, 100, "gfx942"])
@pytest.mark.parametrize("name", FORMATS)
def test_compiled_offline(name, target, monkeypatch, tmp_path):
    """Without spills, nothing fused into sums, for every dtype that a parameter has."""
    from ds_quant.kernels.adamw import triton_batches

    compile_for = compiler(triton_batches.kernel, monkeypatch, tmp_path)
    for dtypes in ((torch.float32, torch.float32), (torch.bfloat16, torch.float16)):
        (launch,) = triton_batches.launches(works_of((1, 300), name, dtypes))
        code = compile_for(launch, target).asm
        if target == "gfx942":
            assert re.search(r"\.vgpr_spill_count:\s*0\b", code["amdgcn"])
            continue
        assert not re.search(r"\bfma\.rn\.f32|\bmad\.\w*\.?f32", code["ptx"])
        assert resources(code["cubin"], tmp_path)["LOCAL"] == 0


def test_new_steps_and_parameters_compile_nothing(monkeypatch, tmp_path):
    from ds_quant.kernels.adamw import triton_batches

    compile_for = compiler(triton_batches.kernel, monkeypatch, tmp_path)
    triton_batches.kernel.device_caches.clear()
    for step, numels in enumerate(((1,), (255, 3000, 16), (256,) * 17)):
        works = [work._replace(scalars=work.scalars._replace(step_size=float(step))) for work in works_of(numels)]
        (launch,) = triton_batches.launches(works)
        compile_for(launch, 90)
    assert len(triton_batches.kernel.device_caches[90][0]) == 1
