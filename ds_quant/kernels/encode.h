// Codes of moments in units of their scale: numerics/codes.py has the definition.
#pragma once

#include "adamw.h"
#include "decode.h"
#include "random.h"
#include "simd.h"

namespace {

// x^(1/exponent) of x >= 0, off by less than 1e-3 relative.
template <class V, int exponent>
ALWAYS_INLINE typename V::F rough_root(typename V::F x) {
    if constexpr (exponent == 1) return x;
    x = V::rough_rsqrt(x);
    if constexpr (exponent == 2) return V::rough_rcp(x);
    x = V::rough_rsqrt(x);
    if constexpr (exponent == 4) return x;
    return V::rough_rcp(V::rough_rsqrt(x));
}

template <class V>
ALWAYS_INLINE typename V::F to_unit(typename V::I uniform16) {
    return V::mul(V::to_float(uniform16), V::set(0x1p-16f));
}

template <class V>
ALWAYS_INLINE typename V::M goes_up(typename V::F x, typename V::F low, typename V::F gap, typename V::I uniform16) {
    return V::greater(V::sub(x, low), V::mul(to_unit<V>(uniform16), gap));
}

// What an encoder is given. Uniform numbers of 32 elements at once need an index that is a multiple of 32.
template <class V>
struct Source {
    const float* x;
    float inverse;
    Draws draws;

