"""Quantized operands of int8 matrix products, and the products. `ops` is what a linear layer calls."""
