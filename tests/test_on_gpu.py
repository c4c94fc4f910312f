"""What a GPU adds to the tests: the numbers of the kernels that only it runs, and that nothing waits for them.

The parts of `launchers/gpu_check.py` that are right or wrong, whatever the card. Its dry run, a test of
its own, keeps them from rotting without a GPU. Verdicts are those of its promises.
"""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

from benchmarks import recipes
from benchmarks.device_timing import host_waits
from benchmarks.gpu_check import kernels, layers, optimizer, optimizers, promises, triton_kernels
from benchmarks.gpu_check.optimizer import gpt2_shapes
from benchmarks.gpu_check.recording import Record
from benchmarks.linear_contenders import Operands
from ds_quant.comm.exchange import Call
from ds_quant.comm.layout import Span
from ds_quant.comm.reducer import Reducer
from ds_quant.comm.statistics import Statistics
from ds_quant.config import GradientCommunicationConfig

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")


@pytest.mark.parametrize(
    ("part", "within", "measures"),
    [
        (kernels._quantizers, nullcontext, {"quantizer_differences"}),
        (kernels._keys, nullcontext, {"key_differences"}),
        (kernels._wire, nullcontext, {"wire_share_different", "wire_sum_roundings"}),
        (triton_kernels._gemm, triton_kernels.by_triton, {"gemm_differences"}),
        (triton_kernels._adamw, triton_kernels.by_triton, {"adamw_differences"}),
        (optimizer._closeness, nullcontext, {"codes_different", "parameters_off", "nonfinite_off"}),
        (layers._numbers, nullcontext, {"layer_errors"}),
        (layers._launches, nullcontext, {"launches_nearest", "launches_stochastic", "host_waits"}),
        (layers._memory, nullcontext, {"int32_in_memory"}),
    ],
)
def test_kernels_keep_what_is_promised(part, within, measures, tmp_path):
    record = Record(tmp_path / "step.json", seconds=600, dry_run=False)
    with within():
        part(record)
    result = {"state": "done", "dry_run": False, **record.content}
    verdicts = {p.measure: promises.judge(p, result) for p in promises.PROMISES if p.measure in measures}
    assert verdicts.keys() == measures
    assert {name: verdict.outcome for name, verdict in verdicts.items()} == dict.fromkeys(measures, promises.HELD)


def test_a_step_of_small_and_large_parameters_waits_for_nothing():
    numels = [torch.Size(shape).numel() for shape in gpt2_shapes(hidden=64, vocabulary=500, positions=64)]
    for name in optimizers.FORMATS:
        params = [torch.nn.Parameter(torch.randn(numel, device=DEVICE)) for numel in numels]
        ours = optimizers.make(name, params)
        for param in params:
            param.grad = torch.randn_like(param)
        ours.step()
        ours.step()
        assert host_waits(ours.step, DEVICE) == "", name


@pytest.mark.parametrize("settings", [{}, {"rounding": "stochastic", "error_feedback": True}], ids=str)
def test_an_all_reduce_waits_for_nothing(settings):
    """Among ranks that are not there: nothing travels, all else is done."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():  # left by another test of this process
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        config = GradientCommunicationConfig.parse({"bits": 8, **settings})
        reducer = Reducer(config, statistics=Statistics())
        tensor, spans = torch.randn(100_001, device=DEVICE), [Span("x", 0, 0, 0, 100_001)]

        def call():
            reducer.all_reduce([tensor], spans, Call(1 / 8, reducer.key(1, 0)))

        call()
        call()
        assert host_waits(call, DEVICE) == ""
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["int8", "simulated"])
def test_a_layer_waits_for_nothing_with_stochastic_rounding(backend):
    section = recipes.w8a8g8(backend, rounding="stochastic")
    operands = Operands.draw(257, 768, 3072, bias=True, device=DEVICE)
    layer = layers.Layer(layers._layer("linear", operands, torch.bfloat16, section), operands, torch.bfloat16)
    for _ in range(2):
        layer.forward_backward()
        layer.clear()
    assert host_waits(layer.forward_backward, DEVICE) == ""
