"""Step 2: torch._int_mm in every layout of its operands: right, wrong, or refused, and how fast."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks.device_timing import Timer
from benchmarks.gpu_check.recording import Record

# M, K, N: a large square one, a small layer's, a vocabulary that is no multiple of 4, a contraction that is none of 16.
_SIZES = ((4096, 4096, 4096), (2048, 768, 3072), (2048, 768, 50257), (2048, 1000, 3072))
_SMALL = ((32, 64, 32), (32, 64, 50), (32, 40, 32))
EXACT, WRONG = "exact", "wrong"
_ROUNDS = 3


def run(record: Record) -> None:
    """Every layout at every size."""
    tn_failures = wrong = 0
    for m, k, n in record.pick(_SIZES, _SMALL):
        left, right = drawn_codes(m, k, n, record.device)
        want = exact_products(left, right)
        for layout in ("TN", "NN", "NT", "TT"):
            a, b = laid_out(left, right, layout)
            outcome = _try(a, b, want)
            tops = None
            if outcome == EXACT:
                timed = Timer(functools.partial(torch._int_mm, a, b), record.device, iterations=5).measure(_ROUNDS)
                tops = 2 * m * k * n / timed.device / 1e12
            wrong += outcome == WRONG
            # What is padded: products of other sizes are never asked for.
            tn_failures += layout == "TN" and not (k % 16 or n % 16) and outcome != EXACT
            record.row("_int_mm", layout=layout, m=m, k=k, n=n, outcome=outcome, tops=tops)
        if m == n == k:
            _bf16(record, m)
        del left, right, want
    record.measure("tn_failures", tn_failures)
    record.measure("wrong_products", wrong)


def drawn_codes(m: int, k: int, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes [M, K] and [K, N]."""
    left, right = (torch.randint(-127, 128, shape, dtype=torch.int8, device=device) for shape in ((m, k), (k, n)))
    return left, right


def laid_out(a: Tensor, b: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """a [M, K] and b [K, N] with the strides of a layout, in cuBLAS's words.

    It takes matrices by columns, and so b before a: the first letter says T where b is contiguous along K, the second
    says N where a is. A linear layer's x @ w.t() is TN, g @ w is NN, g.t() @ x is NT.
    """
    second = b.t().contiguous().t() if layout[0] == "T" else b.contiguous()
    first = a.contiguous() if layout[1] == "N" else a.t().contiguous().t()
    return first, second


def exact_products(a: Tensor, b: Tensor) -> Tensor:
    """int32 [M, N]: in fp64, in which these sums are exact, and columns at a time."""
    left = a.double()
    return torch.cat([(left @ part.double()).to(torch.int32) for part in b.split(8192, dim=1)], dim=1)


def _try(a: Tensor, b: Tensor, want: Tensor) -> str:
    try:
        got = torch._int_mm(a, b)
        is_right = torch.equal(got, want)
    except RuntimeError as error:
        return f"raises: {(str(error).splitlines() or [''])[0][:80]}"
    return EXACT if is_right else WRONG


def _bf16(record: Record, size: int) -> None:
    a, b = (torch.randn(size, size, device=record.device, dtype=torch.bfloat16) for _ in range(2))
    timed = Timer(lambda: torch.mm(a, b), record.device, iterations=5).measure(_ROUNDS)
    tops = 2 * size**3 / timed.device / 1e12
    record.row("_int_mm", layout="bf16, for comparison", m=size, k=size, n=size, outcome="", tops=tops)
