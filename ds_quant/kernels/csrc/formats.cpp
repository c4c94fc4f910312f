// Operands in floating point of few bits, and in integers whose scales take 8 bits, bit for bit as numerics/format.py
// has them. Called by simulated/cpu_formats.py through ctypes.
#include "formats.h"
#include "threads.h"

namespace {

// Calls stage(call, begin, end) for rows of about CHUNK elements.
template <class Call>
void by_rows(void (*stage)(const Call&, int64_t, int64_t), const Call& call, Parallel parallel, int num_threads) {
    RowChunks(call.num_rows, call.num_columns, CHUNK)
        .for_each(Threads{parallel, num_threads}, [&](int64_t begin, int64_t end) { stage(call, begin, end); });
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Sizes of the structures, for cpu_formats.py to compare with its own.
int64_t ds_quant_formats_block_maxima_call_size() { return sizeof(BlockMaximaCall); }
int64_t ds_quant_formats_encode_call_size() { return sizeof(EncodeCall); }
int64_t ds_quant_formats_decode_call_size() { return sizeof(DecodeCall); }

void ds_quant_formats_block_maxima(const BlockMaximaCall* call, int isa, Parallel parallel, int num_threads) {
    by_rows(ds_quant_formats_stages(isa)->block_maxima, *call, parallel, num_threads);
}

void ds_quant_formats_encode(const EncodeCall* call, int isa, Parallel parallel, int num_threads) {
    by_rows(ds_quant_formats_stages(isa)->encode, *call, parallel, num_threads);
}

void ds_quant_formats_decode(const DecodeCall* call, int isa, Parallel parallel, int num_threads) {
    by_rows(ds_quant_formats_stages(isa)->decode, *call, parallel, num_threads);
}
}
#pragma GCC visibility pop
