"""The family of operations on int8 matrices and what goes into them."""

from ds_quant.kernels.registry import Family

FAMILY = Family(
    package=__name__.rpartition(".")[0],
    title="operands and results of int8 products",
    caller="a product of int8",
    without_cpp="operands of int8 products are quantized by the reference instead, which is many times slower and "
    "allocates several fp32 tensors of their size",
)
