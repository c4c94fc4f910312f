"""Operands and results of int8 matrix products, and the products.

`ops` is what a linear layer calls on a CPU, `padded_ops` what it calls on a GPU. `triton_quantize` and `triton` are the
kernels there, `matmul` the other ways to multiply.
"""
