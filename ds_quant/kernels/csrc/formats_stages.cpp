// Elements to codes of floating point or of integers and back, by scales that are there already. Compiled once for each
// instruction set, with DS_QUANT_ISA its name and -ffp-contract=off. numerics/minifloat.py has the definition.
//
// Loops are written for one element; the compiler makes vectors of them, as they choose by bits and not by branches. A
// piece of a row is worked on in buffers that stay in the first cache.
#include <algorithm>
#include <cstring>

#include "convert.h"
#include "formats.h"
#include "random.h"
#include "simd.h"

namespace {

constexpr int64_t PIECE = 1024;

// To the nearest whole number, ties to even, of magnitudes below 2^22: the sum has units of 1.
ALWAYS_INLINE float rounded(float x) { return (x + 0x1.8p23f) - 0x1.8p23f; }

const void* element(const void* x, int32_t dtype, int64_t i) {
    return static_cast<const char*>(x) + i * itemsize(dtype);
}

// Calls body(column, count) for the pieces of a row.
template <class Body>
void for_each_piece(int64_t num_columns, const Body& body) {
    for (int64_t column = 0; column < num_columns; column += PIECE) body(column, std::min(PIECE, num_columns - column));
}

// The scales of `count` elements from `column` on.
void spread(const ScalesOfBlocks& scales, int64_t row, int64_t column, int64_t count, float* to) {
    const float* from = scales.values + row * scales.row_stride;
    if (scales.columns_each == 1) {
        std::memcpy(to, from + column, count * sizeof *to);
        return;
    }
    int64_t size = scales.columns_each ? scales.columns_each : column + count;
    for (int64_t i = 0; i < count;) {
        int64_t block = (column + i) / size, end = std::min(count, (block + 1) * size - column);
        std::fill(to + i, to + end, from[block]);
        i = end;
    }
}

void block_maxima(const BlockMaximaCall& c, int64_t begin, int64_t end) {
    int64_t num_blocks = (c.num_columns + c.block_size - 1) / c.block_size;
    alignas(64) float x[PIECE];
    for (int64_t row = begin; row < end; ++row) {
        float* maxima = c.maxima + row * num_blocks;
        // Of floats that are not negative, NaN apart, the order is that of their bits; NaN is above them all.
        std::fill(maxima, maxima + num_blocks, 0.0f);
        for_each_piece(c.num_columns, [&](int64_t column, int64_t count) {
            load(static_cast<Dtype>(c.dtype), element(c.x, c.dtype, row * c.row_stride + column), x, count);
            for (int64_t i = 0; i < count;) {
                int64_t block = (column + i) / c.block_size;
                int64_t stop = std::min(count, (block + 1) * c.block_size - column);
                int32_t most = static_cast<int32_t>(bits_of(maxima[block]));
                for (; i < stop; ++i) most = std::max(most, static_cast<int32_t>(bits_of(x[i]) & 0x7fffffff));
                maxima[block] = float_of(static_cast<uint32_t>(most));
            }
        });
    }
}

// Multiples of 2^-24 in [0, 1) of the elements index + 0, 1, ...: `uniform` of numerics/random.py.
void draw(const uint32_t key[2], uint64_t index, int64_t count, float* to) {
    while (count) {
        auto low = static_cast<uint32_t>(index);
        int64_t until = std::min<int64_t>(count, static_cast<int64_t>((1ull << 32) - low));
        uint32_t key0 = key[0], key1 = key[1] + static_cast<uint32_t>(index >> 32) * 0x1e3779b1u;
        for (int64_t i = 0; i < until; ++i) {
            uint32_t bits = mix<Scalar>(mix<Scalar>((low + static_cast<uint32_t>(i)) ^ key0) + key1);
            to[i] = static_cast<float>(static_cast<int32_t>(bits >> 8)) * 0x1p-24f;
        }
        index += until, to += until, count -= until;
    }
}

template <bool stochastic>
void encode_floats(const EncodeCall& c, const float* steps, const float* draws, uint8_t* codes, int64_t count) {
    const int32_t smallest = c.smallest_exponent, mantissa = c.mantissa_bits, nan = c.nan, sign_bit = c.sign_bit;
    const auto largest = static_cast<int32_t>(bits_of(c.largest));
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits = bits_of(steps[i]);
        auto unsigned_bits = static_cast<int32_t>(bits & 0x7fffffff);
        int32_t magnitude = std::min(unsigned_bits, largest);  // of NaN the largest; it has its own code below
        int32_t exponent = std::max((magnitude >> 23) - 127, smallest);
        auto to_units = static_cast<uint32_t>(mantissa - exponent + 127) << 23;
        float units = float_of(static_cast<uint32_t>(magnitude)) * float_of(to_units);
        int32_t code;
        if constexpr (stochastic) {
            code = static_cast<int32_t>(units);
            // Of a negative number the lower neighbour is the one that is larger in magnitude.
            float rest = units - static_cast<float>(code);
            int32_t above = draws[i] < rest, not_below = draws[i] >= 1.0f - rest;
            auto is_negative = static_cast<int32_t>(bits >> 31);
            code += (is_negative & not_below) | (~is_negative & above);
        } else {
            code = static_cast<int32_t>(rounded(units));
        }
        code += (exponent - smallest) << mantissa;
        int32_t is_nan = -static_cast<int32_t>(unsigned_bits > 0x7f800000);
        code = (is_nan & nan) | (~is_nan & code);
        codes[i] = static_cast<uint8_t>(code | static_cast<int32_t>(bits >> 31) << sign_bit);
    }
}

