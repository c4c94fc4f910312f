// Codes of moments in units of their scale: numerics/codes.py has the definition.
#pragma once

#include "adamw.h"
#include "decode.h"
#include "random.h"
#include "simd.h"

#include <type_traits>

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

// What the encoders below are given. Uniform numbers of 32 elements at once need an index that is a multiple of 32.
template <class B>
struct Source {
    const float* x;
    float inverse;
    Draws draws;

    Uniform16<B> uniform16() const { return {draws.key, static_cast<uint32_t>(draws.index >> 33)}; }
    Source<typename B::Rest> from(int64_t i) const {
        return {x + i, inverse, {{draws.key[0], draws.key[1]}, draws.index + i}};
    }
};

// Each map has an Encoder, which is given numbers in units of the scale and, if it is stochastic, uniform numbers.
// This one writes the codes of a batch.
template <class Map, class B>
struct BatchEncoder {
    using V = typename B::Part;
    typename Map::template Encoder<V> code_of;

    template <class Values>
    explicit BatchEncoder(const Values& values) : code_of(values) {}

    ALWAYS_INLINE void operator()(
        const float* x, typename V::F inverse, const typename V::I (&draws)[B::parts], uint8_t* codes) const {
        typename V::I found[B::parts];
#pragma GCC unroll 4
        for (int k = 0; k < B::parts; ++k) found[k] = code_of(V::mul(V::load(x + k * V::width), inverse), draws[k]);
        B::store_u8(codes, found);
    }
};

// `values` are what the Encoder is made of.
template <class Map, class B, class Values>
void encode_as(const Values& values, const Source<B>& s, uint8_t* codes, int64_t n) {
    using V = typename B::Part;
    BatchEncoder<Map, B> encode_batch(values);
    auto inverse = V::set(s.inverse);
    auto uniform16 = s.uniform16();
    int64_t i = 0;
    for (; i + B::width <= n; i += B::width) {
        typename V::I draws[B::parts];
        if constexpr (Map::is_stochastic) uniform16(s.draws.index + i, draws);
        encode_batch(s.x + i, inverse, draws, codes + i);
    }
    if constexpr (B::width > 1) encode_as<Map, typename B::Rest>(values, s.from(i), codes + i, n - i);
}

// The rough root is off by far less than half a count (levels are at most 512). To nearest, that tells which two codes
// come into question: x lies between their values, or so little outside that the nearer one is right. For a stochastic
// code the root is rounded to the count below x or the one above; comparing x with its value tells which.
template <int exponent, bool is_signed, bool stochastic>
struct PowerCodes {
    static constexpr bool is_stochastic = stochastic;

    template <class V>
    struct Encoder {
        typename V::F levels, unit;

        explicit Encoder(const MomentFormat& f)
            : levels(V::set(static_cast<float>(f.levels))), unit(V::set(static_cast<float>(1.0 / f.levels))) {}

        ALWAYS_INLINE typename V::I operator()(typename V::F quotient, typename V::I draw) const {
            auto one = V::set(1.0f), minus_one = V::set(-1.0f);
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
                auto up = goes_up<V>(x, low, V::sub(high, low), draw);
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
            return V::to_int(code);
        }
    };
};

// 4-bit codes of any map. `mirrored` maps have the same values on both sides of 0 and the tables hold one side.
template <bool mirrored, bool cells, bool stochastic>
struct HalfCodes {
    static constexpr bool is_stochastic = stochastic;

    template <class V>
    struct Encoder {
        using Values = std::conditional_t<mirrored, typename V::Table8, typename V::Table16>;
        Values bounds, next_bounds, lows, gaps;
        typename V::Small32 cell_codes;
        typename V::I first_cell;
        int cell_shift;

        explicit Encoder(const MomentFormat& f) : Encoder(f, stochastic ? f.bound_cells : f.threshold_cells) {}
        Encoder(const MomentFormat& f, const Cells& c)
            : bounds(stochastic ? f.bounds : f.thresholds), next_bounds((stochastic ? f.bounds : f.thresholds) + 1),
              lows(f.bounds), gaps(f.gaps), cell_codes(c.codes),
              first_cell(V::set_int(static_cast<uint32_t>(c.first) << c.shift)), cell_shift(c.shift) {}

