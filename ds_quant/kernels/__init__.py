"""Fast versions of `numerics`. Read `registry` first: it has what an operation and a backend are.

    adamw   elementwise   masters   int8   fp8   wire
                            a folder for each family: `ops` declares its operations; `cpu`, `cuda`, `compiled`, `triton`
                            and `aten` (what torch has), where there are such files, implement them
    csrc                    the C++ that `cpu` calls; `build` compiles it on first use, `native` holds the library
    choice                  what DS_QUANT_KERNELS may say
    operators               what torch.compile keeps whole: torch.ops.ds_quant
    simulated               products of dequantized operands, compiled

`integer_units`, `fp8_units` and `bf16_units` tell what a processor multiplies fast.
"""
