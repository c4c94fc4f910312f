// Gradients to integers with fp32 scales and back, block by block, all of a block in L1. Compiled once for each
// instruction set, with DS_QUANT_ISA its name and -ffp-contract=off. numerics/wire.py has the definition.
//
// A loop takes whole vectors and leaves the rest to itself with shorter ones, so the rest has the same bits.
#include "absmax.h"
#include "random.h"
#include "wire_elements.h"

namespace {

// ---- to codes ------------------------------------------------------------------------------------------------------

// What is known of a block whose elements become codes.
struct Encoding {
    const float* y;
    float* lost;  // y - code * scale
    float scale, levels;
    uint32_t key[2];
    uint64_t index;  // of y[0] in its piece
};

// Codes of a vector of elements. with_lost: also what they lose, and sums of squares in units of the scale, which
// neither overflow nor vanish.
template <class V, bool stochastic, bool with_lost>
struct Encoder {
    const Encoding& e;
    typename V::F scale, most, least;
    Uniform<V> uniform;
    typename V::F lost_sum, sum;

    explicit Encoder(const Encoding& of)
        : e(of), scale(V::set(of.scale)), most(V::set(of.levels)), least(V::set(-of.levels)),
          uniform(of.key, static_cast<uint32_t>(of.index >> 32)), lost_sum(V::set(0.0f)), sum(lost_sum) {}

    ALWAYS_INLINE typename V::I operator()(int64_t i) {
        auto y = V::load(e.y + i), steps = V::div(y, scale);
        typename V::I code;
        if constexpr (stochastic) {
            auto floor = V::floor(steps);
            auto draw = V::mul(V::to_float(uniform(e.index + i)), V::set(0x1p-24f));
            auto up = V::greater(V::sub(steps, floor), draw);
            code = V::to_int(V::max(V::min(V::add_if(up, floor, V::set(1.0f)), most), least));
        } else {
            code = V::to_nearest_int(steps);  // the scale is so large that no clamp is needed
        }
        if constexpr (with_lost) {
            auto count = V::to_float(code), off = V::sub(steps, count);
            V::store(e.lost + i, V::sub(y, V::mul(count, scale)));
            lost_sum = V::add(lost_sum, V::mul(off, off));
            sum = V::add(sum, V::mul(steps, steps));
        }
        return code;
    }

    void add_to(double sums[2]) const {
        if constexpr (with_lost) add_lanes<V>(lost_sum, sum, sums);
    }
};

// From element i of n on. Of 4-bit codes, n bytes hold elements i in their low and i + half in their high halves.
template <class V, int bits, bool stochastic, bool with_lost>
void encode_from(const Encoding& e, int64_t i, int64_t n, int64_t half, uint8_t* codes, double sums[2]) {
    Encoder<V, stochastic, with_lost> encode(e);
    for (; i + V::width <= n; i += V::width) {
        auto code = encode(i);
        if constexpr (bits == 4) {
            auto high = V::template left<4>(encode(i + half));
            code = V::bit_or(V::bit_and(code, V::set_int(0x0f)), V::bit_and(high, V::set_int(0xf0)));
        }
        V::store_u8(codes + i, code);
    }
    encode.add_to(sums);
    if constexpr (V::width > 1)
        if (i < n) encode_from<typename V::Rest, bits, stochastic, with_lost>(e, i, n, half, codes, sums);
}

template <int bits, bool stochastic, bool with_lost>
void encode_block(const Encoding& e, int64_t n, uint8_t* codes, double sums[2]) {
    if constexpr (bits == 8) return encode_from<Wide, 8, stochastic, with_lost>(e, 0, n, 0, codes, sums);
    int64_t half = (n + 1) / 2;
    encode_from<Wide, 4, stochastic, with_lost>(e, 0, n / 2, half, codes, sums);
    if (n % 2 == 0) return;
    Encoder<Scalar, stochastic, with_lost> encode(e);
    codes[half - 1] = static_cast<uint8_t>(encode(half - 1) & 0x0f);
    encode.add_to(sums);
}

using EncodeBlock = void(const Encoding& e, int64_t n, uint8_t* codes, double sums[2]);

EncodeBlock* const ENCODE_BLOCK[2][2][2] = {
    {{encode_block<8, false, false>, encode_block<8, false, true>},
     {encode_block<8, true, false>, encode_block<8, true, true>}},
    {{encode_block<4, false, false>, encode_block<4, false, true>},
     {encode_block<4, true, false>, encode_block<4, true, true>}},
};

// Writes the parts of blocks of one piece into the message.
struct Sender {
    const WireCall& call;
    const Signs& signs;
    int64_t piece;
    double* errors;
    uint32_t key[2];