        ALWAYS_INLINE typename V::I operator()(typename V::F quotient, typename V::I draw) const {
            auto x = mirrored ? V::abs(quotient) : quotient;
            // The last bound that x has reached; the first counts as reached.
            auto code = V::set_int(0);
            if constexpr (cells) {
                auto bits = V::sub(V::float_to_bits(x), first_cell);
                code = cell_codes[V::right(V::max_int(bits, V::set_int(0)), cell_shift)];
                code = V::add_if(V::at_least(x, next_bounds[code]), code, V::set_int(1));
            } else {
                for (uint32_t stride = mirrored ? 4 : 8; stride; stride /= 2) {
                    auto middle = V::add(code, V::set_int(stride));
                    code = V::select(V::at_least(x, bounds[middle]), middle, code);
                }
            }
            if constexpr (stochastic) {
                auto up = V::greater(V::sub(x, lows[code]), V::mul(V::to_float(draw), gaps[code]));
                code = V::add_if(up, code, V::set_int(1));
            }
            return mirrored ? V::negate_if_negative(code, quotient) : code;
        }
    };
};

// 8-bit codes of a map with a table: the last of 256 values that is <= x, by halving.
template <bool stochastic>
struct TableCodes {
    static constexpr bool is_stochastic = stochastic;

    template <class V>
    struct Encoder {
        const float* values;
        typename V::I last;

        explicit Encoder(const MomentFormat& f) : values(f.values), last(V::set_int(f.count - 2)) {}

        ALWAYS_INLINE typename V::I operator()(typename V::F x, typename V::I draw) const {
            auto code = V::set_int(0);
            for (uint32_t stride = 128; stride; stride /= 2) {
                auto middle = V::add(code, V::set_int(stride));
                code = V::select(V::at_least(x, V::gather(values, middle)), middle, code);
            }
            code = V::select(V::greater_int(code, last), last, code);
            auto low = V::gather(values, code), high = V::gather(values, V::add(code, V::set_int(1)));
            typename V::M up;
            if constexpr (stochastic)
                up = goes_up<V>(x, low, V::sub(high, low), draw);
            else
                up = V::greater(V::sub(x, low), V::sub(high, x));
            return V::add_if(up, code, V::set_int(1));
        }
    };
};

template <bool is_signed, bool stochastic>
struct FloatCodes {
    static constexpr bool is_stochastic = stochastic;

    template <class V>
    struct Encoder {
        explicit Encoder(const MomentFormat&) {}

        ALWAYS_INLINE typename V::I operator()(typename V::F quotient, typename V::I draw) const {
            constexpr float lowest = is_signed ? 1.25f * 0x1p-16f : 1.125f * 0x1p-32f;
            auto x = V::min(is_signed ? V::abs(quotient) : quotient, V::set(1.0f)), least = V::set(lowest);
            auto carry = V::set_int((1u << (FLOAT_SHIFT - 1)) - 1);
            if constexpr (stochastic) carry = V::template left<FLOAT_SHIFT - 16>(draw);
            auto bits = V::add(V::float_to_bits(V::max(x, least)), carry);
            auto code = V::sub(V::template right<FLOAT_SHIFT>(bits), V::set_int(FLOAT_BASE[is_signed] >> FLOAT_SHIFT));
            if constexpr (is_signed) {
                // Between 0 and the lowest value, code 1, the values decide.
                auto bound = V::set(lowest * 0.5f);
                if constexpr (stochastic) bound = V::mul(V::to_float(draw), V::set(lowest * 0x1p-16f));
                auto small = V::select(V::greater(x, bound), V::set_int(1), V::set_int(0));
                code = V::select(V::greater(least, x), small, code);
                auto sign = V::bit_and(V::template right<24>(V::float_to_bits(quotient)), V::set_int(0x80));
                code = V::bit_or(code, sign);
            }
            return code;
        }
    };
};

#if defined(__AVX2__) && !defined(__AVX512F__)
// The same with packing that saturates in place of the limits: what is above 1 or below the lowest value leaves the codes
// on that side. Signs and what is below the lowest value are dealt with once for 32 elements.
template <bool is_signed, bool stochastic>
struct BatchEncoder<FloatCodes<is_signed, stochastic>, Batch<Avx2, 4>> {
    using V = Avx2;

    explicit BatchEncoder(const MomentFormat&) {}

