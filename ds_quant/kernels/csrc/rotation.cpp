// Rows rotated block by block, one pass over memory. Called by simulated/cpu_rotation.py through ctypes.
#include "rotation.h"

#include "threads.h"

#pragma GCC visibility push(default)
extern "C" {

// Size of the structure, for cpu_rotation.py to compare with its own.
int64_t ds_quant_rotate_call_size() { return sizeof(RotateCall); }

void ds_quant_rotate_rows(const RotateCall* call, int isa, Parallel parallel, int num_threads) {
    const RotationStages& stages = *ds_quant_rotation_stages(isa);
    RowChunks chunks(call->num_rows, call->features, CHUNK);
    chunks.for_each(Threads{parallel, num_threads}, [&](int64_t begin, int64_t end) {
        stages.rotate(*call, begin, end);
    });
}
}
#pragma GCC visibility pop
