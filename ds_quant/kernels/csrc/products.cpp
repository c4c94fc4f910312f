// Operands and results of int8 products, bit for bit as numerics/products.py has them. Called by products_cpu.py
// through ctypes.
//
// A thread takes some rows at a time, which stay in its cache for all that is done with them. Rows need one pass over
// memory; columns need their maxima first and are read a second time.
#include <algorithm>
#include <new>
#include <vector>

#include "products.h"
#include "threads.h"

namespace {

void quantize(const QuantizeCall& call, const ProductsStages& stages, const Threads& threads) {
    RowChunks chunks(call.num_rows, call.num_columns, CHUNK);
    int64_t num_slots = std::min<int64_t>(threads.count, chunks.count), num_columns = call.num_columns;
    if (call.rows.one_scale) {
        std::vector<uint32_t> most(num_slots);
        chunks.for_each_in_slots(threads, num_slots, [&](int64_t slot, int64_t begin, int64_t end) {
            most[slot] = std::max(most[slot], stages.absmax(call, begin, end));
        });
        *call.rows.scale = scale_of(*std::max_element(most.begin(), most.end()), call.levels);
    }
    if (!call.columns.codes) {
        chunks.for_each(threads, [&](int64_t begin, int64_t end) { stages.quantize_rows(call, begin, end); });
        return;
    }
    std::vector<uint32_t> maxima(num_slots * num_columns);
    chunks.for_each_in_slots(threads, num_slots, [&](int64_t slot, int64_t begin, int64_t end) {
        stages.column_maxima(call, begin, end, &maxima[slot * num_columns]);
        if (call.rows.codes) stages.quantize_rows(call, begin, end);
    });
    for (int64_t slot = 1; slot < num_slots; ++slot)
        for (int64_t i = 0; i < num_columns; ++i) maxima[i] = std::max(maxima[i], maxima[slot * num_columns + i]);
    std::vector<float> inverses(num_columns);
    for (int64_t i = 0; i < num_columns; ++i) {
        float scale = call.columns.scale[i] = scale_of(maxima[i], call.levels);
        inverses[i] = scale > 0.0f ? 1.0f / scale : 0.0f;
    }
    chunks.for_each(threads, [&](int64_t begin, int64_t end) {
        stages.quantize_columns(call, begin, end, inverses.data());
    });
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Sizes of the structures, for products_cpu.py to compare with its own.
int64_t ds_quant_products_quantize_call_size() { return sizeof(QuantizeCall); }
int64_t ds_quant_products_epilogue_call_size() { return sizeof(EpilogueCall); }
int64_t ds_quant_products_dequantize_call_size() { return sizeof(DequantizeCall); }

// There must be elements. 0, or 1 where memory ran out.
int ds_quant_products_quantize(const QuantizeCall* call, int isa, Parallel parallel, int num_threads) try {
    quantize(*call, *ds_quant_products_stages(isa), Threads{parallel, num_threads});
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

void ds_quant_products_epilogue(const EpilogueCall* call, int isa, Parallel parallel, int num_threads) {
    const ProductsStages& stages = *ds_quant_products_stages(isa);
    RowChunks chunks(call->num_rows, call->num_columns, 4 * CHUNK);
    chunks.for_each(Threads{parallel, num_threads}, [&](int64_t begin, int64_t end) {
        stages.epilogue(*call, begin, end);
    });
}

void ds_quant_products_dequantize(const DequantizeCall* call, int isa, Parallel parallel, int num_threads) {
    const ProductsStages& stages = *ds_quant_products_stages(isa);
    RowChunks chunks(call->num_rows, call->num_columns, 4 * CHUNK);
    chunks.for_each(Threads{parallel, num_threads}, [&](int64_t begin, int64_t end) {
        stages.dequantize(*call, begin, end);
    });
}
}
#pragma GCC visibility pop
