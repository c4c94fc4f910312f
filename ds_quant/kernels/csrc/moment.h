// A moment in memory, as drivers see it: where its codes lie, its scales, and how values are read and stored.
#pragma once

#include <algorithm>
#include <cstring>

#include "adamw.h"
#include "random.h"

// No floating point in here: between stages of AVX, instructions of plain x86-64 would wait for each other.
namespace {

constexpr int64_t TILE = 4096;  // elements of a buffer, and the longest block that goes in one pass
constexpr int64_t UNIT = 512;   // elements of a unit of shorter blocks

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of the bits of max |x|: denormal maxima count as zeros, Inf and NaN make the scale a NaN.
constexpr uint32_t SMALLEST_NORMAL = 0x00800000, INFINITE = 0x7f800000, QUIET_NAN = 0x7fc00000;

bool is_scale(uint32_t absmax) { return absmax >= SMALLEST_NORMAL && absmax < INFINITE; }

// Where in memory elements of a moment lie that follow each other, `length` of them at most.
struct Place {
    int64_t block;
    uint8_t* codes;
    int shift;  // of 4-bit codes
    int64_t length;
    bool last_is_single;  // the last byte of this run has no element in its high half
};

struct Moment {
    const MomentFormat& format;
    uint8_t* codes;
    float* scale;
    int64_t numel;
    int64_t block_size;  // 1 for fp32
    uint32_t key[2];
    bool stochastic;

    // The key is that of the parameter; `stream` is the moment's.
    Moment(
        const MomentFormat& f, void* codes_, float* scale_, int64_t numel_, int64_t size, const uint32_t* key_,
        uint64_t stream, bool is_stochastic)
        : format(f),
          codes(static_cast<uint8_t*>(codes_)),
          scale(scale_),
          numel(numel_),
          block_size(f.bits == 32 ? 1 : size),
          key{key_[0], key_[1]},
          stochastic(is_stochastic) {
        if (stochastic) derive_key(key, stream);
    }

    bool is_fp32() const { return format.bits == 32; }
    float* fp32(int64_t element) const { return reinterpret_cast<float*>(codes) + element; }
    int64_t run() const { return format.bits == 4 ? ceil_div(block_size, 2) : block_size; }
    int64_t num_blocks() const { return is_fp32() ? 0 : ceil_div(numel, block_size); }

    Place place(int64_t element) const {
        int64_t block = element / block_size, begin = block * block_size, in_block = element - begin;
        int64_t length = std::min(block_size, numel - begin);
        if (format.bits == 8) return {block, codes + element, 0, length - in_block, false};
        uint8_t* bytes = codes + block * ceil_div(block_size, 2);
        int64_t half = ceil_div(length, 2);
        if (in_block < half) return {block, bytes + in_block, 0, half - in_block, length % 2 != 0};
        return {block, bytes + in_block - half, 4, length - in_block, false};
    }

    bool is_log() const { return format.map == LOG; }
    int64_t scales() const { return is_log() ? 2 : 1; }  // of a block

    // Writes codes of n elements of one block from `element` on, one to a byte. `absmax` are the bits of its max |x|.
    void encode(const Stages& stages, int64_t element, float* x, int64_t n, uint32_t absmax, uint8_t* to) const {
        Draws draws{{key[0], key[1]}, static_cast<uint64_t>(element)};
        uint32_t scale = is_scale(absmax) ? absmax : 0;
        if (!scale) std::memset(x, 0, sizeof(float) * n);  // Inf times 0 would be NaN, a negative number -0
        stages.encode(format, x, scale, stochastic ? &draws : nullptr, to, n);
    }

    // The same into memory; n <= TILE elements in one place.
    void store_run(const Stages& stages, const Place& at, int64_t element, float* x, int64_t n, uint32_t absmax) const {
        if (format.bits == 8) return encode(stages, element, x, n, absmax, at.codes);
        alignas(64) uint8_t unpacked[TILE];
        encode(stages, element, x, n, absmax, unpacked);
        stages.pack_half(unpacked, at.shift, at.codes, n);
        if (at.last_is_single && n == at.length) at.codes[n - 1] &= 0x0f;
    }

