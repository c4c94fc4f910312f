// Masters of 24 and 16 bits: what drivers, stages and Python (masters/cpu.py) agree on.
#pragma once

#include <cstdint>

#include "common.h"

struct MastersCall {
    float* values;
    uint16_t* weight;   // bf16
    int8_t* low_bits;   // null for masters of 16 bits
    int64_t numel;
    uint32_t key[2];    // of stochastic rounding
    int32_t stochastic;
};

// Masters that follow each other, of any number.
struct MastersRun {
    float* values;
    uint16_t* weight;
    int8_t* low_bits;
    int64_t n;
    uint32_t key[2];
    uint32_t index;  // of the first one, by which it draws
    bool stochastic;
};

using MastersStage = void(const MastersRun&);

// Compiled once for each instruction set.
struct MastersStages {
    MastersStage *join, *split;
};

DS_QUANT_BY_ISA(MastersStages, ds_quant_masters_stages)
