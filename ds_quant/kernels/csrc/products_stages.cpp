// Rows of an operand to codes, and rows of int32 products to the result. Compiled once for each instruction set, with
// DS_QUANT_ISA its name and -ffp-contract=off. numerics/products.py has the definition.
//
// A loop takes whole vectors and leaves the rest to itself with shorter ones, so the rest has the same bits.
#include <cmath>

#include "convert.h"
#include "products.h"
#include "random.h"
#include "simd.h"

namespace {

// Columns whose scales stay in the cache while rows pass by. Shorter runs of a row would not be fetched in time.
constexpr int64_t BLOCK = 16384;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

const void* advanced(const void* x, int32_t dtype, int64_t elements) {
    return static_cast<const char*>(x) + elements * itemsize(dtype);
}

template <class V, Dtype dtype>
ALWAYS_INLINE typename V::F elements_at(const void* x, int64_t i) {
    if constexpr (dtype == FLOAT32) return V::load(static_cast<const float*>(x) + i);
    auto bits = V::load_u16(static_cast<const uint16_t*>(x) + i);
    if constexpr (dtype == BFLOAT16) return from_bf16<V>(bits);
    else return from_fp16<V>(bits);
}

template <class V>
ALWAYS_INLINE typename V::I magnitude_bits(typename V::F x) {
    return V::bit_and(V::float_to_bits(x), V::set_int(0x7fffffff));
}

// ---- maxima: as integers, NaN is above Inf and Inf above every number ----------------------------------------------

template <class V, Dtype dtype, bool scaled>
uint32_t absmax_of_row(const void* x, const float* factors, int64_t i, int64_t n) {
    auto most = V::set_int(0);
    for (; i + V::width <= n; i += V::width) {
        auto y = elements_at<V, dtype>(x, i);
        if constexpr (scaled) y = V::mul(y, V::load(factors + i));
        most = V::max_int(most, magnitude_bits<V>(y));
    }
    uint32_t result = V::reduce_max(most);
    if constexpr (V::width > 1)
        if (i < n) result = Scalar::max_int(result, absmax_of_row<typename V::Rest, dtype, scaled>(x, factors, i, n));
    return result;
}

using AbsmaxOfRow = uint32_t(const void* x, const float* factors, int64_t i, int64_t n);

AbsmaxOfRow* const ABSMAX_OF_ROW[3][2] = {
    {absmax_of_row<Widest, FLOAT32, false>, absmax_of_row<Widest, FLOAT32, true>},
    {absmax_of_row<Widest, BFLOAT16, false>, absmax_of_row<Widest, BFLOAT16, true>},
    {absmax_of_row<Widest, FLOAT16, false>, absmax_of_row<Widest, FLOAT16, true>},
};

// Of `num_rows` rows, times `factors`.
template <class V, Dtype dtype, int num_rows>
void raise_maxima(const void* const* x, const float* factors, uint32_t* maxima, int64_t i, int64_t n) {
    for (; i + V::width <= n; i += V::width) {
        auto most = V::load_int(maxima + i);
        for (int row = 0; row < num_rows; ++row)
            most = V::max_int(most, magnitude_bits<V>(V::mul(elements_at<V, dtype>(x[row], i), V::set(factors[row]))));
        V::store_int(maxima + i, most);
    }
    if constexpr (V::width > 1)
        if (i < n) raise_maxima<typename V::Rest, dtype, num_rows>(x, factors, maxima, i, n);
}

using RaiseMaxima = void(const void* const* x, const float* factors, uint32_t* maxima, int64_t i, int64_t n);

// More rows at once would share sets of L1 where their distance is a power of two.
constexpr int ROWS_AT_ONCE = 4;

RaiseMaxima* const RAISE_MAXIMA[3][2] = {
    {raise_maxima<Widest, FLOAT32, 1>, raise_maxima<Widest, FLOAT32, ROWS_AT_ONCE>},
    {raise_maxima<Widest, BFLOAT16, 1>, raise_maxima<Widest, BFLOAT16, ROWS_AT_ONCE>},
    {raise_maxima<Widest, FLOAT16, 1>, raise_maxima<Widest, FLOAT16, ROWS_AT_ONCE>},
};

// ---- codes ---------------------------------------------------------------------------------------------------------

// A run of a row. By row: one scale, a factor each. By column: one factor, a scale each.
struct Run {
    const void* x;
    const float* factors;
    const float* scales;
    const float* inverses;
    float factor, scale, inverse;
    float levels;
    float least, most;  // codes
    int8_t* codes;
    uint32_t key[2];
    uint64_t index;  // of the first element
};

enum Kind { BY_ROW, BY_ROW_SCALED, BY_COLUMN };

template <class V, Dtype dtype, Kind kind, bool stochastic>
void encode(const Run& run, uint32_t high_word, int64_t i, int64_t n) {
    auto scale = V::set(run.scale), inverse = V::set(run.inverse), zero = V::set(0.0f);
    auto most = V::set(run.most), least = V::set(run.least);
    // x times the inverse is less than 2^-15 off x / scale, which is hardly more than 127.5; if they are rounded to
    // different codes, then the product is as near to a tie. That an inverse is Inf shows in the same way.
    auto is_safe = V::set(0.5f - 0x1p-14f);
    Uniform<V> uniform(run.key, high_word);
    for (; i + V::width <= n; i += V::width) {
        auto y = elements_at<V, dtype>(run.x, i);
        if constexpr (kind == BY_COLUMN) y = V::mul(y, V::set(run.factor));
        if constexpr (kind == BY_ROW_SCALED) y = V::mul(y, V::load(run.factors + i));
        auto exact_steps = [&]() __attribute__((always_inline)) {
            if constexpr (kind != BY_COLUMN) return V::div(y, scale);
            auto scales = V::load(run.scales + i);
            return V::select(V::greater(scales, zero), V::div(y, scales), zero);
        };
        // Only the full range needs the clamp, for steps of 127.5 and a bit: too near to a tie for any other way.
        auto exact_code = [&]() __attribute__((always_inline)) {
            return V::to_nearest_int(V::min(exact_steps(), most));
        };
        typename V::I code;
        if constexpr (stochastic) {
            auto steps = exact_steps(), floor = V::floor(steps);
            auto draw = V::mul(V::to_float(uniform(run.index + i)), V::set(0x1p-24f));
            auto up = V::greater(V::sub(steps, floor), draw);
            code = V::to_int(V::max(V::min(V::add_if(up, floor, V::set(1.0f)), most), least));
        } else if constexpr (V::width == 1) {
            code = exact_code();
        } else {
            auto steps = V::mul(y, kind == BY_COLUMN ? V::load(run.inverses + i) : inverse);
            code = V::to_nearest_int(steps);
            auto is_near = V::greater(is_safe, V::abs(V::sub(steps, V::to_float(code))));
            if (__builtin_expect(!V::all(is_near), 0)) code = exact_code();
        }
        V::store_u8(reinterpret_cast<uint8_t*>(run.codes) + i, code);
    }
    if constexpr (V::width > 1)
        if (i < n) encode<typename V::Rest, dtype, kind, stochastic>(run, high_word, i, n);
}

using Encode = void(const Run& run, uint32_t high_word, int64_t i, int64_t n);

template <Dtype dtype, bool stochastic>
constexpr Encode* ENCODE_KINDS[3] = {
    encode<Widest, dtype, BY_ROW, stochastic>,
    encode<Widest, dtype, BY_ROW_SCALED, stochastic>,
    encode<Widest, dtype, BY_COLUMN, stochastic>,
};

Encode* const* const ENCODE[3][2] = {
    {ENCODE_KINDS<FLOAT32, false>, ENCODE_KINDS<FLOAT32, true>},
    {ENCODE_KINDS<BFLOAT16, false>, ENCODE_KINDS<BFLOAT16, true>},
    {ENCODE_KINDS<FLOAT16, false>, ENCODE_KINDS<FLOAT16, true>},
};

void encode_run(const Run& run, int32_t dtype, Kind kind, bool stochastic, int64_t n) {
    Encode* const encode = ENCODE[dtype][stochastic][kind];
    for (int64_t begin = 0, end; begin < n; begin = end) {
        // Up to where the high word of the elements' numbers changes.
        uint64_t index = run.index + begin;
        end = smaller(n, begin + static_cast<int64_t>((uint64_t{1} << 32) - (index & 0xffffffff)));
        encode(run, static_cast<uint32_t>(index >> 32), begin, end);
    }
}

Run run_of(const QuantizeCall& c, const Side& side, int64_t row, int64_t column) {
    Run run{};
    int64_t index = row * c.num_columns + column;
    run.x = advanced(c.x, c.dtype, row * c.row_stride + column);
    run.codes = side.codes + index;
    run.index = static_cast<uint64_t>(index);
    run.levels = c.levels;
    run.most = std::floor(c.levels);
    run.least = std::floor(-c.levels);
    for (int half = 0; half < 2; ++half) run.key[half] = side.key[half];
    return run;
}

// ---- stages --------------------------------------------------------------------------------------------------------

uint32_t absmax_of_row(const QuantizeCall& c, int64_t row) {
    const float* factors = c.rows.factor;
    auto* of_row = ABSMAX_OF_ROW[c.dtype][factors != nullptr];
    return of_row(advanced(c.x, c.dtype, row * c.row_stride), factors, 0, c.num_columns);
}

uint32_t absmax(const QuantizeCall& c, int64_t begin, int64_t end) {
    uint32_t most = 0;
    for (int64_t row = begin; row < end; ++row) most = Scalar::max_int(most, absmax_of_row(c, row));
    return most;
}

void column_maxima(const QuantizeCall& c, int64_t begin, int64_t end, uint32_t* maxima) {
    for (int64_t row = begin, count; row < end; row += count) {
        bool is_full = row + ROWS_AT_ONCE <= end;
        count = is_full ? ROWS_AT_ONCE : 1;
        const void* x[ROWS_AT_ONCE];
        float factors[ROWS_AT_ONCE];
        for (int64_t k = 0; k < count; ++k) {
            x[k] = advanced(c.x, c.dtype, (row + k) * c.row_stride);
            factors[k] = c.columns.factor ? c.columns.factor[row + k] : 1.0f;
        }
        RAISE_MAXIMA[c.dtype][is_full](x, factors, maxima, 0, c.num_columns);
    }
}

void quantize_rows(const QuantizeCall& c, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        Run run = run_of(c, c.rows, row, 0);
        if (c.rows.one_scale)
            run.scale = *c.rows.scale;
        else
            run.scale = c.rows.scale[row] = scale_of(absmax_of_row(c, row), run.levels);
        if (run.scale > 0.0f) {
            run.inverse = 1.0f / run.scale;
            run.factors = c.rows.factor;
            encode_run(run, c.dtype, run.factors ? BY_ROW_SCALED : BY_ROW, c.rows.stochastic, c.num_columns);
        } else {
            std::memset(run.codes, 0, c.num_columns);
        }
    }
}

