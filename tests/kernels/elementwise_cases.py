"""Works of Lion, SGD and AdEMAMix for tests of the kernels: made from a generator, copied, compared."""

import torch
from kernels.works import KEY, assert_same_bits, copy_moment, make_moment, rough_values

from ds_quant.kernels.elementwise.work import ElementwiseWork
from ds_quant.numerics.ademamix import ademamix_rule, ademamix_scalars
from ds_quant.numerics.lion import lion_rule, lion_scalars
from ds_quant.numerics.sgd import sgd_rule, sgd_scalars

RULES = {
    "lion": (lion_rule, lion_scalars(0.01, (0.9, 0.98), 0.1), 1),
    "sgd": (sgd_rule, sgd_scalars(0.1, 0.9, 0.3, 0.01, False, 3), 1),
    "nesterov": (sgd_rule, sgd_scalars(0.1, 0.9, 0.0, 0.01, True, 3), 1),
    "ademamix": (ademamix_rule, ademamix_scalars(0.01, (0.9, 0.95, 0.99), 4.0, 7, 5, 1e-8, 0.1, 3), 3),
}
"""The rule, scalars of a step, and how many states it has: the third is not signed."""


def make_work(rng, rule, numel, forms, block_sizes=(256, 256, 256), *, stochastic=True, dtypes=None, stream=9):
    """`forms` and `block_sizes` of three states, of which a rule takes those that it has."""
    function, scalars, count = RULES[rule]
    param_dtype, grad_dtype = dtypes or (torch.float32, torch.float32)
    values = rough_values(rng, numel)
    states = [
        make_moment(values.square() * 2 if i == 2 else values, forms[i], block_sizes[i], i != 2) for i in range(count)
    ]
    param, grad = rough_values(rng, numel), rough_values(rng, numel)
    edges = torch.tensor([torch.inf, torch.nan, -torch.inf, 3e38, -3e38, -0.0, 0.0, 1e-40])
    if numel > 2 * len(edges):
        grad[: len(edges)], param[8:16] = edges, edges
    keys = [KEY if stochastic else None] * count
    return ElementwiseWork(function, param.to(param_dtype), grad.to(grad_dtype), states, scalars, keys, stream)


def copy_work(work):
    return work._replace(param=work.param.clone(), states=[copy_moment(state) for state in work.states])


def assert_same(got, expected, context=""):
    """Bit for bit, but that any NaN equals any other."""
    assert_same_bits("param", got.param, expected.param, context)
    for number, (left, right) in enumerate(zip(got.states, expected.states, strict=True)):
        pairs = [(left, right)] if isinstance(left, torch.Tensor) else zip(left[:2], right[:2], strict=True)
        for part, (one, other) in enumerate(pairs):
            assert_same_bits(f"states[{number}][{part}]", one, other, context)
