// Gradients to the formats with a name and back, in runs of blocks that stay in L1. Compiled once for each instruction
// set, with DS_QUANT_ISA its name and -ffp-contract=off. numerics/wire.py and wire_blocks.py have the definition.
#include "absmax.h"
#include "wire_elements.h"
#include "wire_encode.h"

namespace {

constexpr int64_t RUN = 1024, SMALLEST_BLOCK = 16;  // elements of a run, where blocks are not larger
constexpr int64_t MAX_BLOCKS = RUN / SMALLEST_BLOCK;

// Calls body(element, n) for the runs of a range, which starts with a block.
template <class Body>
void for_each_run(const WireCall& c, int64_t begin, int64_t end, const Body& body) {
    int64_t step = c.block_size < RUN ? RUN : c.block_size;
    for (int64_t element = begin; element < end; element += step) body(element, smaller(step, end - element));
}

// Bits of the largest magnitude of a block.
uint32_t absmax_of_block(const float* y, int64_t n) {
    if (n != SMALLEST_BLOCK) return absmax_of<Widest>(y, n);
    auto most = Widest::set_int(0), mask = Widest::set_int(0x7fffffff);
    for (int64_t i = 0; i < SMALLEST_BLOCK; i += Widest::width)
        most = Widest::max_int(most, Widest::bit_and(Widest::float_to_bits(Widest::load(y + i)), mask));
    return Widest::reduce_max(most);
}

const float* table_of(const WireCall& c) { return c.elements == E2M1 ? E2M1_VALUES.of : INTEGER_VALUES.of; }

// ---- to codes ------------------------------------------------------------------------------------------------------

// Writes the parts of runs of one piece into the message.
struct NamedSender {
    const WireCall& call;
    const Signs& signs;
    int64_t piece;
    double* errors;
    uint32_t key[2];
    float largest;
    float tensor = 0.0f;  // the piece's part of e4m3 scales

    NamedSender(const WireCall& c, const Signs& s, int64_t p, double* e)
        : call(c), signs(s), piece(p), errors(e), key{c.key[0], c.key[1]}, largest(c.elements == E2M1 ? 6.0f : 7.0f) {
        if (c.stochastic) derive_key(key, c.stream[p]);
        if (c.largest) tensor = tensor_scale(c, p, largest);
    }

    // Writes the scales of a run of blocks, from number `block` of the piece on, and returns them in `scales`: 0 of zeros in
    // e4m3, NaN of a block with an Inf or a NaN.
    void put_scales(const float* y, int64_t n, int64_t block, float* scales) const {
        uint32_t maxima[MAX_BLOCKS];
        int64_t count = 0;
        for_each_block(n, call.block_size, [&](int64_t at, int64_t length) {
            maxima[count++] = absmax_of_block(y + at, length);
        });
        uint8_t* to = call.message + call.scale_at[piece] + scale_offset(call.scale_kind, block);
        if (call.scale_kind == FLOAT_SCALE) {
            for (int64_t i = 0; i < count; ++i) scales[i] = scale_of(maxima[i], largest);
            std::memcpy(to, scales, count * sizeof *scales);
            return;
        }
        if (call.scale_kind == E8M0_SCALE) {
            for (int64_t i = 0; i < count; ++i) scales[i] = e8m0_value(to[i] = e8m0_of(maxima[i], call.scale_rule));
            return;
        }
        float parts[MAX_BLOCKS];
        if (call.scale_rule == FOUR_SIX)
            for (int64_t i = 0, at = 0; i < count; ++i, at += SMALLEST_BLOCK)
                parts[i] = four_six_part(y + at, smaller(SMALLEST_BLOCK, n - at), maxima[i], tensor);
        else
            for (int64_t i = 0; i < count; ++i) parts[i] = e4m3_part(maxima[i], largest, tensor);
        for (int64_t i = 0; i < count; ++i) to[i] = e4m3_stored(parts[i], maxima[i]);
        for (int64_t i = 0; i < count; ++i) scales[i] = e4m3_scale(parts[i], maxima[i], tensor);
    }