void quantize_columns(const QuantizeCall& c, int64_t begin, int64_t end, const float* inverses) {
    for (int64_t column = 0; column < c.num_columns; column += BLOCK)
        for (int64_t row = begin; row < end; ++row) {
            Run run = run_of(c, c.columns, row, column);
            run.factor = c.columns.factor ? c.columns.factor[row] : 1.0f;
            run.scales = c.columns.scale + column;
            run.inverses = inverses + column;
            encode_run(run, c.dtype, BY_COLUMN, c.columns.stochastic, smaller(BLOCK, c.num_columns - column));
        }
}

template <class V, Dtype dtype>
ALWAYS_INLINE void put(void* to, int64_t i, typename V::F y) {
    if constexpr (dtype == FLOAT32) V::store(static_cast<float*>(to) + i, y);
    else if constexpr (dtype == BFLOAT16) V::store_u16(static_cast<uint16_t*>(to) + i, to_bf16<V>(y));
    else V::store_u16(static_cast<uint16_t*>(to) + i, to_fp16<V>(y));
}

// int32; fp32 of whole numbers; fp32 and int32, to be added.
enum Products { INTEGERS, WHOLE, PARTS };

struct Row {
    const void* products;
    const int32_t* others;
    float row_scale;
    const float* scale;
    const float* bias;
    void* to;
};

