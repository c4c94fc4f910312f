"""Fast versions of `numerics`. Read `registry` first: it has what an operation and a backend are.

    adamw   int8   fp8      a folder for each family: `ops` declares its operations; cpu, compiled, triton and aten
    wire   ...              (what torch has) do them
    csrc                    the C++ that `cpu` calls; `build` compiles it on first use, `native` holds the library
    choice                  what DS_QUANT_KERNELS may say

`integer_units`, `fp8_units` and `bf16_units` tell what a processor multiplies fast.
"""
