// Elements of the formats with a name, of 4 bits: from blocks to codes, one byte each, and back. numerics/minifloat.py,
// integer.py and four_six.py have the definitions.
#pragma once

#include "random.h"
#include "wire_elements.h"
#include "wire_scales.h"

namespace {

struct ValuesOfCodes {
    float of[16];
};

constexpr ValuesOfCodes E2M1_VALUES = {
    {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f}};
constexpr ValuesOfCodes INTEGER_VALUES = {
    {0.0f, 1.0f, 2.0f, 3.0f, 4.0f, 5.0f, 6.0f, 7.0f, -8.0f, -7.0f, -6.0f, -5.0f, -4.0f, -3.0f, -2.0f, -1.0f}};

// Calls body(i, length) for the blocks of a run of n elements.
template <class Body>
ALWAYS_INLINE void for_each_block(int64_t n, int64_t block_size, const Body& body) {
    for (int64_t i = 0; i < n; i += block_size) body(i, n - i < block_size ? n - i : block_size);
}

// A run of blocks whose elements become codes.
struct NamedEncoding {
    const float* y;
    const float* scales;  // one a block
    float* lost;          // y - value * scale
    uint8_t* codes;       // one a byte
    double* errors;       // two sums, or null
    uint32_t key[2];
    uint64_t index;       // of y[0] in its piece
};

template <class V>
struct Encoded {
    typename V::I code;
    typename V::F value;  // in units of the scale
};

// The definition adds a quotient to 0: there is no -0.
template <class V>
ALWAYS_INLINE typename V::F in_steps(typename V::F y, typename V::F scale) {
    return V::add(V::div(y, scale), V::set(0.0f));
}

// A magnitude up to 6, in units of the distance between the two values of e2m1 that it lies between.
template <class V>
struct E2m1Units {
    typename V::I exponent;  // bits of a power of two, at least 1: twice the distance
    typename V::F units;

    explicit ALWAYS_INLINE E2m1Units(typename V::F magnitude) {
        auto bits = V::max_int(V::float_to_bits(magnitude), V::set_int(0x3f800000));
        exponent = V::bit_and(bits, V::set_int(0x7f800000));
        units = V::mul(magnitude, V::bits_to_float(V::sub(V::set_int(0x7f800000), exponent)));
    }

