// Steps of Lion, SGD and AdEMAMix: what the driver (elementwise.cpp), the stages (elementwise_stages.cpp) and Python
// (elementwise/cpu.py) agree on.
#pragma once

#include "adamw.h"

constexpr int MAX_STATES = 3, MAX_SCALARS = 12;

struct ElementwiseEntry {
    void* param;
    const void* grad;
    void* codes[MAX_STATES];  // fp32 states themselves where bits is 32
    float* scale[MAX_STATES];
    int64_t numel;
    int64_t block_size[MAX_STATES];
    uint64_t stream;  // of the first state; the next have the next
    float scalars[MAX_SCALARS];
    uint32_t key[2 * MAX_STATES];
    int32_t formats[MAX_STATES];  // indices into the formats of the call
    int32_t rule;                 // index into the rules
    int32_t param_dtype, grad_dtype;
    int32_t stochastic;  // bit i: state i
};

// Steps n elements in place, of which `states` are fp32 values.
using RuleStage = void(float* param, const float* grad, float* const* states, int64_t n, const float* scalars);

struct Rule {
    RuleStage* step;
    int num_states;
};

// Lion, SGD, AdEMAMix, as elementwise/cpu.py numbers them.
DS_QUANT_BY_ISA(Rule, ds_quant_rules)
