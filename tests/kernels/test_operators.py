"""Operators of graphs: what autograd and the compiler see of them, and that their names and schemas stay."""

import pytest
import torch

from ds_quant.kernels.int8 import ops as int8
from ds_quant.kernels.simulated import ops as simulated

OURS = torch.ops.ds_quant
SCHEMAS = {
    "quantize_rows": "(Tensor x, float levels, Tensor? column_scale=None, Tensor? key=None) -> (Tensor, Tensor)",
    "quantize_operand": "(Tensor x, float levels, str granularity, Tensor? factor=None, Tensor? key=None, "
    'SymInt stream=0, str ways="both") -> (Tensor, Tensor, Tensor)',
    "scaled_matmul": "(Tensor a, Tensor b, Tensor? row_scale, Tensor? column_scale, Tensor? bias, ScalarType dtype) "
    "-> Tensor",
    "rotate_rows": "(Tensor x, SymInt block_size, Tensor? key=None) -> Tensor",
    "token_mean": "(Tensor x) -> Tensor",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_names_and_schemas_stay(name):
    """Exported graphs hold both."""
    operator = getattr(OURS, name).default
    assert str(operator._schema) == f"ds_quant::{name}{SCHEMAS[name]}"
    assert torch.Tag.pt2_compliant_tag in operator.tags


def test_autograd_sees_nothing():
    x = torch.randn(5, 16, requires_grad=True)
    for found in (*OURS.quantize_rows(x, 127.0), OURS.rotate_rows(x, 16), OURS.token_mean(x)):
        assert not found.requires_grad
    compiled = torch.compile(lambda x: int8.quantize_rows(x, 127.0), backend="aot_eager", fullgraph=True)
    assert not any(found.requires_grad for found in compiled(x))


def test_operators_hold_what_they_promise():
    x, key = torch.randn(5, 32), torch.tensor([3, 4])
    for operator, arguments in (
        (simulated.rotate_rows.operator, (x, 16)),
        (simulated.rotate_rows.operator, (x.t().contiguous().t().bfloat16(), 32, key)),
        (simulated.token_mean, (x.half(),)),
        (simulated.token_mean, (x[:0],)),
    ):
        torch.library.opcheck(operator, arguments)


def test_nothing_is_compiled_within_one():
    """A backward may run while the step around it is compiled: what an operator calls is no part of a graph then."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        @torch._dynamo.disable(recursive=False)
        def backward(ctx, g):
            return OURS.token_mean(g).expand_as(g)

    def step(x):
        y = Function.apply(x).square().sum()
        torch._dynamo.graph_break()
        y.backward()

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    x = torch.randn(4, 3, requires_grad=True)
    torch.compile(step, backend=backend)(x)
    torch.testing.assert_close(x.grad, (2 * x.detach()).mean(0).expand_as(x))
    called = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert "square" in called
    assert not {"float", "sum_1", "truediv", "detach"} & called, "what token_mean does"
