// What all kernels and Python (cpu.py, build.py) agree on.
#pragma once

#include <cstdint>

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

inline int64_t itemsize(int32_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

namespace {

inline uint32_t bits_of(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}

// The symmetric scale of numerics/integer.py, from the bits of a group's largest magnitude.
inline float scale_of(uint32_t absmax, float levels) {
    if (absmax >= 0x7f800000) return __builtin_nanf("");
    float extent = float_of(absmax), scale = extent / levels;
    // A denormal quotient may be rounded to less than what the largest element needs.
    return scale < 0x1p-126f && scale * levels < extent ? scale + 0x1p-149f : scale;
}

}  // namespace

#define DS_QUANT_JOIN_(a, b) a##b
#define DS_QUANT_JOIN(a, b) DS_QUANT_JOIN_(a, b)

// Declares the functions `name`_plain(), _avx2() and _avx512(), which give what is compiled once for each instruction
// set, and `name`(isa), which picks one by the number that native.py has for it.
#ifdef DS_QUANT_X86
#define DS_QUANT_BY_ISA(Type, name)                                                    \
    extern "C" const Type *name##_plain(), *name##_avx2(), *name##_avx512();           \
    namespace {                                                                        \
    inline const Type* name(int isa) {                                                 \
        return isa == 2 ? name##_avx512() : isa == 1 ? name##_avx2() : name##_plain(); \
    }                                                                                  \
    }
#else
#define DS_QUANT_BY_ISA(Type, name)                           \
    extern "C" const Type* name##_plain();                    \
    namespace {                                               \
    inline const Type* name(int) { return name##_plain(); }   \
    }
#endif