    Uniform16<V> uniform16() const { return {draws.key, static_cast<uint32_t>(draws.index >> 33)}; }
    Source<typename V::Rest> from(int64_t i) const {
        return {x + i, inverse, {{draws.key[0], draws.key[1]}, draws.index + i}};
    }
};

// The rough root is off by far less than half a count (levels are at most 512). To nearest, that tells which two codes
// come into question: x lies between their values, or so little outside that the nearer one is right. For a stochastic
// code the root is rounded to the count below x or the one above; comparing x with its value tells which.
template <class V, int exponent, bool is_signed, bool stochastic>
void encode_power(const MomentFormat& f, const Source<V>& s, uint8_t* codes, int64_t n) {
    auto levels = V::set(static_cast<float>(f.levels)), unit = V::set(static_cast<float>(1.0 / f.levels));
    auto inverse = V::set(s.inverse), one = V::set(1.0f), minus_one = V::set(-1.0f);
    auto uniform16 = s.uniform16();
    int64_t i = 0;
    for (; i + V::width <= n; i += V::width) {
        auto quotient = V::mul(V::load(s.x + i), inverse);
        auto x = is_signed ? V::abs(quotient) : quotient;
        if constexpr (stochastic) x = V::min(x, one);  // the product of the largest may exceed 1
        auto root = V::mul(rough_root<V, exponent>(x), levels);
        typename V::F code;
        if constexpr (stochastic) {
            auto count = V::round(root);
            auto value = power<V, exponent>(V::mul(count, unit));
            auto above = V::greater(value, x);
            auto other = V::add(count, V::select(above, minus_one, one));
            auto other_value = power<V, exponent>(V::mul(other, unit));
            auto low = V::select(above, other_value, value), high = V::select(above, value, other_value);
            auto up = goes_up<V>(x, low, V::sub(high, low), uniform16(s.draws.index + i));
            code = V::add_if(up, V::add_if(above, count, minus_one), one);
        } else {
            // A little more than half, so that it is at least 1.
            auto high_count = V::round(V::add(root, V::set(0.51f)));
            auto low_count = V::sub(high_count, one);
            auto low = power<V, exponent>(V::mul(low_count, unit));
            auto high = power<V, exponent>(V::mul(high_count, unit));
            code = V::add_if(V::greater(V::sub(x, low), V::sub(high, x)), low_count, one);
        }
        if constexpr (is_signed) code = V::copy_sign(code, quotient);
        V::store_u8(codes + i, V::to_int(code));
    }
    if constexpr (V::width > 1)
        encode_power<typename V::Rest, exponent, is_signed, stochastic>(f, s.from(i), codes + i, n - i);
}

// 4-bit codes of any map. `mirrored` maps have the same values on both sides of 0 and the table holds one side.
template <class V, bool mirrored, bool cells, bool stochastic>
void encode_halves(const MomentFormat& f, const Source<V>& s, uint8_t* codes, int64_t n) {
    auto inverse = V::set(s.inverse), zero = V::set(0.0f);
    typename V::Table16 bounds(stochastic ? f.bounds : f.thresholds), lows(f.bounds), gaps(f.gaps);
    const Cells& c = stochastic ? f.bound_cells : f.threshold_cells;
    typename V::Table32 cell_bounds(c.bounds), cell_codes(reinterpret_cast<const float*>(c.codes));
    auto uniform16 = s.uniform16();
    int64_t i = 0;
    for (; i + V::width <= n; i += V::width) {
        auto x = V::mul(V::load(s.x + i), inverse);
        auto sign = V::greater(zero, x);
        if constexpr (mirrored) x = V::abs(x);
        // The last bound that x has reached; the first counts as reached.
        auto code = V::set_int(0);
        if constexpr (cells) {
            auto bits = V::max_int(V::float_to_bits(x), V::set_int(FIRST_CELL << CELL_SHIFT));
            auto cell = V::template right<CELL_SHIFT>(bits);
            code = V::float_to_bits(cell_codes[cell]);
            code = V::add_if(V::at_least(x, cell_bounds[cell]), code, V::set_int(1));
        } else {
            for (uint32_t stride = mirrored ? 4 : 8; stride; stride /= 2) {
                auto middle = V::add(code, V::set_int(stride));
                code = V::select(V::at_least(x, bounds[middle]), middle, code);
            }
        }
        if constexpr (stochastic) {
            auto up = goes_up<V>(x, lows[code], gaps[code], uniform16(s.draws.index + i));
            code = V::add_if(up, code, V::set_int(1));
        }
        if constexpr (mirrored) code = V::select(sign, V::sub(V::set_int(0), code), code);
        V::store_u8(codes + i, code);
    }
    if constexpr (V::width > 1)
        encode_halves<typename V::Rest, mirrored, cells, stochastic>(f, s.from(i), codes + i, n - i);
}

// 8-bit codes of a map with a table: the last of 256 values that is <= x, by halving.
template <class V, bool stochastic>
void encode_table(const MomentFormat& f, const Source<V>& s, uint8_t* codes, int64_t n) {
    auto inverse = V::set(s.inverse);
    auto last = V::set_int(f.count - 2);
    auto uniform16 = s.uniform16();
    int64_t i = 0;
    for (; i + V::width <= n; i += V::width) {
        auto x = V::mul(V::load(s.x + i), inverse);
        auto code = V::set_int(0);
        for (uint32_t stride = 128; stride; stride /= 2) {
            auto middle = V::add(code, V::set_int(stride));
            code = V::select(V::at_least(x, V::gather(f.values, middle)), middle, code);
        }
        code = V::select(V::greater_int(code, last), last, code);
        auto low = V::gather(f.values, code), high = V::gather(f.values, V::add(code, V::set_int(1)));
        typename V::M up;
        if constexpr (stochastic)
            up = goes_up<V>(x, low, V::sub(high, low), uniform16(s.draws.index + i));
        else
            up = V::greater(V::sub(x, low), V::sub(high, x));
        V::store_u8(codes + i, V::add_if(up, code, V::set_int(1)));
    }
    if constexpr (V::width > 1) encode_table<typename V::Rest, stochastic>(f, s.from(i), codes + i, n - i);
}

template <class V, bool is_signed, bool stochastic>
void encode_float(const Source<V>& s, uint8_t* codes, int64_t n) {
    constexpr float lowest = is_signed ? 1.25f * 0x1p-16f : 1.125f * 0x1p-32f;
    auto inverse = V::set(s.inverse), one = V::set(1.0f), least = V::set(lowest);
    auto base = V::set_int(FLOAT_BASE[is_signed] >> FLOAT_SHIFT);
    auto half = V::set_int((1u << (FLOAT_SHIFT - 1)) - 1);
    auto uniform16 = s.uniform16();
    int64_t i = 0;
    for (; i + V::width <= n; i += V::width) {
        auto quotient = V::mul(V::load(s.x + i), inverse);
        auto x = V::min(is_signed ? V::abs(quotient) : quotient, one);
        typename V::I draw, carry = half;
        if constexpr (stochastic) {
            draw = uniform16(s.draws.index + i);
            carry = V::template left<FLOAT_SHIFT - 16>(draw);
        }
        auto bits = V::add(V::float_to_bits(V::max(x, least)), carry);
        auto code = V::sub(V::template right<FLOAT_SHIFT>(bits), base);
        if constexpr (is_signed) {
            // Between 0 and the lowest value, code 1, the values decide.
            auto bound = V::set(lowest * 0.5f);
            if constexpr (stochastic) bound = V::mul(V::to_float(draw), V::set(lowest * 0x1p-16f));
            auto small = V::select(V::greater(x, bound), V::set_int(1), V::set_int(0));
            code = V::select(V::greater(least, x), small, code);
            auto sign = V::bit_and(V::template right<24>(V::float_to_bits(quotient)), V::set_int(0x80));
            code = V::bit_or(code, sign);
        }
        V::store_u8(codes + i, code);
    }
    if constexpr (V::width > 1) encode_float<typename V::Rest, is_signed, stochastic>(s.from(i), codes + i, n - i);
}

template <class V, bool stochastic>
void encode_run(const MomentFormat& f, const Source<V>& s, uint8_t* codes, int64_t n) {
    if (f.bits == 4) {
        bool cells = stochastic ? f.bound_cells.exist : f.threshold_cells.exist;
        if (f.mirrored)
            return cells ? encode_halves<V, true, true, stochastic>(f, s, codes, n)
                         : encode_halves<V, true, false, stochastic>(f, s, codes, n);
        return cells ? encode_halves<V, false, true, stochastic>(f, s, codes, n)
                     : encode_halves<V, false, false, stochastic>(f, s, codes, n);
    }
    if (f.map == TABLE) return encode_table<V, stochastic>(f, s, codes, n);
    if (f.map == FLOAT)
        return f.is_signed ? encode_float<V, true, stochastic>(s, codes, n)
                           : encode_float<V, false, stochastic>(s, codes, n);
    switch (f.exponent * 2 + f.is_signed) {
        case 2: return encode_power<V, 1, false, stochastic>(f, s, codes, n);
        case 3: return encode_power<V, 1, true, stochastic>(f, s, codes, n);
        case 4: return encode_power<V, 2, false, stochastic>(f, s, codes, n);
        case 5: return encode_power<V, 2, true, stochastic>(f, s, codes, n);
        case 8: return encode_power<V, 4, false, stochastic>(f, s, codes, n);
        case 9: return encode_power<V, 4, true, stochastic>(f, s, codes, n);
        case 16: return encode_power<V, 8, false, stochastic>(f, s, codes, n);
        default: return encode_power<V, 8, true, stochastic>(f, s, codes, n);
    }
}

// Calls run(draws, begin, length, is_aligned) for runs of elements whose words of bits have one high word (16 words go
// to 32 elements); the index of an aligned one is a multiple of 32.
template <class Run>
void for_each_stretch(const Draws& draws, int64_t n, Run run) {
    constexpr uint64_t period = 1ull << 33;
    for (int64_t begin = 0; begin < n;) {
        Draws part{{draws.key[0], draws.key[1]}, draws.index + begin};
        bool is_aligned = part.index % 32 == 0;
        auto left = static_cast<int64_t>(is_aligned ? period - part.index % period : 32 - part.index % 32);
        int64_t length = n - begin < left ? n - begin : left;
        run(part, begin, length, is_aligned);
        begin += length;
    }
}

void encode(const MomentFormat& f, const float* x, float inverse, const Draws* draws, uint8_t* codes, int64_t n) {
    if (!draws) return encode_run<Wide, false>(f, {x, inverse, Draws{}}, codes, n);
    for_each_stretch(*draws, n, [&](const Draws& part, int64_t begin, int64_t length, bool is_aligned) {
        if (is_aligned)
            encode_run<Wide, true>(f, {x + begin, inverse, part}, codes + begin, length);
        else
            encode_run<Scalar, true>(f, {x + begin, inverse, part}, codes + begin, length);
    });
}

}  // namespace