    ALWAYS_INLINE typename V::I distance() const { return V::sub(exponent, V::set_int(0x00800000)); }
};

template <class V, bool stochastic>
ALWAYS_INLINE Encoded<V> encode_e2m1(typename V::F steps, typename V::F draw) {
    auto bits = V::float_to_bits(steps), sign = V::bit_and(bits, V::set_int(0x80000000));
    E2m1Units<V> of(V::min(V::abs(steps), V::set(6.0f)));
    typename V::I count;
    if constexpr (stochastic) {
        // Of a negative number the lower neighbour is the one that is larger in magnitude.
        auto whole = V::floor(of.units), rest = V::sub(of.units, whole), one = V::set(1.0f);
        auto above = V::add_if(V::greater(rest, draw), whole, one);
        auto below = V::add_if(V::at_least(draw, V::sub(one, rest)), whole, one);
        count = V::to_int(V::select(V::greater_int(V::set_int(0), bits), below, above));
    } else {
        count = V::to_nearest_int(of.units);
    }
    auto value = V::float_to_bits(V::mul(V::to_float(count), V::bits_to_float(of.distance())));
    auto before = V::template right<22>(V::sub(of.exponent, V::set_int(0x3f800000)));  // 2 of each power of two
    auto code = V::bit_or(V::add(count, before), V::template right<28>(sign));
    return {code, V::bits_to_float(V::bit_or(value, sign))};
}

template <class V, bool stochastic>
ALWAYS_INLINE Encoded<V> encode_integer(typename V::F steps, typename V::F draw) {
    auto x = V::max(V::min(steps, V::set(7.0f)), V::set(-7.0f));  // the bounds are codes: rounding stays within
    typename V::I count;
    if constexpr (stochastic) {
        auto floor = V::floor(x);
        count = V::to_int(V::add_if(V::greater(V::sub(x, floor), draw), floor, V::set(1.0f)));
    } else {
        count = V::to_nearest_int(x);
    }
    return {V::bit_and(count, V::set_int(15)), V::to_float(count)};
}

// From element i of a block to its end. with_lost: also what they lose, and sums of squares in units of the scale, which
// neither overflow nor vanish.
template <class V, WireElements elements, bool stochastic, bool with_lost>
ALWAYS_INLINE void encode_from(const NamedEncoding& e, int64_t i, int64_t end, float of_block, double sums[2]) {
    auto scale = V::set(of_block), lost_sum = V::set(0.0f), sum = lost_sum;
    Uniform<V> uniform(e.key, static_cast<uint32_t>(e.index >> 32));
    for (; i + V::width <= end; i += V::width) {
        auto y = V::load(e.y + i), steps = in_steps<V>(y, scale), draw = scale;
        if constexpr (stochastic) draw = V::mul(V::to_float(uniform(e.index + i)), V::set(0x1p-24f));
        auto found = elements == E2M1 ? encode_e2m1<V, stochastic>(steps, draw)
                                      : encode_integer<V, stochastic>(steps, draw);
        V::store_u8(e.codes + i, found.code);
        if constexpr (with_lost) {
            auto off = V::sub(steps, found.value);
            V::store(e.lost + i, V::sub(y, V::mul(found.value, scale)));
            lost_sum = V::add(lost_sum, V::mul(off, off));
            sum = V::add(sum, V::mul(steps, steps));
        }
    }
    if constexpr (with_lost) add_lanes<V>(lost_sum, sum, sums);
    if constexpr (V::width > 1)
        if (i < end) encode_from<typename V::Rest, elements, stochastic, with_lost>(e, i, end, of_block, sums);
}

// Of a block with scale 0, which a denormal product may be rounded to, or NaN.
void lose_all(const NamedEncoding& e, int64_t i, int64_t end, float scale) {
    for (; i < end; ++i) {
        e.lost[i] = scale == 0.0f ? e.y[i] : scale;
        double square = static_cast<double>(e.y[i]) * e.y[i];
        if (e.errors && scale == 0.0f) e.errors[0] += square, e.errors[1] += square;
    }
}

template <WireElements elements, bool stochastic, bool with_lost>
void encode_run(const NamedEncoding& e, int64_t n, int64_t block_size) {
    const float* scales = e.scales;
    for_each_block(n, block_size, [&](int64_t at, int64_t length) {
        float scale = *scales++;
        if (!(scale > 0.0f)) {
            std::memset(e.codes + at, 0, length);
            if (with_lost) lose_all(e, at, at + length, scale);
            return;
        }
        double sums[2] = {0.0, 0.0};
        encode_from<Widest, elements, stochastic, with_lost>(e, at, at + length, scale, sums);
        if (with_lost && e.errors)
            for (int k = 0; k < 2; ++k) e.errors[k] += sums[k] * scale * scale;
    });
}

using EncodeRun = void(const NamedEncoding& e, int64_t n, int64_t block_size);

EncodeRun* const ENCODE_RUN[2][2][2] = {
    {{encode_run<E2M1, false, false>, encode_run<E2M1, false, true>},
     {encode_run<E2M1, true, false>, encode_run<E2M1, true, true>}},
    {{encode_run<NAMED_INTEGERS, false, false>, encode_run<NAMED_INTEGERS, false, true>},
     {encode_run<NAMED_INTEGERS, true, false>, encode_run<NAMED_INTEGERS, true, true>}},
};

// ---- four_six ------------------------------------------------------------------------------------------------------

// The sum of 16 numbers as `pairwise` has it: halves are added to each other until one number is left.
template <class V, int distance = V::width / 2>
ALWAYS_INLINE typename V::F sum_within(typename V::F x) {
    if constexpr (distance)
        return sum_within<V, distance / 2>(V::add(x, V::template swap<distance>(x)));
    else
        return x;
}

template <class V>
ALWAYS_INLINE float pairwise(typename V::F (&x)[16 / V::width]) {
    for (int half = 8 / V::width; half; half /= 2)
        for (int k = 0; k < half; ++k) x[k] = V::add(x[k], x[k + half]);
    alignas(64) float sums[V::width];
    V::store(sums, sum_within<V>(x[0]));
    return sums[0];
}

// The squares of what y, 16 elements, are off by when they are rounded to nearest with a scale.
template <class V>
ALWAYS_INLINE float squares_off(const float* y, float scale) {
    if (!(scale > 0.0f)) return 0.0f;
    typename V::F squares[16 / V::width];
    for (int k = 0; k < 16 / V::width; ++k) {
        auto magnitude = V::abs(V::div(V::load(y + k * V::width), V::set(scale)));
        E2m1Units<V> of(V::min(magnitude, V::set(6.0f)));
        auto count = V::to_float(V::to_nearest_int(of.units));
        auto off = V::sub(V::mul(count, V::bits_to_float(of.distance())), magnitude);
        squares[k] = V::mul(off, off);
    }
    return pairwise<V>(squares);
}

// `four_six_parts` of a block of n <= 16 elements, by the bits of its largest magnitude.
float four_six_part(const float* y, int64_t n, uint32_t absmax, float tensor) {
    alignas(64) float filled[16] = {};
    if (n < 16) {
        std::memcpy(filled, y, n * sizeof *y);
        y = filled;
    }
    float six = e4m3_part(absmax, 6.0f, tensor), four = e4m3_part(absmax, 4.0f, tensor), ratio = four / six;
    if (absmax >= INFINITE) return six;
    float error_six = squares_off<Widest>(y, six * tensor), error_four = squares_off<Widest>(y, four * tensor);
    return error_four * (ratio * ratio) < error_six ? four : six;
}

// ---- packed codes --------------------------------------------------------------------------------------------------

// Codes below 16 of a run of blocks, the first half of a block in the lower halves of bytes. Eight bytes at a time.
void pack(const uint8_t* codes, int64_t n, int64_t block_size, uint8_t* packed) {
    for_each_block(n, block_size, [&](int64_t at, int64_t length) {
        const uint8_t *low = codes + at, *high = low + (length + 1) / 2;
        uint8_t* to = packed + at / 2;
        int64_t i = 0, both = length / 2;
        for (; i + 8 <= both; i += 8) {
            uint64_t a, b;
            std::memcpy(&a, low + i, 8);
            std::memcpy(&b, high + i, 8);
            a |= b << 4;
            std::memcpy(to + i, &a, 8);
        }
        for (; i < both; ++i) to[i] = static_cast<uint8_t>(low[i] | high[i] << 4);
        if (length % 2) to[both] = low[both];
    });
}

void unpack(const uint8_t* packed, int64_t n, int64_t block_size, uint8_t* codes) {
    constexpr uint64_t halves = 0x0f0f0f0f0f0f0f0f;
    for_each_block(n, block_size, [&](int64_t at, int64_t length) {
        uint8_t *low = codes + at, *high = low + (length + 1) / 2;
        const uint8_t* from = packed + at / 2;
        int64_t i = 0, both = length / 2;
        for (; i + 8 <= both; i += 8) {
            uint64_t x, a, b;
            std::memcpy(&x, from + i, 8);
            a = x & halves, b = x >> 4 & halves;
            std::memcpy(low + i, &a, 8);
            std::memcpy(high + i, &b, 8);
        }
        for (; i < both; ++i) low[i] = from[i] & 15, high[i] = from[i] >> 4;
        if (length % 2) low[both] = from[both] & 15;
    });
}

// Adds the values of the codes of a run of blocks to `to`.
template <class V>
void add_values(const float* table, const uint8_t* codes, const float* scales, int64_t n, int64_t block_size, float* to) {
    typename V::Table16 values(table);
    for_each_block(n, block_size, [&](int64_t at, int64_t length) {
        float of_block = *scales++;
        auto scale = V::set(of_block);
        int64_t i = at, end = at + length;
        for (; i + V::width <= end; i += V::width)
            V::store(to + i, V::add(V::load(to + i), V::mul(values[V::load_u8(codes + i)], scale)));
        for (; i < end; ++i) to[i] += table[codes[i]] * of_block;
    });
}

}  // namespace
