"""What layers in floating point have in kernels. `ops` is what they call, `compiled` serves CUDA."""
