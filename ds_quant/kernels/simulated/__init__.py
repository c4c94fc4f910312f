"""What layers in floating point have in kernels. `ops` is what they call, `cpu` and `compiled` serve CPUs and CUDA."""