    Sender(const WireCall& c, const Signs& s, int64_t p, double* e)
        : call(c), signs(s), piece(p), errors(e), key{c.key[0], c.key[1]} {
        if (c.stochastic) derive_key(key, c.stream[p]);
    }

    // The n elements y, which are the block's from `element` on.
    void operator()(const float* y, int64_t element, int64_t n) const {
        alignas(64) float lost[MAX_BLOCK];
        float levels = call.bits == 8 ? 127.0f : 7.0f, scale = scale_of(absmax_of<Widest>(y, n), levels);
        uint8_t* scales = call.message + call.scale_at[piece];
        std::memcpy(scales + element / call.block_size * sizeof scale, &scale, sizeof scale);
        // Earlier blocks are whole and even.
        uint8_t* codes = call.message + call.codes_at[piece] + (call.bits == 8 ? element : element / 2);
        uint16_t* residual = residual_at(call.write, piece, element);
        if (scale > 0.0f) {
            double sums[2] = {0.0, 0.0};
            Encoding encoding{y, lost, scale, levels, {key[0], key[1]}, static_cast<uint64_t>(element)};
            ENCODE_BLOCK[call.bits == 4][call.stochastic][residual || errors](encoding, n, codes, sums);
            if (errors)
                for (int k = 0; k < 2; ++k) errors[k] += sums[k] * scale * scale;
        } else {
            std::memset(codes, 0, call.bits == 8 ? n : (n + 1) / 2);
            // NaN comes out as 0, and zeros with their signs.
            for (int64_t i = 0; residual && i < n; ++i) lost[i] = scale == 0.0f ? y[i] : scale;
        }
        if (!residual) return;
        if (call.rotated) unrotate(lost, n, signs);
        store_residual<Widest>(lost, residual, call.residual_inverse, n);
    }
};

void quantize(const WireCall& c, const Signs& signs, int64_t piece, int64_t begin, int64_t end, double* errors) {
    alignas(64) float buffer[MAX_BLOCK];
    Sender send(c, signs, piece, errors);
    for (int64_t element = begin; element < end; element += c.block_size) {
        int64_t n = smaller(c.block_size, end - element);
        send(own_elements(c, signs, piece, element, n, buffer), element, n);
    }
}

// ---- from codes ----------------------------------------------------------------------------------------------------

// Where a block lies in a message, from its first byte on.
struct Place {
    int64_t scale, codes;

