"""`torch.compile(mode="reduce-overhead")`, as far as it shows without a GPU: what a CUDA graph would hold of a model.

A CUDA graph replays kernels on the memory and with the numbers of its capture. So a graph of a model must take its keys
as inputs, be on one device, write to none of its inputs and wait for nothing. `meta` stands for the GPU here.
"""

import pytest
import torch
from functorch.compile import make_boxed_func
from helpers.linear_oracle import W8A8G8_INT8
from linear.padded_backend import NAMES, add_padded_backend
from test_int8 import TOKENS, step, tiny
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.utils import get_first_incompatible_cudagraph_node

from ds_quant.kernels import registry
from ds_quant.linear.convert import convert, remove_forward_counter, step_key_of
from ds_quant.linear.weight_codes import weights_changed

pytestmark = pytest.mark.thorough

SIMULATED = {**W8A8G8_INT8, "backend": "simulated"}
CHANGES = {"resid_pdrop": 0, "attn_pdrop": 0, "embd_pdrop": 0, "use_cache": False}
"""No dropout, and no cache of keys and values, which makes tensors of its own."""


def small():
    model = tiny("gpt2", **CHANGES)
    model.transformer.h = model.transformer.h[:1]
    return model


def recorder(graphs):
    """A backend that keeps what it is given, and runs it as CUDA graphs run: inputs are copied to where those of the
    first call were."""

    def keep(graph, inputs):
        graphs.append(graph)
        memory = []

        def replay(*values):
            if not memory:
                memory.extend(value.clone() if isinstance(value, torch.Tensor) else value for value in values)
            for there, value in zip(memory, values, strict=True):
                if isinstance(there, torch.Tensor):
                    there.copy_(value)
            return [value.clone() if isinstance(value, torch.Tensor) else value for value in graph(*memory)]

        return make_boxed_func(replay)

    return aot_autograd(fw_compiler=keep)


def assert_fit(graph, device):
    """Nothing that Inductor leaves out of CUDA graphs, and nothing that would be as it was at the capture."""
    assert get_first_incompatible_cudagraph_node(graph) is None
    for node in graph.graph.nodes:
        assert node.op != "get_attr", f"{node} is a tensor of its own"
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            assert not node.target._schema.is_mutable, f"{node} writes to what it is given"
        value = node.meta.get("val")
        for each in value if isinstance(value, tuple | list) else (value,):
            assert not isinstance(each, torch.Tensor) or each.device.type == device, f"{node} is on {each.device}"


def keys_in(graph):
    """The inputs that are keys: int64 [2]."""
    values = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    return [v for v in values if isinstance(v, torch.Tensor) and v.dtype == torch.int64 and v.shape == (2,)]


@pytest.fixture
def padded(monkeypatch):
    """Layers go the way of GPUs, by operations that a graph holds."""
    calls = add_padded_backend(monkeypatch)
    monkeypatch.setenv("DS_QUANT_KERNELS", "padded")
    weights_changed()
    yield calls
    weights_changed()
    registry._serving.cache_clear()


def test_replays_of_padded_operations(padded):
    """As below, with the operations that layers call on GPUs."""
    test_replays_of_later_steps_round_as_those_steps_do(W8A8G8_INT8)
    assert {name for name, *_ in padded} == set(NAMES)


@pytest.mark.parametrize("config", [W8A8G8_INT8, SIMULATED], ids=["int8", "simulated"])
def test_replays_of_later_steps_round_as_those_steps_do(config):
    model = small()
    convert(model, config)
    remove_forward_counter(model)
    want = [step(model, model, TOKENS, number) for number in (1, 2)]
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(model, fullgraph=True, backend=recorder(graphs))
    step_key_of(model).set(0)
    for number, expected in zip((1, 2), want, strict=True):
        for got, wanted in zip(step(model, compiled, TOKENS, number), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert not torch.equal(want[0][1], want[1][1]), "two steps drew the same bits"
    assert len(graphs) == 2, "a forward and a backward, for all steps"
    for graph in graphs:
        assert_fit(graph, "cpu")
        assert keys_in(graph)


@pytest.mark.parametrize("config", [W8A8G8_INT8, SIMULATED], ids=["int8", "simulated"])
def test_all_is_on_the_device(config):
    """One node on the CPU has Inductor leave a whole graph as it is."""
    model = small()
    convert(model, config)
    remove_forward_counter(model)
    model.to("meta")
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(model, fullgraph=True, backend=recorder(graphs))
    step(model, compiled, TOKENS.to("meta"))
    assert len(graphs) == 2
    for graph in graphs:
        assert_fit(graph, "meta")


def test_the_count_of_forwards_stays_out():
    """A model that no engine drives takes its next key in a graph of its own, which is not captured."""
    model = small()
    convert(model, W8A8G8_INT8)
    torch._dynamo.reset()
    graphs = []
    step(model, torch.compile(model, fullgraph=True, backend=recorder(graphs)), TOKENS, None)
    counting, forward, backward = graphs
    assert get_first_incompatible_cudagraph_node(counting).target == torch.ops.ds_quant.next_keys.default
    for graph in (forward, backward):
        assert_fit(graph, "cpu")
        assert keys_in(graph)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [W8A8G8_INT8, SIMULATED], ids=["int8", "simulated"])
def test_on_a_gpu(config):
    """The mode itself: three steps, of which the last one is a replay, beside eager ones."""
    model = small().cuda()
    convert(model, config)
    remove_forward_counter(model)
    tokens = TOKENS.cuda()
    want = [step(model, model, tokens, number) for number in (1, 2, 3)]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for number, expected in zip((1, 2, 3), want, strict=True):
        torch.compiler.cudagraph_mark_step_begin()
        for got, wanted in zip(step(model, compiled, tokens, number), expected, strict=True):
            # Inductor sums in another order than eager kernels do.
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)
