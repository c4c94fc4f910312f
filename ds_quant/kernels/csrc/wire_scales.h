// Scales of the formats with a name: from a block's largest magnitude to its bytes in a message, and back.
// numerics/wire_blocks.py, scales.py and minifloat.py have the definitions.
#pragma once

#include <cstring>

#include "common.h"
#include "wire.h"

namespace {

constexpr uint32_t INFINITE = 0x7f800000;
constexpr float LARGEST_E4M3 = 448.0f, SMALLEST_E4M3 = 0x1p-9f, LARGEST_WITH_ROOM = 256.0f;
constexpr uint8_t E4M3_NAN = 0x7f, E8M0_NAN = 0xff;

// ---- e8m0 ----------------------------------------------------------------------------------------------------------

ALWAYS_INLINE float e8m0_value(uint8_t stored) {
    return stored == E8M0_NAN ? __builtin_nanf("") : float_of(stored ? stored << 23 : 1u << 22);
}

// Of the bits of a block's largest magnitude; the largest element is 6 = 1.5 * 2^2.
ALWAYS_INLINE uint8_t e8m0_of(uint32_t absmax, int32_t rule) {
    if (absmax >= INFINITE) return E8M0_NAN;
    auto stored = static_cast<int32_t>(absmax >> 23) - 2 + (rule == UP && (absmax & 0x7fffff) > 0x400000);
    return static_cast<uint8_t>(stored > 0 ? stored : 0);
}

// ---- e4m3 ----------------------------------------------------------------------------------------------------------

struct E4m3Values {
    float of[256] = {};

    constexpr E4m3Values() {
        for (int code = 0; code < 128; ++code) {
            int field = code >> 3, count = field ? 8 + (code & 7) : code & 7;
            float value = static_cast<float>(count) * 0x1p-9f;
            for (int f = 1; f < field; ++f) value *= 2.0f;
            of[code] = code == E4M3_NAN ? __builtin_nanf("") : value;
            of[code + 128] = -of[code];
        }
    }
};

constexpr E4m3Values E4M3_VALUES;

// A finite magnitude to the nearest value: its bits have a mantissa of three, and below 2^-6 it is a multiple of 2^-9.
ALWAYS_INLINE float to_e4m3(float magnitude) {
    magnitude = magnitude < LARGEST_E4M3 ? magnitude : LARGEST_E4M3;
    auto exponent = static_cast<int32_t>(bits_of(magnitude) & INFINITE), smallest = (127 - 6) << 23;
    auto unit = static_cast<uint32_t>((exponent > smallest ? exponent : smallest) - (3 << 23));
    float per_unit = float_of((254u << 23) - unit);
    return ((magnitude * per_unit + 0x1.8p23f) - 0x1.8p23f) * float_of(unit);
}

// `e4m3_blocks` by the bits of a block's largest magnitude; of one that is not finite, or of zeros, some value.
ALWAYS_INLINE float e4m3_part(uint32_t absmax, float largest, float tensor) {
    float in_units = float_of(absmax < INFINITE ? absmax : 0) / largest / tensor;
    return to_e4m3(in_units > SMALLEST_E4M3 ? in_units : SMALLEST_E4M3);  // of 0 / 0, too
}

// The code of a value: the number of values below it.
ALWAYS_INLINE uint8_t e4m3_stored(float part, uint32_t absmax) {
    auto normal = static_cast<int32_t>(bits_of(part) >> 20) - ((127 - 7) << 3);
    auto code = part < 0x1p-6f ? static_cast<int32_t>(part * 0x1p9f) : normal;
    return static_cast<uint8_t>(absmax >= INFINITE ? E4M3_NAN : absmax ? code : 0);
}

ALWAYS_INLINE float e4m3_scale(float part, uint32_t absmax, float tensor) {
    float known = absmax ? part * tensor : 0.0f;
    return absmax < INFINITE ? known : __builtin_nanf("");
}

// The piece's part of e4m3 scales, by its largest finite magnitude of a block.
float tensor_scale(const WireCall& c, int64_t piece, float largest) {
    float of_block = c.scale_rule == FOUR_SIX ? LARGEST_WITH_ROOM : LARGEST_E4M3;
    return scale_of(bits_of(c.largest[piece]), of_block * largest);
}

// ---- in messages ---------------------------------------------------------------------------------------------------

// Where a block's scale is stored, from the first byte of the piece's scales on.
ALWAYS_INLINE int64_t scale_offset(int32_t kind, int64_t block) {
    return kind == FLOAT_SCALE ? 4 * block : kind == E8M0_SCALE ? block : 4 + block;
}

// The scales of `count` blocks from number `block` on.
void load_scales(int32_t kind, const uint8_t* scales, int64_t block, int64_t count, float* to) {
    const uint8_t* from = scales + scale_offset(kind, block);
    if (kind == FLOAT_SCALE) {
        std::memcpy(to, from, count * sizeof *to);
    } else if (kind == E8M0_SCALE) {
        for (int64_t i = 0; i < count; ++i) to[i] = e8m0_value(from[i]);
    } else {
        float tensor;
        std::memcpy(&tensor, scales, sizeof tensor);
        for (int64_t i = 0; i < count; ++i) to[i] = E4M3_VALUES.of[from[i]] * tensor;
    }
}

}  // namespace
