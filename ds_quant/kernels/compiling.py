"""torch.compile as kernels use it, on each torch that is supported."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

_TAKES_LIMIT = "recompile_limit" in inspect.signature(torch.compile).parameters
"""Before 2.13 torch knows one limit for all functions of a process."""


def compile_whole(
    function: Callable[..., Any],
    recompile_limit: int,
    backend: str | Callable = "inductor",
    options: dict[str, Any] | None = None,
    dynamic: bool = True,
) -> Callable[..., Any]:
    """`function` compiled as one graph for all shapes, or without `dynamic` for each shape by itself.

    It is compiled `recompile_limit` times at most, then it raises.

    Functions that share their code, as those that are defined in one place do, do not share that limit: `function` gets
    a copy of its code. `options` are Inductor's.
    """
    function.__code__ = function.__code__.replace()
    if backend == "inductor":
        options = {**(options or {}), **_rounded_divisions()}
    how: dict[str, Any] = {"fullgraph": True, "dynamic": dynamic, "backend": backend, "options": options or None}
    if _TAKES_LIMIT:
        how["recompile_limit"] = recompile_limit
    compiled: Callable[..., Any] = torch.compile(function, **how)
    if _TAKES_LIMIT:
        return compiled

    @functools.wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=recompile_limit):
            return compiled(*args, **kwargs)

    return limited


@functools.cache
def compiled_with(function: Callable[..., Any], value: Any, backend: str | Callable = "inductor") -> Callable[..., Any]:
    """`function(matrix, value, ...)` compiled without its second argument, which is constant: once for each value.

    For all shapes; Inductor rounds to 16 bits where the definition does.
    """

    # Called once, while compiling: what it returns is constant, whereas integers of a closure may become symbols.
    @torch.compiler.assume_constant_result
    def constant() -> Any:
        return value

    def call(matrix: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return function(matrix, constant(), *args, **kwargs)

    # There are 108 kinds of calls of `int8.quantize_both` with the same levels; fewer of others.
    options = {"emulate_precision_casts": True} if backend == "inductor" else None
    return compile_whole(call, 256, backend, options)


def divides_exactly() -> bool:
    """Whether Inductor rounds the divisions of `numerics.integer.divide` to nearest without being told to.

    Torch before 2.13 writes addcdiv as an ordinary division.
    """
    from torch._inductor.lowering import lowerings

    return torch.ops.aten.addcdiv.default in lowerings


def _rounded_divisions() -> dict[str, bool]:
    return {} if divides_exactly() else {"eager_numerics.division_rounding": True}
