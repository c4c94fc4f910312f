// Masters to fp32 and back. Called by masters/cpu.py through ctypes.
#include "masters.h"

#include <algorithm>

#include "threads.h"

#pragma GCC visibility push(default)
extern "C" {

// Size of the structure, for masters/cpu.py to compare with its own.
int64_t ds_quant_masters_call_size() { return sizeof(MastersCall); }

// operation: 0 join, 1 split.
void ds_quant_masters(const MastersCall* call, int operation, int isa, Parallel parallel, int num_threads) {
    const MastersStages& stages = *ds_quant_masters_stages(isa);
    MastersStage* const stage = operation == 0 ? stages.join : stages.split;
    Threads{parallel, num_threads}.for_each((call->numel + CHUNK - 1) / CHUNK, [&](int64_t i) {
        int64_t begin = i * CHUNK, n = std::min(call->numel - begin, CHUNK);
        stage(MastersRun{
            call->values + begin, call->weight + begin, call->low_bits ? call->low_bits + begin : nullptr, n,
            {call->key[0], call->key[1]}, static_cast<uint32_t>(begin), call->stochastic != 0});
    });
}
}
#pragma GCC visibility pop
