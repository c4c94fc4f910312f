// One step of Lion, SGD or AdEMAMix of many parameters, bit for bit that of numerics/elementwise.py. Called by
// elementwise/cpu.py through ctypes, for states whose blocks fit into a tile together.
//
// Parameters go in units of whole blocks: decode, step, maxima, encode, all in buffers in L1, one pass over memory.
#include <algorithm>
#include <numeric>
#include <vector>

#include "elementwise.h"
#include "moment.h"
#include "threads.h"

// No floating point in here: between stages of AVX, instructions of plain x86-64 would wait for each other.
namespace {

Moment state_of(const ElementwiseEntry& e, const MomentFormat* formats, int which) {
    return {formats[e.formats[which]], e.codes[which], e.scale[which], e.numel, e.block_size[which], e.key + 2 * which,
            e.stream + which, static_cast<bool>(e.stochastic >> which & 1)};
}

// Elements of a unit, a multiple of the block sizes.
int64_t unit_of(const ElementwiseEntry& e, const Rule& rule) {
    int64_t least = 1;
    for (int i = 0; i < rule.num_states; ++i) least = std::lcm(least, e.block_size[i]);
    return std::max<int64_t>(1, UNIT / least) * least;
}

void step_unit(
    const Stages& stages, const Rule& rule, const ElementwiseEntry& e, const std::vector<Moment>& states, int64_t begin,
    int64_t n) {
    alignas(64) float buffers[MAX_STATES][TILE], param_buffer[TILE], grad_buffer[TILE];
    auto param_dtype = static_cast<Dtype>(e.param_dtype), grad_dtype = static_cast<Dtype>(e.grad_dtype);
    char* param_at = static_cast<char*>(e.param) + begin * itemsize(param_dtype);
    const char* grad_at = static_cast<const char*>(e.grad) + begin * itemsize(grad_dtype);
    auto* param = reinterpret_cast<float*>(param_at);
    auto* grad = reinterpret_cast<const float*>(grad_at);
    if (param_dtype != FLOAT32) stages.load(param_dtype, param_at, param = param_buffer, n);
    if (grad_dtype != FLOAT32) stages.load(grad_dtype, grad_at, grad_buffer, n), grad = grad_buffer;
    float* values[MAX_STATES] = {};
    for (int i = 0; i < rule.num_states; ++i) values[i] = states[i].load(stages, begin, n, buffers[i]);
    rule.step(param, grad, values, n, e.scalars);
    if (param_dtype != FLOAT32) stages.store(param_dtype, param, param_at, n);
    for (int i = 0; i < rule.num_states; ++i) states[i].store_blocks(stages, begin, n, values[i], nullptr);
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Size of the structure, for elementwise/cpu.py to compare with what it packs.
int64_t ds_quant_elementwise_entry_size() { return sizeof(ElementwiseEntry); }

void ds_quant_elementwise(
    const ElementwiseEntry* entries, int64_t num_entries, const MomentFormat* formats, int isa, Parallel parallel,
    int num_threads) {
    const Stages& stages = *ds_quant_stages(isa);
    const Rule* rules = ds_quant_rules(isa);
    auto numel = [&](int64_t k) { return entries[k].numel; };
    Chunks chunks(num_entries, numel, [&](int64_t k) { return unit_of(entries[k], rules[entries[k].rule]); });
    Threads{parallel, num_threads}.for_each(chunks.count(), [&](int64_t i) {
        chunks.for_each_range(i, numel, [&](int64_t k, int64_t begin, int64_t end) {
            const ElementwiseEntry& e = entries[k];
            const Rule& rule = rules[e.rule];
            std::vector<Moment> states;
            for (int which = 0; which < rule.num_states; ++which) states.push_back(state_of(e, formats, which));
            int64_t unit = unit_of(e, rule);
            for (int64_t element = begin; element < end; element += unit)
                step_unit(stages, rule, e, states, element, std::min(unit, end - element));
        });
    });
}
}
#pragma GCC visibility pop
