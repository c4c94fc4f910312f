// Values of codes: numerics/codes.py has the definition.
//
// A map's Reader gives the fp32 values of codes that follow each other and have one scale.
#pragma once

#include "adamw.h"
#include "simd.h"

namespace {

template <class V, int exponent>
ALWAYS_INLINE typename V::F power(typename V::F t) {
    for (int e = exponent; e > 1; e /= 2) t = V::mul(t, t);
    return t;
}

struct Fp32 {
    template <class V>
    struct Reader {
        const float* values;

        ALWAYS_INLINE typename V::F operator()(int64_t i) const { return V::load(values + i); }
    };
};

template <int exponent, bool is_signed>
struct Power {
    template <class V>
    struct Reader {
        const uint8_t* codes;
        typename V::F unit, scale;

        Reader(const MomentFormat& f, const uint8_t* first, int, float s)
            : codes(first), unit(V::set(static_cast<float>(1.0 / f.levels))), scale(V::set(s)) {}

        ALWAYS_INLINE typename V::F operator()(int64_t i) const {
            auto count = V::to_float(is_signed ? V::load_s8(codes + i) : V::load_u8(codes + i));
            auto value = power<V, exponent>(V::mul(count, unit));
            if constexpr (is_signed) value = V::copy_sign(value, count);
            return V::mul(value, scale);
        }
    };
};

// Bits of 1.0, how far a code is shifted in the bits of its value, and bits of code 0 of unsigned and signed maps.
constexpr uint32_t ONE = 0x3f800000;
constexpr int FLOAT_SHIFT = 20;
constexpr uint32_t FLOAT_BASE[2] = {ONE - (255u << FLOAT_SHIFT), ONE - (127u << FLOAT_SHIFT)};

template <bool is_signed>
struct Float {
    template <class V>
    struct Reader {
        const uint8_t* codes;
        typename V::F scale;

        Reader(const MomentFormat&, const uint8_t* first, int, float s) : codes(first), scale(V::set(s)) {}

        ALWAYS_INLINE typename V::F operator()(int64_t i) const {
            auto code = V::load_u8(codes + i);
            auto count = is_signed ? V::bit_and(code, V::set_int(127)) : code;
            auto bits = V::add(V::template left<FLOAT_SHIFT>(count), V::set_int(FLOAT_BASE[is_signed]));
            auto value = V::bits_to_float(bits);
            if constexpr (is_signed) {
                value = V::select(V::greater_int(count, V::set_int(0)), value, V::set(0.0f));
                value = V::copy_sign(value, V::bits_to_float(V::template left<24>(code)));
            }
            return V::mul(value, scale);
        }
    };
};

struct LogHalves;  // of map LOG: log_codes.h

// Of 4-bit codes, `shift` (0 or 4) picks the half of each byte.
struct Halves {
    template <class V>
    struct Reader {
        const uint8_t* codes;
        int shift;
        typename V::Table16 values;
        typename V::F scale;

        Reader(const MomentFormat& f, const uint8_t* first, int half, float s)
            : codes(first), shift(half), values(f.values), scale(V::set(s)) {}

        ALWAYS_INLINE typename V::F operator()(int64_t i) const {
            return V::mul(values[V::right(V::load_u8(codes + i), shift)], scale);
        }
    };
};

// The values of a batch, of codes that follow each other from `start` on. Tables are made once.
template <class Map, class B>
struct BatchReader {
    using V = typename B::Part;
    using Reader = typename Map::template Reader<V>;
    const MomentFormat& format;
    Reader read;

    explicit BatchReader(const MomentFormat& f) : format(f), read(f, nullptr, 0, 0.0f) {}

    ALWAYS_INLINE void start(const uint8_t* codes, int shift, const float* scale) {
        read = Reader(format, codes, shift, *scale);
    }
    ALWAYS_INLINE void operator()(int64_t i, typename V::F* to) const {
        for (int k = 0; k < B::parts; ++k) to[k] = read(i + k * V::width);
    }
};

#if defined(__AVX2__) && !defined(__AVX512F__)
template <>
struct BatchReader<Halves, Batch<Avx2, 4>> {
    const uint8_t* codes;
    __m128i shift;
    Avx2::Values16 values;
    Avx2::F scale;

    explicit BatchReader(const MomentFormat& f) : values(f.values) {}