    Place(const WireCall& c, int64_t piece, int64_t element)
        : scale(c.scale_at[piece] + element / c.block_size * 4),
          codes(c.codes_at[piece] + (c.bits == 8 ? element : element / 2)) {}
};

// code * scale of consecutive codes. Of 4-bit codes, `upper` picks the half of each byte.
template <class V, int bits, bool upper>
ALWAYS_INLINE typename V::F value_at(const uint8_t* codes, typename V::F scale) {
    if constexpr (bits == 8) return V::mul(V::to_float(V::load_s8(codes)), scale);
    auto code = V::load_u8(codes), eight = V::set_int(8);
    code = upper ? V::template right<4>(code) : V::bit_and(code, V::set_int(15));
    return V::mul(V::to_float(V::sub(V::bit_xor(code, eight), eight)), scale);
}

template <class V, int bits, bool upper>
void decode_run(const uint8_t* codes, float scale, float* to, int64_t n) {
    auto scales = V::set(scale);
    int64_t i = 0;
    for (; i + V::width <= n; i += V::width) V::store(to + i, value_at<V, bits, upper>(codes + i, scales));
    if constexpr (V::width > 1) decode_run<typename V::Rest, bits, upper>(codes + i, scale, to + i, n - i);
}

// The sum over the ranks, times the factor, of n elements in one place of each message.
template <class V, int bits, bool upper>
void sum_run(const WireCall& c, int64_t scale_at, int64_t codes_at, const float* own, float* to, int64_t n) {
    auto factor = V::set(c.factor);
    int64_t i = 0;
    for (; i + V::width <= n; i += V::width) {
        const uint8_t* from = c.received;
        auto sum = V::set(0.0f);
        auto add_ranks = [&](int32_t count) __attribute__((always_inline)) {
            for (int32_t rank = 0; rank < count; ++rank, from += c.message_bytes) {
                auto scale = V::set(load_float(from + scale_at));
                sum = V::add(sum, value_at<V, bits, upper>(from + codes_at + i, scale));
            }
        };
        add_ranks(c.own_rank);
        sum = V::add(sum, V::load(own + i));
        add_ranks(c.num_ranks - 1 - c.own_rank);
        V::store(to + i, V::mul(sum, factor));
    }
    if constexpr (V::width > 1)
        sum_run<typename V::Rest, bits, upper>(c, scale_at, codes_at + i, own + i, to + i, n - i);
}

void sum_block(const WireCall& c, const Place& at, const float* own, float* to, int64_t n) {
    if (c.bits == 8) return sum_run<Wide, 8, false>(c, at.scale, at.codes, own, to, n);
    int64_t half = (n + 1) / 2;
    sum_run<Wide, 4, false>(c, at.scale, at.codes, own, to, half);
    sum_run<Wide, 4, true>(c, at.scale, at.codes, own + half, to + half, n - half);
}

void decode_block(const WireCall& c, const Place& at, float* to, int64_t n) {
    float scale = load_float(c.message + at.scale);
    const uint8_t* codes = c.message + at.codes;
    if (c.bits == 8) return decode_run<Wide, 8, false>(codes, scale, to, n);
    int64_t half = (n + 1) / 2;
    decode_run<Wide, 4, false>(codes, scale, to, half);
    decode_run<Wide, 4, true>(codes, scale, to + half, n - half);
}

void reduce(const WireCall& c, const Signs& signs, int64_t piece, int64_t begin, int64_t end, double* errors) {
    alignas(64) float buffer[MAX_BLOCK], result[MAX_BLOCK];
    auto dtype = static_cast<Dtype>(c.result_dtype);
    char* to = c.result ? reinterpret_cast<char*>(c.result[piece]) : nullptr;
    Sender send(c, signs, piece, errors);
    for (int64_t element = begin; element < end; element += c.block_size) {
        int64_t n = smaller(c.block_size, end - element);
        const float* own = own_elements(c, signs, piece, element, n, buffer);
        Place at(c, piece, element);
        if (to) {
            char* block = to + element * itemsize(dtype);
            put_out(c, signs, dtype, block, n, [&](float* x) { sum_block(c, at, own, x, n); });
        } else {
            sum_block(c, at, own, result, n);
            send(result, element, n);
        }
    }
}

void dequantize(const WireCall& c, const Signs& signs, int64_t piece, int64_t begin, int64_t end, double*) {
    auto dtype = static_cast<Dtype>(c.dtype);
    char* to = reinterpret_cast<char*>(c.data[piece]);
    for (int64_t element = begin; element < end; element += c.block_size) {
        int64_t n = smaller(c.block_size, end - element);
        Place at(c, piece, element);
        char* block = to + element * itemsize(dtype);
        put_out(c, signs, dtype, block, n, [&](float* x) { decode_block(c, at, x, n); });
    }
}

const WireStages STAGES = {quantize, reduce, dequantize, nullptr, nullptr};

}  // namespace

extern "C" const WireStages* DS_QUANT_JOIN(ds_quant_wire_stages_, DS_QUANT_ISA)() { return &STAGES; }
