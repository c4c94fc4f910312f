"""Gradients on the wire on NVIDIA's GPUs: `compiled`, whose sum over ranks one Triton kernel makes.

Nobody has run it on a GPU yet. The other operations stay with `compiled`.
"""

from typing import Any

from ds_quant.kernels.wire import compiled, ops, triton_sums


@ops.reduce.by("cuda")
def reduce(*arguments: Any, **options: Any) -> None:
    """`numerics.wire.reduce`."""
    compiled.reduce(*arguments, **options, add=triton_sums.add_messages)
