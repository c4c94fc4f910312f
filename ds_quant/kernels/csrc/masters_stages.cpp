// numerics/master.py in plain loops, which compilers turn into vectors: all of it is 32-bit integers.
#include "masters.h"

#include "random.h"

namespace {

inline uint32_t bits_of(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}

void join(const MastersCall& c, int64_t begin, int64_t end) {
    const uint16_t* __restrict weight = c.weight;
    const int8_t* __restrict low_bits = c.low_bits;
    auto* __restrict values = reinterpret_cast<uint32_t*>(c.values);
    if (low_bits)
        for (int64_t i = begin; i < end; ++i)
            values[i] = ((static_cast<uint32_t>(weight[i]) << 8) + static_cast<uint32_t>(low_bits[i])) << 8;
    else
        for (int64_t i = begin; i < end; ++i) values[i] = static_cast<uint32_t>(weight[i]) << 16;
}

// 32 random bits of an element whose index is below 2^32.
inline uint32_t random_bits(const uint32_t key[2], uint32_t index) {
    return mix<Scalar>(mix<Scalar>(index ^ key[0]) + key[1]);
}

// The bits with one NaN for all, and what is added to them before those below are cut off.
inline uint32_t rounded(uint32_t bits, uint32_t noise) {
    uint32_t magnitude = bits & 0x7fffffff;
    uint32_t clean = magnitude > 0x7f800000 ? 0x7fc00000 : bits;
    return magnitude < 0x7f800000 ? clean + noise : clean;
}

template <bool STOCHASTIC>
void split_24(const MastersCall& c, int64_t begin, int64_t end) {
    const uint32_t key[2] = {c.key[0], c.key[1]};
    const float* __restrict values = c.values;
    uint16_t* __restrict weight = c.weight;
    int8_t* __restrict low_bits = c.low_bits;
    for (int64_t i = begin; i < end; ++i) {
        uint32_t bits = bits_of(values[i]);
        uint32_t noise = STOCHASTIC ? random_bits(key, static_cast<uint32_t>(i)) >> 24 : 128;
        auto top = static_cast<int32_t>(rounded(bits, noise)) >> 8;
        // What was finite stays so.
        bool overflows = (bits & 0x7fffffff) < 0x7f800000 && (top & 0x7fffff) >= 0x7f8000;
        top -= overflows;
        int32_t high = (top + 128) >> 8;
        weight[i] = static_cast<uint16_t>(high);
        low_bits[i] = static_cast<int8_t>(top - (high << 8));
    }
}

template <bool STOCHASTIC>
void split_16(const MastersCall& c, int64_t begin, int64_t end) {
    const uint32_t key[2] = {c.key[0], c.key[1]};
    const float* __restrict values = c.values;
    uint16_t* __restrict weight = c.weight;
    for (int64_t i = begin; i < end; ++i) {
        uint32_t bits = bits_of(values[i]);
        uint32_t to_even = 0x7fff + (bits >> 16 & 1);
        uint32_t noise = STOCHASTIC ? random_bits(key, static_cast<uint32_t>(i)) >> 16 : to_even;
        weight[i] = static_cast<uint16_t>(rounded(bits, noise) >> 16);
    }
}

void split(const MastersCall& c, int64_t begin, int64_t end) {
    if (c.low_bits)
        (c.stochastic ? split_24<true> : split_24<false>)(c, begin, end);
    else
        (c.stochastic ? split_16<true> : split_16<false>)(c, begin, end);
}

const MastersStages STAGES = {join, split};

}  // namespace

extern "C" const MastersStages* DS_QUANT_JOIN(ds_quant_masters_stages_, DS_QUANT_ISA)() { return &STAGES; }
