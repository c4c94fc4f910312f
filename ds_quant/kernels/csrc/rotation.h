// Rows rotated block by block: what the driver (rotation.cpp), its stage (rotation_stages.cpp) and Python
// (simulated/cpu_rotation.py) agree on. numerics/rotation.py has the definition.
#pragma once

#include "common.h"

struct RotateCall {
    const float* x;         // [num_rows, features], as `result`
    const uint32_t* flips;  // [features]: the sign bit where an element changes its sign first
    float* result;
    int64_t num_rows, features, block_size;
};

// Compiled once for each instruction set. The rows from `begin` to `end`.
struct RotationStages {
    void (*rotate)(const RotateCall&, int64_t begin, int64_t end);
};

DS_QUANT_BY_ISA(RotationStages, ds_quant_rotation_stages)