template <bool stochastic>
void encode_integers(const EncodeCall& c, const float* steps, const float* draws, uint8_t* codes, int64_t count) {
    const float most = static_cast<float>(c.levels);
    for (int64_t i = 0; i < count; ++i) {
        // Beyond a step more, all become the last level.
        float x = std::max(-most - 1.0f, std::min(steps[i], most + 1.0f)), code = rounded(x);
        if constexpr (stochastic) {
            float floor = code > x ? code - 1.0f : code;
            code = floor + (draws[i] < x - floor ? 1.0f : 0.0f);
        }
        codes[i] = static_cast<uint8_t>(static_cast<int32_t>(std::max(-most, std::min(code, most))));
    }
}

void encode(const EncodeCall& c, int64_t begin, int64_t end) {
    alignas(64) float steps[PIECE], scales[PIECE], draws[PIECE];
    auto* encode_piece = c.levels ? (c.stochastic ? encode_integers<true> : encode_integers<false>)
                                  : (c.stochastic ? encode_floats<true> : encode_floats<false>);
    for (int64_t row = begin; row < end; ++row)
        for_each_piece(c.num_columns, [&](int64_t column, int64_t count) {
            load(static_cast<Dtype>(c.dtype), element(c.x, c.dtype, row * c.row_stride + column), steps, count);
            spread(c.scales, row, column, count, scales);
            // The definition adds a quotient to 0: there is no -0.
            for (int64_t i = 0; i < count; ++i) {
                uint32_t is_there = -static_cast<uint32_t>(scales[i] > 0.0f);
                steps[i] = float_of(is_there & bits_of(steps[i] / scales[i] + 0.0f));
            }
            int64_t first = row * c.num_columns + column;
            if (c.stochastic) draw(c.key, static_cast<uint64_t>(first), count, draws);
            encode_piece(c, steps, draws, static_cast<uint8_t*>(c.codes) + first, count);
        });
}

void decode(const DecodeCall& c, int64_t begin, int64_t end) {
    constexpr float LARGEST[3] = {0x1.fffffep127f, 0x1.fep127f, 65504.0f};  // of a Dtype
    const float largest = LARGEST[c.dtype], half = largest * 0.5f, shrink = c.shrink, less = c.less;
    alignas(64) float values[PIECE], scales[PIECE];
    const auto* codes = static_cast<const uint8_t*>(c.codes);
    for (int64_t row = begin; row < end; ++row)
        for_each_piece(c.num_columns, [&](int64_t column, int64_t count) {
            int64_t first = row * c.num_columns + column;
            spread(c.scales, row, column, count, scales);
            for (int64_t i = 0; i < count; ++i) values[i] = c.table[codes[first + i]];
            for (int64_t i = 0; i < count; ++i) {
                float steps = values[i], value = steps * scales[i];
                float magnitude = steps < 0.0f ? -steps : steps;
                float nearer = (magnitude * shrink - less) * (scales[i] * 0.5f);
                float within = value < largest ? value : largest;
                within = within > -largest ? within : -largest;
                values[i] = nearer <= half ? within : value;
            }
            store(static_cast<Dtype>(c.dtype), values, static_cast<char*>(c.result) + first * itemsize(c.dtype), count);
        });
}

const FormatsStages STAGES = {block_maxima, encode, decode};

}  // namespace

extern "C" const FormatsStages* DS_QUANT_JOIN(ds_quant_formats_stages_, DS_QUANT_ISA)() { return &STAGES; }