    ALWAYS_INLINE void operator()(const float* x, V::F inverse, const V::I (&draws)[4], uint8_t* codes) const {
        V::I found[4], is_zero[4], signs[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
            auto quotient = V::mul(V::load(x + 8 * k), inverse);
            auto size = is_signed ? V::abs(quotient) : quotient;
            auto carry = V::set_int((1u << (FLOAT_SHIFT - 1)) - 1);
            if constexpr (stochastic) carry = V::left<FLOAT_SHIFT - 16>(draws[k]);
            found[k] = _mm256_srai_epi32(V::add(V::float_to_bits(size), carry), FLOAT_SHIFT);
            if constexpr (is_signed) {
                constexpr float lowest = 1.25f * 0x1p-16f;
                auto bound = V::set(lowest * 0.5f);
                if constexpr (stochastic) bound = V::mul(V::to_float(draws[k]), V::set(lowest * 0x1p-16f));
                is_zero[k] = V::float_to_bits(V::at_least(bound, size));  // the bound is below the lowest value
                signs[k] = V::float_to_bits(quotient);
            }
        }
        auto base = _mm256_set1_epi16(FLOAT_BASE[is_signed] >> FLOAT_SHIFT);
        V::I words[2];
        for (int k = 0; k < 2; ++k)
            words[k] = _mm256_sub_epi16(_mm256_packs_epi32(found[2 * k], found[2 * k + 1]), base);
        V::I bytes;
        if constexpr (is_signed) {
            bytes = _mm256_packs_epi16(words[0], words[1]);
            bytes = _mm256_add_epi8(_mm256_max_epi8(bytes, _mm256_set1_epi8(1)), pack(is_zero));
            bytes = V::bit_or(bytes, V::bit_and(pack(signs), V::set_int(0x80808080)));
        } else {
            bytes = _mm256_packus_epi16(words[0], words[1]);
        }
        bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        V::store_int(reinterpret_cast<uint32_t*>(codes), bytes);
    }

    static ALWAYS_INLINE V::I pack(const V::I (&x)[4]) {
        return _mm256_packs_epi16(_mm256_packs_epi32(x[0], x[1]), _mm256_packs_epi32(x[2], x[3]));
    }
};
#endif

template <class B, bool stochastic>
void encode_run(const MomentFormat& f, const Source<B>& s, uint8_t* codes, int64_t n) {
    if (f.bits == 4) {
        bool cells = stochastic ? f.bound_cells.shift : f.threshold_cells.shift;
        if (f.mirrored)
            return cells ? encode_as<HalfCodes<true, true, stochastic>>(f, s, codes, n)
                         : encode_as<HalfCodes<true, false, stochastic>>(f, s, codes, n);
        return cells ? encode_as<HalfCodes<false, true, stochastic>>(f, s, codes, n)
                     : encode_as<HalfCodes<false, false, stochastic>>(f, s, codes, n);
    }
    if (f.map == TABLE) return encode_as<TableCodes<stochastic>>(f, s, codes, n);
    if (f.map == FLOAT)
        return f.is_signed ? encode_as<FloatCodes<true, stochastic>>(f, s, codes, n)
                           : encode_as<FloatCodes<false, stochastic>>(f, s, codes, n);
    switch (f.exponent * 2 + f.is_signed) {
        case 2: return encode_as<PowerCodes<1, false, stochastic>>(f, s, codes, n);
        case 3: return encode_as<PowerCodes<1, true, stochastic>>(f, s, codes, n);
        case 4: return encode_as<PowerCodes<2, false, stochastic>>(f, s, codes, n);
        case 5: return encode_as<PowerCodes<2, true, stochastic>>(f, s, codes, n);
        case 8: return encode_as<PowerCodes<4, false, stochastic>>(f, s, codes, n);
        case 9: return encode_as<PowerCodes<4, true, stochastic>>(f, s, codes, n);
        case 16: return encode_as<PowerCodes<8, false, stochastic>>(f, s, codes, n);
        default: return encode_as<PowerCodes<8, true, stochastic>>(f, s, codes, n);
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

ALWAYS_INLINE float inverse_of(uint32_t scale) { return scale ? 1.0f / Scalar::bits_to_float(scale) : 0.0f; }

void encode(const MomentFormat& f, const float* x, uint32_t scale, const Draws* draws, uint8_t* codes, int64_t n) {
    float inverse = inverse_of(scale);
    if (!draws) return encode_run<Widest32, false>(f, {x, inverse, Draws{}}, codes, n);
    for_each_stretch(*draws, n, [&](const Draws& part, int64_t begin, int64_t length, bool is_aligned) {
        if (is_aligned)
            encode_run<Widest32, true>(f, {x + begin, inverse, part}, codes + begin, length);
        else
            encode_run<Batch<Scalar, 1>, true>(f, {x + begin, inverse, part}, codes + begin, length);
    });
}

}  // namespace