    // The n elements y, which are the piece's from `element` on.
    void operator()(const float* y, int64_t element, int64_t n) const {
        alignas(64) float lost[MAX_BLOCK];
        alignas(64) uint8_t codes[MAX_BLOCK];
        float scales[MAX_BLOCKS];
        if (call.largest && element == 0)
            std::memcpy(call.message + call.scale_at[piece], &tensor, sizeof tensor);
        put_scales(y, n, element / call.block_size, scales);
        uint16_t* residual = residual_at(call.write, piece, element);
        NamedEncoding of{y, scales, lost, codes, errors, {key[0], key[1]}, static_cast<uint64_t>(element)};
        ENCODE_RUN[call.elements == NAMED_INTEGERS][call.stochastic][residual || errors](of, n, call.block_size);
        pack(codes, n, call.block_size, call.message + call.codes_at[piece] + element / 2);
        if (!residual) return;
        if (call.rotated) unrotate_blocks(call, signs, lost, n);
        store_residual<Widest>(lost, residual, call.residual_inverse, n);
    }
};

void quantize(const WireCall& c, const Signs& signs, int64_t piece, int64_t begin, int64_t end, double* errors) {
    alignas(64) float buffer[MAX_BLOCK];
    NamedSender send(c, signs, piece, errors);
    for_each_run(c, begin, end, [&](int64_t element, int64_t n) {
        send(own_elements(c, signs, piece, element, n, buffer), element, n);
    });
}

// ---- from codes ----------------------------------------------------------------------------------------------------

// Adds what a message, from its first byte on, holds for n elements of a piece.
void add_message(const WireCall& c, const uint8_t* message, int64_t piece, int64_t element, int64_t n, float* to) {
    alignas(64) uint8_t codes[MAX_BLOCK];
    float scales[MAX_BLOCKS];
    int64_t count = (n + c.block_size - 1) / c.block_size;
    load_scales(c.scale_kind, message + c.scale_at[piece], element / c.block_size, count, scales);
    unpack(message + c.codes_at[piece] + element / 2, n, c.block_size, codes);
    add_values<Widest>(table_of(c), codes, scales, n, c.block_size, to);
}

// The sum over the ranks, times the factor, of the piece's n elements from `element` on; `own` may not be `to`.
void sum_run(const WireCall& c, int64_t piece, int64_t element, int64_t n, const float* own, float* to) {
    const uint8_t* from = c.received;
    std::memset(to, 0, n * sizeof *to);
    auto add_ranks = [&](int32_t count) {
        for (int32_t rank = 0; rank < count; ++rank, from += c.message_bytes)
            add_message(c, from, piece, element, n, to);
    };
    add_ranks(c.own_rank);
    for (int64_t i = 0; i < n; ++i) to[i] += own[i];
    add_ranks(c.num_ranks - 1 - c.own_rank);
    for (int64_t i = 0; i < n; ++i) to[i] *= c.factor;
}

void reduce(const WireCall& c, const Signs& signs, int64_t piece, int64_t begin, int64_t end, double* errors) {
    alignas(64) float buffer[MAX_BLOCK], result[MAX_BLOCK];
    auto dtype = static_cast<Dtype>(c.result_dtype);
    char* to = c.result ? reinterpret_cast<char*>(c.result[piece]) : nullptr;
    NamedSender send(c, signs, piece, errors);
    for_each_run(c, begin, end, [&](int64_t element, int64_t n) {
        const float* own = own_elements(c, signs, piece, element, n, buffer);
        sum_run(c, piece, element, n, own, result);
        if (!to) return send(result, element, n);
        if (c.rotated) unrotate_blocks(c, signs, result, n);
        store(dtype, result, to + element * itemsize(dtype), n);
    });
}

void dequantize(const WireCall& c, const Signs& signs, int64_t piece, int64_t begin, int64_t end, double*) {
    auto dtype = static_cast<Dtype>(c.dtype);
    char* to = reinterpret_cast<char*>(c.data[piece]);
    for_each_run(c, begin, end, [&](int64_t element, int64_t n) {
        put_out(c, signs, dtype, to + element * itemsize(dtype), n, [&](float* x) {
            // Nothing is lost by the sum: -0 added to a value is the value, zeros with their signs.
            for (int64_t i = 0; i < n; ++i) x[i] = -0.0f;
            add_message(c, c.message, piece, element, n, x);
        });
    });
}

// ---- of a piece ----------------------------------------------------------------------------------------------------

float largest_of_blocks(const WireCall& c, const float* y, int64_t n) {
    uint32_t most = 0;
    for_each_block(n, c.block_size, [&](int64_t at, int64_t length) {
        uint32_t absmax = absmax_of_block(y + at, length);
        most = absmax < INFINITE && absmax > most ? absmax : most;
    });
    return float_of(most);
}

float largest_own(const WireCall& c, const Signs& signs, int64_t piece, int64_t begin, int64_t end) {
    alignas(64) float buffer[MAX_BLOCK];
    float most = 0.0f;
    for_each_run(c, begin, end, [&](int64_t element, int64_t n) {
        float found = largest_of_blocks(c, own_elements(c, signs, piece, element, n, buffer), n);
        most = found > most ? found : most;
    });
    return most;
}

float largest_sum(const WireCall& c, const Signs& signs, int64_t piece, int64_t begin, int64_t end) {
    alignas(64) float buffer[MAX_BLOCK], result[MAX_BLOCK];
    float most = 0.0f;
    for_each_run(c, begin, end, [&](int64_t element, int64_t n) {
        sum_run(c, piece, element, n, own_elements(c, signs, piece, element, n, buffer), result);
        float found = largest_of_blocks(c, result, n);
        most = found > most ? found : most;
    });
    return most;
}

const WireStages STAGES = {quantize, reduce, dequantize, largest_own, largest_sum};

}  // namespace

extern "C" const WireStages* DS_QUANT_JOIN(ds_quant_wire_formats_stages_, DS_QUANT_ISA)() { return &STAGES; }