    ALWAYS_INLINE void start(const uint8_t* first, int half, const float* s) {
        codes = first, shift = _mm_cvtsi32_si128(half), scale = Avx2::set(*s);
    }
    ALWAYS_INLINE void operator()(int64_t i, Avx2::F* to) const {
        auto bytes = _mm256_srl_epi16(Avx2::load_for_unpacking(codes + i), shift);
        values(Avx2::bit_and(bytes, Avx2::set_int(0x0f0f0f0f)), to);
        for (int k = 0; k < 4; ++k) to[k] = Avx2::mul(to[k], scale);
    }
};

// The lower half of the bits of a value is 0: the upper half is computed of sixteen codes at once.
template <bool is_signed>
struct BatchReader<Float<is_signed>, Batch<Avx2, 4>> {
    const uint8_t* codes;
    Avx2::F scale;

    explicit BatchReader(const MomentFormat&) {}

    ALWAYS_INLINE void start(const uint8_t* first, int, const float* s) { codes = first, scale = Avx2::set(*s); }
    ALWAYS_INLINE void operator()(int64_t i, Avx2::F* to) const {
        auto bytes = Avx2::load_for_unpacking(codes + i), zero = Avx2::set_int(0);
        Avx2::I upper[2] = {_mm256_unpacklo_epi8(zero, bytes), _mm256_unpackhi_epi8(zero, bytes)};
        for (int k = 0; k < 2; ++k) {
            auto bits = upper_bits(upper[k]);
            to[2 * k] = Avx2::mul(Avx2::bits_to_float(_mm256_unpacklo_epi16(zero, bits)), scale);
            to[2 * k + 1] = Avx2::mul(Avx2::bits_to_float(_mm256_unpackhi_epi16(zero, bits)), scale);
        }
    }

    // Of codes in the upper bytes of sixteen words.
    static ALWAYS_INLINE Avx2::I upper_bits(Avx2::I code) {
        constexpr int shift = 24 - FLOAT_SHIFT;
        auto base = _mm256_set1_epi16(FLOAT_BASE[is_signed] >> 16);
        if constexpr (!is_signed) return _mm256_add_epi16(_mm256_srli_epi16(code, shift), base);
        auto sign = _mm256_set1_epi16(static_cast<int16_t>(0x8000));
        auto count = _mm256_and_si256(_mm256_srli_epi16(code, shift), _mm256_set1_epi16(127 << (8 - shift)));
        auto is_value = _mm256_cmpgt_epi16(count, Avx2::set_int(0));
        auto magnitude = _mm256_and_si256(_mm256_add_epi16(count, base), is_value);
        return _mm256_or_si256(magnitude, _mm256_and_si256(code, sign));
    }
};
#endif

struct Table {
    template <class V>
    struct Reader {
        const uint8_t* codes;
        const float* values;
        typename V::F scale;

        Reader(const MomentFormat& f, const uint8_t* first, int, float s)
            : codes(first), values(f.values), scale(V::set(s)) {}

        ALWAYS_INLINE typename V::F operator()(int64_t i) const {
            return V::mul(V::gather(values, V::load_u8(codes + i)), scale);
        }
    };
};

template <class V, class Format>
void decode_as(const MomentFormat& f, const uint8_t* codes, int shift, float scale, float* to, int64_t n) {
    typename Format::template Reader<V> read(f, codes, shift, scale);
    int64_t i = 0;
    for (; i + V::width <= n; i += V::width) V::store(to + i, read(i));
    if constexpr (V::width > 1) decode_as<typename V::Rest, Format>(f, codes + i, shift, scale, to + i, n - i);
}

using Decode = void(const MomentFormat& f, const uint8_t* codes, int shift, float scale, float* to, int64_t n);

Decode* decoder(const MomentFormat& f) {
    using V = Widest;
    if (f.bits == 4) return decode_as<V, Halves>;
    if (f.map == TABLE) return decode_as<V, Table>;
    if (f.map == FLOAT) return f.is_signed ? decode_as<V, Float<true>> : decode_as<V, Float<false>>;
    switch (f.exponent * 2 + f.is_signed) {
        case 2: return decode_as<V, Power<1, false>>;
        case 3: return decode_as<V, Power<1, true>>;
        case 4: return decode_as<V, Power<2, false>>;
        case 5: return decode_as<V, Power<2, true>>;
        case 8: return decode_as<V, Power<4, false>>;
        case 9: return decode_as<V, Power<4, true>>;
        case 16: return decode_as<V, Power<8, false>>;
        default: return decode_as<V, Power<8, true>>;
    }
}

void decode(const MomentFormat& f, const uint8_t* codes, int shift, float scale, float* to, int64_t n) {
    decoder(f)(f, codes, shift, scale, to, n);
}

}  // namespace
