// What all kernels and Python (cpu.py, build.py) agree on.
#pragma once

#include <cstdint>

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

inline int64_t itemsize(int32_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

#define DS_QUANT_JOIN_(a, b) a##b
#define DS_QUANT_JOIN(a, b) DS_QUANT_JOIN_(a, b)
