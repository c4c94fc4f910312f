// The loops over masters. Compiled once for each instruction set, with DS_QUANT_ISA its name.
#include "masters.h"
#include "masters_loops.h"

namespace {

const MastersStages STAGES = {join_masters, split_masters};

}  // namespace

extern "C" const MastersStages* DS_QUANT_JOIN(ds_quant_masters_stages_, DS_QUANT_ISA)() { return &STAGES; }
