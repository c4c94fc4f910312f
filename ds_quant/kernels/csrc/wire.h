// What the driver (wire.cpp), the stages (wire_stages.cpp) and Python (wire_cpu.py) agree on. The definition of formats
// and operations is numerics/wire.py.
#pragma once

#include "common.h"

constexpr int64_t MAX_BLOCK = 4096;

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
    int64_t message_bytes;    // of one received message
    int64_t block_size;
    int32_t bits;
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

// Compiled once for each instruction set.
struct WireStages {
    WireStage *quantize, *reduce, *dequantize;
};

DS_QUANT_BY_ISA(WireStages, ds_quant_wire_stages)
