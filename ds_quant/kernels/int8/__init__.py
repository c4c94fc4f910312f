"""Operands and results of int8 matrix products, and the products (`matmul`). `ops` is what a linear layer calls."""
