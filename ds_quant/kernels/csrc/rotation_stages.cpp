// The loops over rows that are rotated. Compiled once for each instruction set, with DS_QUANT_ISA its name.
#include "rotation.h"

#include "hadamard.h"

namespace {

void rotate_rows(const RotateCall& call, int64_t begin, int64_t end) {
    int64_t size = call.block_size, covered = call.features / size * size;
    float factor = factor_of(size);
    for (int64_t row = begin; row < end; ++row) {
        const float* from = call.x + row * call.features;
        float* to = call.result + row * call.features;
        for (int64_t at = 0; at < covered; at += size) {
            butterflies<Widest>(from + at, call.flips + at, to + at, size);
            finish<Widest>(to + at, factor, nullptr, size);
        }
        if (covered < call.features)
            transform(from + covered, call.flips + covered, to + covered, nullptr, call.features - covered);
    }
}

const RotationStages STAGES = {rotate_rows};

}  // namespace

extern "C" const RotationStages* DS_QUANT_JOIN(ds_quant_rotation_stages_, DS_QUANT_ISA)() { return &STAGES; }
