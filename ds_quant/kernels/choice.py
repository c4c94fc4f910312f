"""DS_QUANT_KERNELS in the environment: which kernels to take instead of the fastest.

reference   the definitions of `ds_quant.numerics` for everything, slow
triton      on CUDA, `kernels.triton` for AdamW's steps where it takes their format, `kernels.triton_int8` for the
            products of int8 linear layers
"""

import os

from ds_quant.base.errors import fail

VARIABLE = "DS_QUANT_KERNELS"
CHOICES = ("reference", "triton")


def chosen() -> str:
    """One of CHOICES, or "" where none is made. Raises ConfigError for any other."""
    value = os.environ.get(VARIABLE, "")
    if value and value not in CHOICES:
        raise fail(VARIABLE, value, " or ".join(CHOICES), "correct it, or unset it for the fastest kernels")
    return value
