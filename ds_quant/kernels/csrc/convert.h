// bf16 and fp16 to fp32 and back, rounded to nearest, ties to even.
#pragma once

#include <cstring>

#include "common.h"
#include "simd.h"

namespace {

template <class V>
ALWAYS_INLINE typename V::F from_bf16(typename V::I x) {
    return V::bits_to_float(V::template left<16>(x));
}

template <class V>
ALWAYS_INLINE typename V::I to_bf16(typename V::F x) {
    auto bits = V::float_to_bits(x);
    auto magnitude = V::bit_and(bits, V::set_int(0x7fffffff));
    auto odd = V::bit_and(V::template right<16>(bits), V::set_int(1));
    auto rounded = V::template right<16>(V::add(bits, V::add(odd, V::set_int(0x7fff))));
    return V::select(V::greater_int(magnitude, V::set_int(0x7f800000)), V::set_int(0x7fc0), rounded);
}

template <class V>
ALWAYS_INLINE typename V::F from_fp16(typename V::I x) {
    auto sign = V::template left<16>(V::bit_and(x, V::set_int(0x8000)));
    auto magnitude = V::template left<13>(V::bit_and(x, V::set_int(0x7fff)));
    // The exponent goes from bias 15 to 127 by an exact product, denormal numbers included.
    auto value = V::float_to_bits(V::mul(V::bits_to_float(magnitude), V::set(0x1p112f)));
    auto special = V::bit_or(magnitude, V::set_int(0x7f800000));
    auto is_special = V::greater_int(magnitude, V::set_int((0x7c00 << 13) - 1));
    return V::bits_to_float(V::bit_or(sign, V::select(is_special, special, value)));
}

template <class V>
ALWAYS_INLINE typename V::I to_fp16(typename V::F x) {
    auto bits = V::float_to_bits(x);
    auto magnitude = V::bit_and(bits, V::set_int(0x7fffffff));
    auto sign = V::template right<16>(V::bit_and(bits, V::set_int(0x80000000)));
    // Normal: drop 13 bits of the mantissa, ties to even. A carry runs into the exponent, up to Inf.
    auto odd = V::bit_and(V::template right<13>(magnitude), V::set_int(1));
    auto normal = V::template right<13>(V::add(V::add(magnitude, V::set_int(0xc8000fff)), odd));
    // Denormal: adding 0.5 leaves the units of 2^-24 in the lowest bits, rounded by the addition.
    auto shifted = V::float_to_bits(V::add(V::bits_to_float(magnitude), V::set(0.5f)));
    auto denormal = V::sub(shifted, V::set_int(0x3f000000));
    auto result = V::select(V::greater_int(V::set_int(0x38800000), magnitude), denormal, normal);
    result = V::select(V::greater_int(magnitude, V::set_int(0x477fefff)), V::set_int(0x7c00), result);
    result = V::select(V::greater_int(magnitude, V::set_int(0x7f800000)), V::set_int(0x7e00), result);
    return V::bit_or(sign, result);
}

template <class V>
void load_as(Dtype dtype, const uint16_t* from, float* to, int64_t n) {
    int64_t i = 0;
    if (dtype == BFLOAT16)
        for (; i + V::width <= n; i += V::width) V::store(to + i, from_bf16<V>(V::load_u16(from + i)));
    else
        for (; i + V::width <= n; i += V::width) V::store(to + i, from_fp16<V>(V::load_u16(from + i)));
    if constexpr (V::width > 1) load_as<Scalar>(dtype, from + i, to + i, n - i);
}

template <class V>
void store_as(Dtype dtype, const float* from, uint16_t* to, int64_t n) {
    int64_t i = 0;
    if (dtype == BFLOAT16)
        for (; i + V::width <= n; i += V::width) V::store_u16(to + i, to_bf16<V>(V::load(from + i)));
    else
        for (; i + V::width <= n; i += V::width) V::store_u16(to + i, to_fp16<V>(V::load(from + i)));
    if constexpr (V::width > 1) store_as<Scalar>(dtype, from + i, to + i, n - i);
}

void load(Dtype dtype, const void* from, float* to, int64_t n) {
    if (dtype == FLOAT32)
        std::memcpy(to, from, sizeof(float) * n);
    else
        load_as<Widest>(dtype, static_cast<const uint16_t*>(from), to, n);
}

void store(Dtype dtype, const float* from, void* to, int64_t n) {
    if (dtype == FLOAT32)
        std::memcpy(to, from, sizeof(float) * n);
    else
        store_as<Widest>(dtype, from, static_cast<uint16_t*>(to), n);
}

}  // namespace
