// What the driver (formats.cpp), the stages (formats_stages.cpp) and Python (simulated/cpu_formats.py) agree on.
// numerics/format.py has the definition.
#pragma once

#include "common.h"

// Where the scale of an element is: that of (row / rows_each) and (column / columns_each) in a matrix of so many columns.
struct ScalesOfBlocks {
    const float* values;
    int64_t columns_each;  // 0: one for all columns
    int64_t row_stride;    // 0: those of the first row for all
};

struct BlockMaximaCall {
    const void* x;
    int64_t num_rows, num_columns, row_stride;  // elements from one row to the next
    int64_t block_size;
    float* maxima;  // [num_rows, ceil(num_columns / block_size)]
    int32_t dtype;
};

struct EncodeCall {
    const void* x;
    int64_t num_rows, num_columns, row_stride;
    ScalesOfBlocks scales;
    void* codes;  // [num_rows, num_columns], one byte each
    uint32_t key[2];
    int32_t stochastic;
    int32_t dtype;
    int32_t levels;  // of integers; 0: floating point of what follows
    int32_t mantissa_bits, smallest_exponent, sign_bit, nan;
    float largest;
};

struct DecodeCall {
    const void* codes;  // [num_rows, num_columns]
    int64_t num_rows, num_columns;
    ScalesOfBlocks scales;
    const float* table;     // the values of all codes, [256]
    float shrink, less;     // a step nearer to zero is |value| * shrink - less
    void* result;           // [num_rows, num_columns]
    int32_t dtype;
};

// Compiled once for each instruction set. All take the rows from `begin` to `end`.
struct FormatsStages {
    void (*block_maxima)(const BlockMaximaCall&, int64_t begin, int64_t end);
    void (*encode)(const EncodeCall&, int64_t begin, int64_t end);
    void (*decode)(const DecodeCall&, int64_t begin, int64_t end);
};

DS_QUANT_BY_ISA(FormatsStages, ds_quant_formats_stages)
