"""Master weights of 24 and 16 bits, to fp32 and back. `ops` is what the optimizer calls."""
