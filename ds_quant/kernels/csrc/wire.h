// What the driver (wire.cpp), the stages (wire_stages.cpp of integers with fp32 scales, wire_formats_stages.cpp of the
// formats with a name) and Python (wire/cpu.py) agree on. The definition of formats and operations is numerics/wire.py,
// that of blocks numerics/wire_blocks.py.
#pragma once

#include "common.h"

constexpr int64_t MAX_BLOCK = 4096;

enum WireElements : int32_t { INTEGERS = 0, E2M1 = 1, NAMED_INTEGERS = 2 };  // 0: of no format with a name
enum ScaleKind : int32_t { FLOAT_SCALE = 0, E8M0_SCALE = 1, E4M3_SCALE = 2 };
enum ScaleRule : int32_t { FLOOR = 0, UP = 1, FOUR_SIX = 2 };

// One call. Arrays have an entry a piece. Addresses are integers, 0 for none.
struct WireCall {
    int64_t num_pieces;
    const int64_t* data;      // addresses of the first elements
    const int64_t* numel;
    const int64_t* scale_at;  // in bytes from the start of a message
    const int64_t* codes_at;
    const uint64_t* stream;
    const int64_t* read;      // addresses of residuals; null: no piece has any
    const int64_t* write;
    const int64_t* result;    // addresses of the first elements of what `reduce` puts out; null: it writes a message
    uint8_t* message;
    const uint8_t* received;  // num_ranks - 1 messages
    double* errors;           // two sums, or null
    const float* largest;     // what the driver finds for e4m3 scales: a WireLargest of each piece; else null
    int64_t message_bytes;    // of one received message
    int64_t block_size;
    int32_t bits;
    int32_t elements;         // a WireElements
    int32_t scale_kind;
    int32_t scale_rule;
    int32_t rotated;
    int32_t stochastic;
    int32_t dtype;            // of the elements
    int32_t result_dtype;
    int32_t num_ranks;
    int32_t own_rank;
    uint32_t key[2];
    float factor;
    float residual_scale;
    float residual_inverse;
};

// Bits that flip the signs of a block's elements before they are rotated.
struct Signs {
    uint32_t bits[MAX_BLOCK];
};

// The elements `begin` (where a block starts) to `end` of a piece. Adds to two sums where errors are asked for.
using WireStage = void(const WireCall&, const Signs&, int64_t piece, int64_t begin, int64_t end, double* errors);

// The largest magnitude of the blocks without an Inf or a NaN, of what `quantize` or `reduce` would quantize.
using WireLargest = float(const WireCall&, const Signs&, int64_t piece, int64_t begin, int64_t end);

// Compiled once for each instruction set.
struct WireStages {
    WireStage *quantize, *reduce, *dequantize;
    WireLargest *largest_own, *largest_sum;  // null: not needed
};

DS_QUANT_BY_ISA(WireStages, ds_quant_wire_stages)
DS_QUANT_BY_ISA(WireStages, ds_quant_wire_formats_stages)
