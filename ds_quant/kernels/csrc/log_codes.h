// Codes of the map `log`, between the two scales of their block: numerics/log_codes.py has the definition.
#pragma once

#include "encode.h"
#include "simd.h"

namespace {

constexpr int LOG_SQUARINGS = 5, LOG_HIGHEST = 15;
constexpr float LOG_COUNTS[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
constexpr int64_t LOG_BLOCKS = 64;  // at once; their roots follow each other slowly

// low / high of blocks and its 32nd root; 0 where high is 0 or NaN.
struct LogRoots {
    alignas(64) float quotients[LOG_BLOCKS], roots[LOG_BLOCKS];

    ALWAYS_INLINE void find(const float* ends, int64_t num_blocks) {
        using V = Widest;
        alignas(64) float highs[LOG_BLOCKS], lows[LOG_BLOCKS];
        for (int64_t i = 0; i < num_blocks; ++i) highs[i] = ends[2 * i], lows[i] = ends[2 * i + 1];
        for (int64_t i = num_blocks; i % V::width; ++i) highs[i] = lows[i] = 1.0f;
        auto zero = V::set(0.0f);
        for (int64_t i = 0; i < num_blocks; i += V::width) {
            auto high = V::load(highs + i);
            auto inverse = V::div(V::set(1.0f), high);
            auto quotient = V::select(V::greater(high, zero), V::mul(V::load(lows + i), inverse), zero);
            V::store(quotients + i, quotient);
            for (int k = 0; k < LOG_SQUARINGS; ++k) quotient = V::sqrt(quotient);
            V::store(roots + i, quotient);
        }
    }
};

// value(c) for the codes `counts` of a block, in units of its high end.
template <class V>
ALWAYS_INLINE typename V::F log_value(float quotient, float root, typename V::F counts) {
    auto gap = V::set((1.0f - root) * static_cast<float>(1.0 / LOG_HIGHEST));
    auto value = V::add(V::set(root), V::mul(counts, gap));
    for (int k = 0; k < LOG_SQUARINGS; ++k) value = V::mul(value, value);
    value = V::select(V::greater(V::set(0.5f), counts), V::set(quotient), value);
    return V::select(V::greater(counts, V::set(LOG_HIGHEST - 0.5f)), V::set(1.0f), value);
}

// Values of the codes of up to LOG_BLOCKS blocks, which `prepare` is given first.
template <class B>
struct BatchReader<LogHalves, B> {
    using V = typename B::Part;
    const uint8_t* codes;
    int shift;
    const float *first_ends, *ends = nullptr;
    LogRoots roots;
    alignas(64) float table[16];
    typename V::Table16 values;  // of plain x86-64 it points to the table

    BatchReader() : values(LOG_COUNTS) {}
    explicit BatchReader(const MomentFormat&) : BatchReader() {}

    void prepare(const float* scales, int64_t num_blocks) {
        first_ends = scales;
        roots.find(scales, num_blocks);
    }
    ALWAYS_INLINE void start(const uint8_t* first, int half, const float* scales) {
        codes = first, shift = half;
        if (scales == ends) return;  // the other half of the block
        ends = scales;
        int64_t block = (ends - first_ends) / 2;
        for (int i = 0; i < 16; i += V::width) {
            auto counts = V::load(LOG_COUNTS + i);
            auto value = V::mul(log_value<V>(roots.quotients[block], roots.roots[block], counts), V::set(ends[0]));
            V::store(table + i, V::select(V::greater(V::set(0.5f), counts), V::set(ends[1]), value));
        }
        values = typename V::Table16(table);
    }
    ALWAYS_INLINE void operator()(int64_t i, typename V::F* to) const {
        for (int k = 0; k < B::parts; ++k) to[k] = values[V::right(V::load_u8(codes + i + k * V::width), shift)];
    }
};

template <class V>
void decode_log_as(const float* ends, const uint8_t* codes, int shift, float* to, int64_t n) {
    BatchReader<LogHalves, Batch<V, 1>> read;
    read.prepare(ends, 1);
    read.start(codes, shift, ends);
    int64_t i = 0;
    for (; i + V::width <= n; i += V::width) {
        typename V::F value[1];
        read(i, value);
        V::store(to + i, value[0]);
    }
    if constexpr (V::width > 1)
        if (i < n) decode_log_as<typename V::Rest>(ends, codes + i, shift, to + i, n - i);
}

void decode_log(const uint8_t* codes, int shift, const float* ends, float* to, int64_t n) {
    decode_log_as<Widest>(ends, codes, shift, to, n);
}

// The two scales of a block of numbers from 0 on by the bits of their largest, a normal number.
template <class V>
void fit_log(const float* x, int64_t n, uint32_t absmax, float* ends) {
    // As integers, floats from +0 on are ordered as they are; turned over, the least is the largest.
    auto ones = V::set_int(0xffffffff);
    typename V::I most[2] = {V::set_int(~absmax), V::set_int(~absmax)};
    int64_t i = 0;
    for (; i + 2 * V::width <= n; i += 2 * V::width)
        for (int k = 0; k < 2; ++k)
            most[k] = V::max_int(most[k], V::sub(ones, V::float_to_bits(V::load(x + i + k * V::width))));
    uint32_t found = V::reduce_max(V::max_int(most[0], most[1]));
    for (; i < n; ++i) found = Scalar::max_int(found, ~Scalar::float_to_bits(x[i]));
    float high = Scalar::bits_to_float(absmax), least = Scalar::bits_to_float(~found);
    ends[0] = high;
    ends[1] = Scalar::max(Scalar::min(least, high * 0.5f), high * 0x1p-30f);
}

// What codes of a block are found with: its values, the next ones, and the values with Inf in place of the last.
struct LogBlock {
    alignas(64) float values[16], nexts[16], bounds[16], gaps[16];  // gaps in units of 2^16

    LogBlock(float quotient, float root) {
        using V = Widest;
        for (int i = 0; i < 16; i += V::width) {
            auto counts = V::load(LOG_COUNTS + i);
            auto value = log_value<V>(quotient, root, counts);
            auto next = log_value<V>(quotient, root, V::add(counts, V::set(1.0f)));
            auto is_last = V::greater(counts, V::set(LOG_HIGHEST - 0.5f));
            V::store(values + i, value);
            V::store(nexts + i, next);
            V::store(bounds + i, V::select(is_last, V::set(__builtin_inff()), value));
            V::store(gaps + i, V::mul(V::sub(next, value), V::set(0x1p-16f)));
        }
    }
};

template <bool stochastic>
struct LogCodes {
    static constexpr bool is_stochastic = stochastic;

    template <class V>
    struct Encoder {
        typename V::Table16 bounds, lows, nexts_or_gaps;

        explicit Encoder(const LogBlock& block)
            : bounds(block.bounds), lows(block.values), nexts_or_gaps(stochastic ? block.gaps : block.nexts) {}

        ALWAYS_INLINE typename V::I operator()(typename V::F x, typename V::I draw) const {
            // The last bound that x has reached, by halving; the first counts as reached.
            auto code = V::set_int(0);
#pragma GCC unroll 4
            for (uint32_t stride = 8; stride; stride /= 2) {
                auto middle = V::add(code, V::set_int(stride));
                code = V::select(V::at_least(x, bounds[middle]), middle, code);
            }
            auto rest = V::sub(x, lows[code]), other = nexts_or_gaps[code];
            auto up = V::greater(rest, stochastic ? V::mul(V::to_float(draw), other) : V::sub(other, x));
            return V::add_if(up, code, V::set_int(1));
        }
    };
};

// Codes of a block with these scales, one to a byte. draws null: to nearest.
void encode_log(const float* x, const float* ends, const Draws* draws, uint8_t* codes, int64_t n) {
    LogRoots roots;
    roots.find(ends, 1);
    LogBlock block(roots.quotients[0], roots.roots[0]);
    float inverse = 1.0f / ends[0];
    if (!draws) return encode_as<LogCodes<false>>(block, Source<Widest32>{x, inverse, Draws{}}, codes, n);
    for_each_stretch(*draws, n, [&](const Draws& part, int64_t begin, int64_t length, bool is_aligned) {
        if (is_aligned)
            encode_as<LogCodes<true>>(block, Source<Widest32>{x + begin, inverse, part}, codes + begin, length);
        else
            encode_as<LogCodes<true>>(
                block, Source<Batch<Scalar, 1>>{x + begin, inverse, part}, codes + begin, length);
    });
}

}  // namespace
