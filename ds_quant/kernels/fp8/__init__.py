"""Products of matrices of 8-bit floating point. `ops` declares them, `aten` has them by torch's own kernels."""