template <class V, Products kind>
ALWAYS_INLINE typename V::F products_at(const Row& row, int64_t i) {
    if constexpr (kind == INTEGERS) {
        return V::to_float(V::load_int(static_cast<const uint32_t*>(row.products) + i));
    } else {
        auto whole = V::load(static_cast<const float*>(row.products) + i);
        if constexpr (kind == WHOLE) return V::add(whole, V::set(0.0f));  // an integer 0 has no sign
        auto others = V::load_int(reinterpret_cast<const uint32_t*>(row.others) + i);
        return V::to_float(V::add(V::to_int(whole), others));
    }
}

template <class V, Dtype dtype, Products kind>
void scale_row(const Row& row, int64_t i, int64_t n) {
    auto of_row = V::set(row.row_scale);
    const float *scale = row.scale, *bias = row.bias;
    void* to = row.to;
    for (; i + V::width <= n; i += V::width) {
        auto y = V::mul(products_at<V, kind>(row, i), of_row);
        y = V::add(V::mul(y, V::load(scale + i)), V::load(bias + i));
        put<V, dtype>(to, i, y);
    }
    if constexpr (V::width > 1)
        if (i < n) scale_row<typename V::Rest, dtype, kind>(row, i, n);
}

using ScaleRow = void(const Row& row, int64_t i, int64_t n);

template <Dtype dtype>
constexpr ScaleRow* SCALE_KINDS[3] = {
    scale_row<Widest, dtype, INTEGERS>, scale_row<Widest, dtype, WHOLE>, scale_row<Widest, dtype, PARTS>};

