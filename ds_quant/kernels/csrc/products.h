// What the driver (products.cpp), the stages (products_stages.cpp) and Python (products_cpu.py) agree on. numerics/
// products.py has the definition.
#pragma once

#include "common.h"

// What becomes of the elements when rows, columns or all of them share a scale. Without `codes`, nothing.
struct Side {
    const float* factor;  // one a column where rows are quantized, one a row where columns are; null: none
    int8_t* codes;        // [num_rows, num_columns]
    float* scale;
    uint32_t key[2];
    int32_t stochastic;
    int32_t one_scale;    // for all elements; in `rows` only
};

struct QuantizeCall {
    const void* x;
    int64_t num_rows, num_columns, row_stride;  // elements from one row to the next
    Side rows, columns;
    int32_t dtype;
    float levels;  // the scales that a group's largest magnitude takes: codes from floor(-levels) to floor(levels)
};

struct EpilogueCall {
    const void* products;   // int32, or fp32 of whole numbers
    const int32_t* others;  // [num_rows, num_columns], added to the products; null: none
    int64_t num_rows, num_columns, row_stride;
    const float* row_scale;     // null: none
    const float* column_scale;
    const void* bias;
    void* result;               // [num_rows, num_columns]
    int32_t one_row_scale, one_column_scale;  // for all rows, for all columns
    int32_t bias_dtype, dtype;
    int32_t is_fp32;            // the products
};

// One of the scales is there.
struct DequantizeCall {
    const int8_t* codes;  // [num_rows, num_columns]
    int64_t num_rows, num_columns, row_stride;
    const float* row_scale;
    const float* column_scale;
    void* result;         // [num_rows, num_columns]
    int32_t one_scale;    // for all elements
    int32_t dtype;
};

// Compiled once for each instruction set. All take the rows from `begin` to `end`.
struct ProductsStages {
    // Bits of the largest magnitude; of each column, if larger than what is there.
    uint32_t (*absmax)(const QuantizeCall&, int64_t begin, int64_t end);
    void (*column_maxima)(const QuantizeCall&, int64_t begin, int64_t end, uint32_t* maxima);
    // By each row's own scale, which is put out, or by the one that is there already.
    void (*quantize_rows)(const QuantizeCall&, int64_t begin, int64_t end);
    // By the scales that are there already and their inverses, 0 where there is none.
    void (*quantize_columns)(const QuantizeCall&, int64_t begin, int64_t end, const float* inverses);
    void (*epilogue)(const EpilogueCall&, int64_t begin, int64_t end);
    void (*dequantize)(const DequantizeCall&, int64_t begin, int64_t end);
};

DS_QUANT_BY_ISA(ProductsStages, ds_quant_products_stages)
