// Masters of 24 and 16 bits to fp32 and back: numerics/master.py has the definition.
//
// With t the bits of a finite master and what is added before some are cut off, the remainder is bits 8 to 15 of t, and
// the weight the upper half of t + 2^15. What is not finite, or would become so, is rare: whole vectors go past it.
#pragma once

#include "masters.h"
#include "random.h"
#include "simd.h"

namespace {

template <class V, bool has_low_bits>
ALWAYS_INLINE typename V::F master_at(const MastersRun& r, int64_t i) {
    auto bits = V::template left<16>(V::load_u16(r.weight + i));
    if constexpr (has_low_bits)
        bits = V::add(bits, V::template left<8>(V::load_s8(reinterpret_cast<const uint8_t*>(r.low_bits) + i)));
    return V::bits_to_float(bits);
}

template <class V, bool has_low_bits>
void join_from(const MastersRun& r, int64_t i) {
    for (; i + V::width <= r.n; i += V::width) V::store(r.values + i, master_at<V, has_low_bits>(r, i));
    if constexpr (V::width > 1) join_from<typename V::Rest, has_low_bits>(r, i);
}

// What is added to finite bits before those that a master lacks are cut off.
template <class V, bool has_low_bits, bool stochastic>
struct Noise {
    typename V::I key0, key1;
    uint32_t index;

    explicit Noise(const MastersRun& r) : key0(V::set_int(r.key[0])), key1(V::set_int(r.key[1])), index(r.index) {}

    ALWAYS_INLINE typename V::I operator()(int64_t i, typename V::I bits) const {
        if constexpr (stochastic) {
            auto number = V::add(V::set_int(index + static_cast<uint32_t>(i)), V::iota());
            auto drawn = mix<V>(V::add(mix<V>(V::bit_xor(number, key0)), key1));
            return V::template right<has_low_bits ? 24 : 16>(drawn);
        } else if constexpr (has_low_bits) {
            return V::set_int(128);
        } else {
            return V::add(V::set_int(0x7fff), V::bit_and(V::template right<16>(bits), V::set_int(1)));
        }
    }
};

// The sum t of any bits: Inf stays, every NaN becomes the quiet one, and no 24-bit master is rounded to Inf.
template <class V, bool has_low_bits>
ALWAYS_INLINE typename V::I with_specials(typename V::I bits, typename V::I magnitude, typename V::I sum) {
    auto infinite = V::set_int(0x7f800000);
    auto clean = V::select(V::greater_int(magnitude, infinite), V::set_int(0x7fc00000), bits);
    if constexpr (has_low_bits) {
        auto is_below = V::greater_int(infinite, V::bit_and(sum, V::set_int(0x7fffffff)));
        sum = V::select(is_below, sum, V::sub(sum, V::set_int(256)));
    }
    return V::select(V::greater_int(infinite, magnitude), sum, clean);
}

template <class V, bool has_low_bits, bool stochastic>
void split_from(const MastersRun& r, int64_t i) {
    Noise<V, has_low_bits, stochastic> noise(r);
    for (; i + V::width <= r.n; i += V::width) {
        auto bits = V::float_to_bits(V::load(r.values + i));
        auto magnitude = V::bit_and(bits, V::set_int(0x7fffffff));
        auto sum = V::add(bits, noise(i, bits));
        // From here on, up to 255 more make an Inf.
        bool is_plain = V::all(V::greater_int(V::set_int(0x7f7fff00), magnitude));
        if (__builtin_expect(!is_plain, false)) sum = with_specials<V, has_low_bits>(bits, magnitude, sum);
        auto weight = has_low_bits ? V::add(sum, V::set_int(0x8000)) : sum;
        V::store_u16(r.weight + i, V::template right<16>(weight));
        if constexpr (has_low_bits) {
            auto rest = V::bit_and(V::template right<8>(sum), V::set_int(0xff));
            V::store_u8(reinterpret_cast<uint8_t*>(r.low_bits) + i, rest);
        }
    }
    if constexpr (V::width > 1) split_from<typename V::Rest, has_low_bits, stochastic>(r, i);
}

void join_masters(const MastersRun& r) {
    if (r.low_bits)
        join_from<Widest, true>(r, 0);
    else
        join_from<Widest, false>(r, 0);
}

void split_masters(const MastersRun& r) {
    if (r.low_bits)
        r.stochastic ? split_from<Widest, true, true>(r, 0) : split_from<Widest, true, false>(r, 0);
    else
        r.stochastic ? split_from<Widest, false, true>(r, 0) : split_from<Widest, false, false>(r, 0);
}

}  // namespace