ScaleRow* const* const SCALE_ROW[3] = {SCALE_KINDS<FLOAT32>, SCALE_KINDS<BFLOAT16>, SCALE_KINDS<FLOAT16>};

void fill(float* to, float value, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = value;
}

void epilogue(const EpilogueCall& c, int64_t begin, int64_t end) {
    alignas(64) float scale_buffer[BLOCK], bias_buffer[BLOCK];
    Products kind = !c.is_fp32 ? INTEGERS : c.others ? PARTS : WHOLE;
    for (int64_t column = 0; column < c.num_columns; column += BLOCK) {
        int64_t n = smaller(BLOCK, c.num_columns - column);
        const float *scale = scale_buffer, *bias = bias_buffer;
        if (c.column_scale && !c.one_column_scale) scale = c.column_scale + column;
        else fill(scale_buffer, c.column_scale ? *c.column_scale : 1.0f, n);
        // Adding -0.0 changes nothing, the sign of zero included.
        if (!c.bias) fill(bias_buffer, -0.0f, n);
        else load(static_cast<Dtype>(c.bias_dtype), advanced(c.bias, c.bias_dtype, column), bias_buffer, n);
        for (int64_t row = begin; row < end; ++row) {
            int64_t index = row * c.num_columns + column;
            // int32 and fp32 are of one size.
            Row given{
                static_cast<const int32_t*>(c.products) + row * c.row_stride + column,
                c.others ? c.others + index : nullptr,
                c.row_scale ? c.row_scale[c.one_row_scale ? 0 : row] : 1.0f,
                scale,
                bias,
                static_cast<char*>(c.result) + index * itemsize(c.dtype),
            };
            SCALE_ROW[c.dtype][kind](given, 0, n);
        }
    }
}

// The largest numbers of fp32, bf16 and fp16.
constexpr float LARGEST[3] = {0x1.fffffep127f, 0x1.fep127f, 65504.0f};

// `scales` has one a column; null: `scale` for all.
template <class V, Dtype dtype, bool many>
void values_of_row(const int8_t* codes, float scale, const float* scales, void* to, int64_t i, int64_t n) {
    auto largest = V::set(LARGEST[dtype]), least = V::set(-LARGEST[dtype]), half = V::set(0.5f);
    auto one_scale = V::set(scale);
    for (; i + V::width <= n; i += V::width) {
        auto steps = V::to_float(V::load_s8(reinterpret_cast<const uint8_t*>(codes) + i));
        auto by = one_scale;
        if constexpr (many) by = V::load(scales + i);
        auto y = V::mul(steps, by);
        // A value that rounding to a code carried past the largest number by no more than a scale comes back to it.
        auto nearer = V::mul(V::sub(V::mul(V::abs(steps), V::set(1.0f - 0x1p-20f)), V::set(1.0f)), V::mul(by, half));
        y = V::select(V::at_least(V::set(LARGEST[dtype] * 0.5f), nearer), V::max(V::min(y, largest), least), y);
        put<V, dtype>(to, i, y);
    }
    if constexpr (V::width > 1)
        if (i < n) values_of_row<typename V::Rest, dtype, many>(codes, scale, scales, to, i, n);
}

using ValuesOfRow = void(const int8_t* codes, float scale, const float* scales, void* to, int64_t i, int64_t n);

ValuesOfRow* const VALUES_OF_ROW[3][2] = {
    {values_of_row<Widest, FLOAT32, false>, values_of_row<Widest, FLOAT32, true>},
    {values_of_row<Widest, BFLOAT16, false>, values_of_row<Widest, BFLOAT16, true>},
    {values_of_row<Widest, FLOAT16, false>, values_of_row<Widest, FLOAT16, true>},
};

void dequantize(const DequantizeCall& c, int64_t begin, int64_t end) {
    const float* all = c.row_scale ? c.row_scale : c.column_scale;
    const float* scales = c.row_scale || c.one_scale ? nullptr : c.column_scale;
    for (int64_t row = begin; row < end; ++row) {
        auto* to = static_cast<char*>(c.result) + row * c.num_columns * itemsize(c.dtype);
        float scale = c.one_scale || scales ? *all : all[row];
        VALUES_OF_ROW[c.dtype][scales != nullptr](c.codes + row * c.row_stride, scale, scales, to, 0, c.num_columns);
    }
}

const ProductsStages STAGES = {absmax, column_maxima, quantize_rows, quantize_columns, epilogue, dequantize};

}  // namespace

extern "C" const ProductsStages* DS_QUANT_JOIN(ds_quant_products_stages_, DS_QUANT_ISA)() { return &STAGES; }
