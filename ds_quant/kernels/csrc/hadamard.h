// The randomized Hadamard rotation of a block: numerics/rotation.py has the definition.
//
// The order in which butterflies of different elements are done is free; each has the definition's two operations.
#pragma once

#include "simd.h"
#include "wire.h"

namespace {

// h = distance, 2 * distance, ... within a vector: a + b in the lower lane of a pair, b + (-a) turned round in the upper.
template <class V, int distance = 1>
ALWAYS_INLINE typename V::F butterflies_within(typename V::F x) {
    if constexpr (distance < V::width) {
        auto is_upper = V::greater_int(V::bit_and(V::iota(), V::set_int(distance)), V::set_int(0));
        auto flip = V::select(is_upper, V::set_int(0x80000000), V::set_int(0));
        auto signed_x = V::bits_to_float(V::bit_xor(V::float_to_bits(x), flip));
        return butterflies_within<V, 2 * distance>(V::add(V::template swap<distance>(x), signed_x));
    } else {
        return x;
    }
}

template <class V>
ALWAYS_INLINE typename V::F flip(typename V::F x, const uint32_t* bits) {
    return V::bits_to_float(V::bit_xor(V::float_to_bits(x), V::load_int(bits)));
}

// All h below count vectors, for runs of as many elements. `flips` are the signs to apply before, or null.
template <class V, int count>
void first_butterflies(const float* from, const uint32_t* flips, float* to, int64_t n) {
    for (int64_t i = 0; i < n; i += count * V::width) {
        typename V::F r[count];
        for (int k = 0; k < count; ++k) {
            int64_t at = i + k * V::width;
            auto x = V::load(from + at);
            if (flips) x = flip<V>(x, flips + at);
            r[k] = butterflies_within<V>(x);
        }
        for (int h = 1; h < count; h *= 2)
            for (int k = 0; k < count; ++k)
                if (!(k & h)) {
                    auto a = r[k], b = r[k + h];
                    r[k] = V::add(a, b);
                    r[k + h] = V::sub(a, b);
                }
        for (int k = 0; k < count; ++k) V::store(to + i + k * V::width, r[k]);
    }
}

// As many vectors as leave registers free, and fewer for shorter runs. The number of elements that were taken together.
template <class V, int count = V::width == 16 ? 16 : 8>
int64_t first_butterflies_of(const float* from, const uint32_t* flips, float* to, int64_t n) {
    if constexpr (count > 1)
        if (n < count * V::width) return first_butterflies_of<V, count / 2>(from, flips, to, n);
    first_butterflies<V, count>(from, flips, to, n);
    return count * V::width;
}

// n is a power of two; `to` may be `from`.
template <class V>
void butterflies(const float* from, const uint32_t* flips, float* to, int64_t n) {
    constexpr int64_t w = V::width;
    if constexpr (w > 1)
        if (n < w) return butterflies<Scalar>(from, flips, to, n);
    int64_t h = first_butterflies_of<V>(from, flips, to, n);
    // Two values of h at a time.
    for (; 4 * h <= n; h *= 4)
        for (int64_t run = 0; run < n; run += 4 * h)
            for (int64_t i = run; i < run + h; i += w) {
                auto a = V::load(to + i), b = V::load(to + i + h);
                auto c = V::load(to + i + 2 * h), d = V::load(to + i + 3 * h);
                auto ab = V::add(a, b), cd = V::add(c, d), a_b = V::sub(a, b), c_d = V::sub(c, d);
                V::store(to + i, V::add(ab, cd));
                V::store(to + i + h, V::add(a_b, c_d));
                V::store(to + i + 2 * h, V::sub(ab, cd));
                V::store(to + i + 3 * h, V::sub(a_b, c_d));
            }
    if (h < n)
        for (int64_t i = 0; i < h; i += w) {
            auto a = V::load(to + i), b = V::load(to + i + h);
            V::store(to + i, V::add(a, b));
            V::store(to + i + h, V::sub(a, b));
        }
}

// The factor of H, and the signs to apply after, or null.
template <class V>
void finish(float* x, float factor, const uint32_t* flips, int64_t n) {
    int64_t i = 0;
    for (; i + V::width <= n; i += V::width) {
        auto y = V::mul(V::load(x + i), V::set(factor));
        V::store(x + i, flips ? flip<V>(y, flips + i) : y);
    }
    if constexpr (V::width > 1) finish<typename V::Rest>(x + i, factor, flips ? flips + i : nullptr, n - i);
}

float factor_of(int64_t length) { return static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(length))); }

// H of a block of n elements, a short one in its binary parts; `to` may be `from`.
void transform(const float* from, const uint32_t* before, float* to, const uint32_t* after, int64_t n) {
    for (int64_t part = MAX_BLOCK, at = 0; part; part /= 2) {
        if (!(n & part)) continue;
        butterflies<Widest>(from + at, before ? before + at : nullptr, to + at, part);
        finish<Widest>(to + at, factor_of(part), after ? after + at : nullptr, part);
        at += part;
    }
}

void rotate(const float* from, float* to, int64_t n, const Signs& signs) {
    transform(from, signs.bits, to, nullptr, n);
}

void unrotate(float* x, int64_t n, const Signs& signs) { transform(x, nullptr, x, signs.bits, n); }

}  // namespace
