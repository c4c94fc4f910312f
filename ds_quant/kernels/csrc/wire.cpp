// Gradients to messages and back, bit for bit as numerics/wire.py has it. Called by wire_cpu.py through ctypes.
//
// One pass over memory: a thread takes a chunk of blocks at a time, of one large piece or of many small ones, and all
// that happens to a block happens to it in L1.
#include <atomic>
#include <cstring>
#include <new>
#include <vector>

#include "random.h"
#include "threads.h"
#include "wire.h"

namespace {

constexpr uint32_t SIGN_KEY[2] = {0x48616461, 0x6d617264};

const Signs& signs() {
    static const Signs made = [] {
        Signs s;
        for (int64_t i = 0; i < MAX_BLOCK; ++i) {
            uint32_t bits = mix<Scalar>(mix<Scalar>(static_cast<uint32_t>(i) ^ SIGN_KEY[0]) + SIGN_KEY[1]);
            s.bits[i] = bits & 0x80000000;
        }
        return s;
    }();
    return made;
}

// What the pieces' e4m3 scales are relative to, for which all of a piece is looked at before any of it is quantized.
class Largest {
public:
    explicit Largest(int64_t num_pieces) : bits(num_pieces), values(num_pieces) {}

    // Of floats that are not negative, the order is that of their bits.
    void add(int64_t piece, float magnitude) {
        uint32_t found, known = bits[piece].load(std::memory_order_relaxed);
        std::memcpy(&found, &magnitude, sizeof found);
        while (found > known && !bits[piece].compare_exchange_weak(known, found, std::memory_order_relaxed)) {
        }
    }

    const float* finish() {
        for (size_t piece = 0; piece < bits.size(); ++piece) {
            uint32_t found = bits[piece].load(std::memory_order_relaxed);
            std::memcpy(&values[piece], &found, sizeof found);
        }
        return values.data();
    }

private:
    std::vector<std::atomic<uint32_t>> bits;
    std::vector<float> values;
};

// Sums of a chunk, which are added in the order of the chunks: threads make no difference.
struct Errors {
    double sums[2];
};

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Size of the structure, for wire_cpu.py to compare with its own.
int64_t ds_quant_wire_call_size() { return sizeof(WireCall); }

// operation: 0 quantize, 1 reduce, 2 dequantize. 0, or 1 where memory ran out, with nothing written.
int ds_quant_wire(const WireCall* given, int operation, int isa, Parallel parallel, int num_threads) try {
    WireCall call = *given;
    const WireStages& stages = *(call.elements == INTEGERS ? ds_quant_wire_stages : ds_quant_wire_formats_stages)(isa);
    WireStage* const stage = operation == 0 ? stages.quantize : operation == 1 ? stages.reduce : stages.dequantize;
    auto numel = [&](int64_t piece) { return call.numel[piece]; };
    Chunks chunks(call.num_pieces, numel, [&](int64_t) { return call.block_size; });
    bool is_sent = operation == 0 || (operation == 1 && !call.result);
    bool has_largest = is_sent && call.scale_kind == E4M3_SCALE;
    Largest largest(has_largest ? call.num_pieces : 0);
    std::vector<Errors> errors(call.errors ? chunks.count() : 0);
    Threads threads{parallel, num_threads};
    if (has_largest) {
        WireLargest* const look = operation == 0 ? stages.largest_own : stages.largest_sum;
        threads.for_each(chunks.count(), [&](int64_t i) {
            chunks.for_each_range(i, numel, [&](int64_t piece, int64_t begin, int64_t end) {
                largest.add(piece, look(call, signs(), piece, begin, end));
            });
        });
        call.largest = largest.finish();
    }
    threads.for_each(chunks.count(), [&](int64_t i) {
        Errors sums{};
        chunks.for_each_range(i, numel, [&](int64_t piece, int64_t begin, int64_t end) {
            stage(call, signs(), piece, begin, end, call.errors ? sums.sums : nullptr);
        });
        if (call.errors) errors[i] = sums;
    });
    for (const Errors& e : errors)
        for (int k = 0; k < 2; ++k) call.errors[k] += e.sums[k];
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}
}
#pragma GCC visibility pop
