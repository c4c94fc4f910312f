"""The family of products of float8 matrices."""

from ds_quant.kernels.registry import Family

FAMILY = Family(
    package=__name__.rpartition(".")[0],
    title="products of fp8",
    caller="a product of fp8",
    without_cpp="products of fp8 need none",
)