    // Both scales of map LOG, of which `fit_log` sets the second where there is something to code.
    void set_scale(int64_t block, uint32_t absmax) const {
        uint32_t special = absmax < INFINITE ? 0 : QUIET_NAN;
        uint32_t bits = is_scale(absmax) ? absmax : special;
        for (int64_t i = 0; i < scales(); ++i) std::memcpy(scale + block * scales() + i, &bits, sizeof bits);
    }

    // The scales of a whole block of map LOG, and its codes, one to a byte.
    void store_log(
        const Stages& stages, int64_t block, int64_t element, const float* x, int64_t n, uint32_t absmax,
        uint8_t* to) const {
        Draws draws{{key[0], key[1]}, static_cast<uint64_t>(element)};
        float* ends = scale + 2 * block;
        if (!is_scale(absmax)) {
            std::memset(to, 0, n);
            return;
        }
        stages.fit_log(x, n, absmax, ends);
        stages.encode_log(x, ends, stochastic ? &draws : nullptr, to, n);
    }

    // fp32 values of n elements; a pointer to them, in memory or in `buffer`.
    float* load(const Stages& stages, int64_t element, int64_t n, float* buffer) const {
        if (is_fp32()) return fp32(element);
        for (int64_t i = 0; i < n;) {
            Place at = place(element + i);
            int64_t length = std::min(at.length, n - i);
            if (is_log())
                stages.decode_log(at.codes, at.shift, scale + 2 * at.block, buffer + i, length);
            else
                stages.decode(format, at.codes, at.shift, scale[at.block], buffer + i, length);
            i += length;
        }
        return buffer;
    }

    // What follows the fused front, null where `store_blocks` does it.
    BackStage* back(const Stages& stages, int64_t element, int64_t n) const {
        bool has_one_high_word = element >> 33 == (element + n - 1) >> 33;
        return has_one_high_word && element % 32 == 0 ? stages.back(format, stochastic) : nullptr;
    }

    // `maxima` and x are changed.
    void store_fused(
        const Stages& stages, int64_t element, int64_t n, float* x, uint32_t* maxima, const uint32_t* words) const {
        BackStage* stage = back(stages, element, n);
        if (!stage) return store_blocks(stages, element, n, x, maxima);
        int64_t block = element / block_size;
        for (int64_t i = 0; i < n / block_size; ++i) {
            set_scale(block + i, maxima[i]);
            if (is_scale(maxima[i])) continue;
            maxima[i] = 0;
            std::memset(x + i * block_size, 0, sizeof(float) * block_size);
        }
        stage(Back{&format, block_size, x, maxima, words, place(element).codes, n, scale + block * scales()});
    }

    // Stores n elements in whole blocks, with their scales. `maxima` are the bits of the blocks' max |x| if not null.
    void store_blocks(const Stages& stages, int64_t element, int64_t n, float* x, const uint32_t* maxima) const {
        if (is_fp32()) return;
        alignas(64) uint8_t unpacked[TILE];
        int64_t block = element / block_size;
        uint8_t* packed = place(element).codes;
        uint8_t* codes_to = format.bits == 8 ? packed : unpacked;
        for (int64_t i = 0; i < n; i += block_size, ++block) {
            int64_t length = std::min(block_size, n - i);
            uint32_t absmax = maxima ? *maxima++ : stages.absmax(x + i, length);
            set_scale(block, absmax);
            if (is_log())
                store_log(stages, block, element + i, x + i, length, absmax, codes_to + i);
            else
                encode(stages, element + i, x + i, length, absmax, codes_to + i);
        }
        // Not block by block: a processor waits where it reads at once, in wider pieces, what has just been written.
        if (format.bits == 4)
            for (int64_t i = 0; i < n; i += block_size)
                packed += stages.pack(unpacked + i, packed, std::min(block_size, n - i));
    }
};

}  // namespace
