// What the driver (adamw.cpp), the stages (stages.cpp) and Python (cpu.py, build.py) agree on.
#pragma once

#include "common.h"
#include "masters.h"

// linear is a power; with an offset it is a table. Blocks of LOG have two scales, which follow each other.
enum Map : int32_t { TABLE = 0, POWER = 1, FLOAT = 2, LOG = 3 };

// Where the numbers from 0 to 1 are cut into 32 cells, two (shift 22) or four (shift 21) to a factor of two, and none has
// two bounds: the code below a cell; its bound is the next code's. The number of a cell is bits >> shift, less `first`;
// lower numbers are in cell 0.
struct Cells {
    int32_t shift;  // 0: there is no such cut
    int32_t first;
    int32_t codes[32];
};

// How a moment is stored. cpu.py packs it; the definition is numerics/codes.py.
struct MomentFormat {
    int32_t bits;       // 32 (fp32), 8 or 4
    int32_t is_signed;
    int32_t map;        // see Map; of 4 bits LOG or not
    int32_t levels;     // of power and linear maps
    int32_t exponent;
    int32_t count;      // of the values of an 8-bit table
    float values[256];  // 4 bits: the value of each half byte; 8-bit table: increasing, filled up with the last
    // Of 4 bits, by code; of signed power and linear maps, by code from 0 up. Filled up with Inf.
    int32_t mirrored;      // 4-bit codes are in two's complement, with the same values on both sides of 0
    float bounds[17];      // values, without the last
    float gaps[16];        // from each value to the next, in units of 2^16
    float thresholds[17];  // the least x that is rounded to this code rather than to the one below
    Cells bound_cells, threshold_cells;
};

struct Format {
    int32_t param_dtype;
    int32_t grad_dtype;
    MomentFormat exp_avg;
    MomentFormat exp_avg_sq;
};

struct Entry {
    void* param;
    const void* grad;
    void* codes[2];  // exp_avg, exp_avg_sq; fp32 moments themselves where bits is 32
    float* scale[2];
    int8_t* low_bits;  // what a bf16 param lacks of a master of 24 bits; null: nothing
    int64_t numel;
    int64_t block_size[2];
    uint64_t stream;  // of exp_avg; exp_avg_sq has the next
    double beta1, beta2, eps, decay, step_size, correction;
    uint32_t key[4];  // exp_avg's two words, exp_avg_sq's two words
    uint32_t param_key[2];  // of the rounding of a bf16 param; not derived from any more
    int32_t format;   // index into the formats of the call
    int32_t stochastic;  // bit 0: exp_avg, bit 1: exp_avg_sq, bit 2: param
};

// Scalars of a step, rounded to fp32 once.
struct Scalars {
    float beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, step_size, correction;
};

// Random numbers of consecutive elements, the first of which has number `index`.
struct Draws {
    uint32_t key[2];
    uint64_t index;
};

// What a fused front part of the step is given: whole blocks of quantized moments, whose halves (of 4-bit codes) are
// multiples of 32 elements, and fp32 param and grad. Where words are drawn, the first element's number is a multiple of
// 32, and no multiple of 2^33 lies between the elements' numbers.
struct FrontMoment {
    const MomentFormat* format;
    int64_t block_size;
    const uint8_t* codes;
    const float* scale;
    float* to;         // the new moments, n of them
    uint32_t* absmax;  // bits of max |x| of each block
    uint32_t* words;   // of random bits for the back part, one for two elements; null: none are drawn
    Draws draws;
};

// Memory that is read in step with the elements.
struct Stream {
    const char* from;
    int64_t bytes;  // of 32 elements; the first line of 64 bytes of them is meant
};

constexpr int STREAMS = 6;

struct Front {
    float* param;
    const float* grad;
    int64_t n;
    FrontMoment moments[2];
    const Scalars* scalars;
    Stream streams[STREAMS];  // to be fetched ahead
};

using FrontStage = void(const Front&);

// What a fused back part is given: new moments in whole blocks, as for the front.
struct Back {
    const MomentFormat* format;
    int64_t block_size;
    const float* x;
    const uint32_t* scales;  // by their bits, 0: x is 0 there
    const uint32_t* words;   // of random bits, from the front; null: to nearest
    uint8_t* codes;          // where they belong, 4-bit ones packed
    int64_t n;
    float* ends;             // of map LOG: where the two scales of each block belong; those of scales 0 are there
};

using BackStage = void(const Back&);

// The loops over elements, compiled once for each instruction set. n is any length; pointers need no alignment.
struct Stages {
    void (*load)(Dtype dtype, const void* from, float* to, int64_t n);
    void (*store)(Dtype dtype, const float* from, void* to, int64_t n);
    MastersStage *join, *split;
    // The new moments, in place; `update` also steps the parameter.
    void (*moments)(const float* grad, float* exp_avg, float* exp_avg_sq, int64_t n, const Scalars& scalars);
    void (*update)(float* param, const float* grad, float* exp_avg, float* exp_avg_sq, int64_t n, const Scalars&);
    // Bits of max |x|: as integers, NaN is above Inf and Inf above every number.
    uint32_t (*absmax)(const float* x, int64_t n);
    // The loop for two formats, null for those that go through `decode`, `update` and `absmax` one after the other.
    FrontStage* (*front)(const MomentFormat& exp_avg, const MomentFormat& exp_avg_sq);
    // The loop that finds and stores codes, null for formats that go through `encode` and `pack`.
    BackStage* (*back)(const MomentFormat&, bool stochastic);
    // Of 4-bit codes, `shift` (0 or 4) picks the half of each byte.
    void (*decode)(const MomentFormat&, const uint8_t* codes, int shift, float scale, float* to, int64_t n);
    // Codes of x * (1 / scale), one to a byte; `scale` is given by its bits, 0: of x * 0. draws null: to nearest.
    void (*encode)(const MomentFormat&, const float* x, uint32_t scale, const Draws* draws, uint8_t* codes, int64_t n);
    // Packs the n 4-bit codes of a block, which come one to a byte. Returns the number of bytes.
    int64_t (*pack)(const uint8_t* codes, uint8_t* packed, int64_t n);
    // Puts 4-bit codes into the half `shift` of n bytes.
    void (*pack_half)(const uint8_t* codes, int shift, uint8_t* packed, int64_t n);
    // The same of map LOG, by the two scales of a block, and what sets these by the block and the bits of its max |x|.
    void (*decode_log)(const uint8_t* codes, int shift, const float* ends, float* to, int64_t n);
    void (*encode_log)(const float* x, const float* ends, const Draws* draws, uint8_t* codes, int64_t n);
    void (*fit_log)(const float* x, int64_t n, uint32_t absmax, float* ends);
    void (*uniform16)(const Draws& draws, uint32_t* to, int64_t n);
};

DS_QUANT_BY_ISA(Stages, ds_quant_stages)
