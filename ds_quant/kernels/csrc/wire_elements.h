// What the stages of the wire have in common: elements as they come from tensors, with residuals and rotated, and where
// they go. numerics/wire.py has the definition.
//
// A loop takes whole vectors and leaves the rest to itself with shorter ones, so the rest has the same bits.
#pragma once

#include "convert.h"
#include "hadamard.h"
#include "simd.h"
#include "wire.h"

namespace {

float load_float(const uint8_t* from) {
    float x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Adds what the lanes of two vectors add up to.
template <class V>
ALWAYS_INLINE void add_lanes(typename V::F first, typename V::F second, double sums[2]) {
    float lanes[2][V::width];
    V::store(lanes[0], first);
    V::store(lanes[1], second);
    for (int k = 0; k < 2; ++k)
        for (float lane : lanes[k]) sums[k] += lane;
}

// ---- elements and residuals ----------------------------------------------------------------------------------------

template <class V>
void add_residual(const float* x, const uint16_t* residual, float scale, float* to, int64_t n) {
    int64_t i = 0;
    for (; i + V::width <= n; i += V::width) {
        auto r = V::mul(from_bf16<V>(V::load_u16(residual + i)), V::set(scale));
        V::store(to + i, V::add(V::load(x + i), r));
    }
    if constexpr (V::width > 1) add_residual<typename V::Rest>(x + i, residual + i, scale, to + i, n - i);
}

template <class V>
void store_residual(const float* lost, uint16_t* to, float inverse, int64_t n) {
    int64_t i = 0;
    for (; i + V::width <= n; i += V::width) {
        auto bits = to_bf16<V>(V::mul(V::load(lost + i), V::set(inverse)));
        auto is_finite = V::greater_int(V::set_int(0x7f80), V::bit_and(bits, V::set_int(0x7fff)));
        V::store_u16(to + i, V::select(is_finite, bits, V::set_int(0)));
    }
    if constexpr (V::width > 1) store_residual<typename V::Rest>(lost + i, to + i, inverse, n - i);
}

uint16_t* residual_at(const int64_t* addresses, int64_t piece, int64_t element) {
    return addresses && addresses[piece] ? reinterpret_cast<uint16_t*>(addresses[piece]) + element : nullptr;
}

// What the elements of blocks are before they are quantized or summed: in memory, or made in `buffer`.
const float* own_elements(
    const WireCall& c, const Signs& signs, int64_t piece, int64_t element, int64_t n, float* buffer) {
    auto dtype = static_cast<Dtype>(c.dtype);
    auto* from = reinterpret_cast<const char*>(c.data[piece]) + element * itemsize(dtype);
    const uint16_t* residual = residual_at(c.read, piece, element);
    auto* x = reinterpret_cast<const float*>(from);
    if (dtype != FLOAT32) {
        load(dtype, from, buffer, n);
        x = buffer;
    }
    if (residual) {
        add_residual<Widest>(x, residual, c.residual_scale, buffer, n);
        x = buffer;
    }
    if (!c.rotated) return x;
    for (int64_t i = 0; i < n; i += c.block_size) rotate(x + i, buffer + i, smaller(c.block_size, n - i), signs);
    return buffer;
}

void unrotate_blocks(const WireCall& c, const Signs& signs, float* x, int64_t n) {
    for (int64_t i = 0; i < n; i += c.block_size) unrotate(x + i, smaller(c.block_size, n - i), signs);
}

// Has `fill` write n fp32 numbers of whole blocks and a last one, and brings them into the tensor.
template <class Fill>
void put_out(const WireCall& c, const Signs& signs, Dtype dtype, char* to, int64_t n, const Fill& fill) {
    if (dtype == FLOAT32 && !c.rotated) return fill(reinterpret_cast<float*>(to));
    alignas(64) float buffer[MAX_BLOCK];
    fill(buffer);
    if (c.rotated) unrotate_blocks(c, signs, buffer, n);
    store(dtype, buffer, to, n);
}

}  // namespace
