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
