// The loops over elements. Compiled once for each instruction set, with DS_QUANT_ISA its name and -ffp-contract=off.
//
// A loop takes whole vectors and leaves the rest to itself with shorter ones, so the rest has the same bits.
#include "absmax.h"
#include "adamw.h"
#include "back.h"
#include "convert.h"
#include "decode.h"
#include "encode.h"
#include "log_codes.h"
#include "masters_loops.h"
#include "random.h"
#include "simd.h"

namespace {

// ---- the step (numerics/adam.py) -----------------------------------------------------------------------------------

constexpr float LARGEST_GRADIENT = 0x1p63f;

template <class V>
struct Step {
    typename V::F beta1, rest1, beta2, rest2, eps, decay, step_size, correction;

    explicit Step(const Scalars& s)
        : beta1(V::set(s.beta1)), rest1(V::set(s.one_minus_beta1)),
          beta2(V::set(s.beta2)), rest2(V::set(s.one_minus_beta2)),
          eps(V::set(s.eps)), decay(V::set(s.decay)),
          step_size(V::set(s.step_size)), correction(V::set(s.correction)) {}

    // Finite moments of finite gradients; the product is a NaN where there is an Inf or a NaN.
    static ALWAYS_INLINE typename V::F limited(typename V::F grad) {
        auto within = V::min(V::max(grad, V::set(-LARGEST_GRADIENT)), V::set(LARGEST_GRADIENT));
        return V::add(within, V::mul(grad, V::set(0.0f)));
    }

    // Of limited gradients and their squares.
    ALWAYS_INLINE void moments(
        typename V::F grad, typename V::F square, typename V::F& first, typename V::F& second) const {
        first = V::add(V::mul(first, beta1), V::mul(grad, rest1));
        second = V::add(V::mul(second, beta2), V::mul(square, rest2));
    }

    ALWAYS_INLINE typename V::F param(typename V::F old, typename V::F first, typename V::F second) const {
        auto denominator = V::add(V::mul(V::sqrt(second), correction), eps);
        return V::sub(V::mul(old, decay), V::mul(V::div(first, denominator), step_size));
    }
};

template <class V, bool with_param>
void step(float* param, const float* grad, float* exp_avg, float* exp_avg_sq, int64_t n, const Scalars& s) {
    Step<V> step_of(s);
    int64_t i = 0;
    for (; i + V::width <= n; i += V::width) {
        auto first = V::load(exp_avg + i), second = V::load(exp_avg_sq + i);
        auto limited = step_of.limited(V::load(grad + i));
        step_of.moments(limited, V::mul(limited, limited), first, second);
        V::store(exp_avg + i, first);
        V::store(exp_avg_sq + i, second);
        if constexpr (with_param) V::store(param + i, step_of.param(V::load(param + i), first, second));
    }
    if (with_param) param += i;
    if constexpr (V::width > 1)
        step<typename V::Rest, with_param>(param, grad + i, exp_avg + i, exp_avg_sq + i, n - i, s);
}

void moments(const float* grad, float* exp_avg, float* exp_avg_sq, int64_t n, const Scalars& s) {
    step<Widest, false>(nullptr, grad, exp_avg, exp_avg_sq, n, s);
}

// The place of a loop in a moment's blocks. `run` codes follow each other: half a block where a byte holds two.
struct Runs {
    const FrontMoment& moment;
    bool halves;
    int64_t run, block = 0, within = 0;

    explicit Runs(const FrontMoment& m)
        : moment(m), halves(m.format->bits == 4), run(halves ? m.block_size / 2 : m.block_size) {}

    template <class Reader>
    ALWAYS_INLINE void start(Reader& reader) const {
        bool is_high = halves && within >= run;
        reader.start(moment.codes + block * run + (is_high ? within - run : within), is_high ? 4 : 0, scale());
    }

    const float* scale() const { return moment.scale + (moment.format->map == LOG ? 2 * block : block); }

    // Past `length` elements; whether they end their block.
    ALWAYS_INLINE bool advance(int64_t length) {
        within += length;
        if (within < moment.block_size) return false;
        within = 0, ++block;
        return true;
    }
};

// Limited gradients of a batch and their squares, which tell at once whether one is beyond the limit.
template <class B>
ALWAYS_INLINE void load_gradients(
    const float* from, typename B::Part::F (&grad)[B::parts], typename B::Part::F (&square)[B::parts]) {
    using V = typename B::Part;
    auto most = V::set_int(0);
    for (int k = 0; k < B::parts; ++k) {
        grad[k] = V::load(from + k * V::width);
        square[k] = V::mul(grad[k], grad[k]);
        most = V::max_unsigned(most, V::float_to_bits(square[k]));  // NaN is above all numbers
    }
    auto limit = V::set(LARGEST_GRADIENT * LARGEST_GRADIENT);
    if (__builtin_expect(V::all(V::at_least(limit, V::bits_to_float(most))), true)) return;
    for (int k = 0; k < B::parts; ++k) {
        grad[k] = Step<V>::limited(grad[k]);
        square[k] = V::mul(grad[k], grad[k]);
    }
}

// Elements between what is stepped and what is fetched meanwhile: memory is busy while codes are found, too.
constexpr int64_t AHEAD = 512;

// Fetches what the elements AHEAD are in, a batch at a time.
struct Fetch {
    Stream streams[STREAMS];

    explicit Fetch(const Front& f) {
        for (int k = 0; k < STREAMS; ++k) {
            const Stream& s = f.streams[k];
            streams[k] = {s.from + AHEAD / 32 * s.bytes, s.bytes};
        }
    }

    ALWAYS_INLINE void operator()(int64_t element) const {
        if (element % 32) return;
#pragma GCC unroll 8
        for (const Stream& s : streams) __builtin_prefetch(s.from + element / 32 * s.bytes);
    }
};

// Draws the words of random bits that the back part needs: here the processor has room for it beside the divisions.
template <class B>
struct Words {
    Words(const FrontMoment&) {}
    void operator()(int64_t) const {}
};

#if defined(__AVX2__)
template <>
struct Words<Widest32> {
    Words16<Lanes16> words16;
    uint32_t* to;
    uint64_t index;

    explicit Words(const FrontMoment& m)
        : words16(m.draws.key, static_cast<uint32_t>(m.draws.index >> 33)), to(m.words), index(m.draws.index) {}

    ALWAYS_INLINE void operator()(int64_t i) const {
        if (to) Lanes16::store_int(to + i / 2, words16(index + i));
    }
};
#endif

// Steps the parameter two turns late: in a turn, the root of its batch, the division of the batch before and the sum of
// the one before that are begun, so that no instruction waits for another of its turn that takes long.
template <class B>
struct Late {
    using V = typename B::Part;
    typename V::F first[B::parts], root[B::parts], quotient[B::parts];
    float* param;
    int stage = 0;

    explicit Late(float* p) : param(p - 2 * B::width) {}

    ALWAYS_INLINE void operator()(
        const Step<V>& s, const typename V::F (&next)[B::parts], const typename V::F (&second)[B::parts]) {
        if (stage >= 2) store(s);
        if (stage >= 1) divide(s);
        stage = stage < 2 ? stage + 1 : 2;
        for (int k = 0; k < B::parts; ++k) first[k] = next[k], root[k] = V::sqrt(second[k]);
        param += B::width;
    }
    ALWAYS_INLINE void divide(const Step<V>& s) {
        for (int k = 0; k < B::parts; ++k)
            quotient[k] = V::div(first[k], V::add(V::mul(root[k], s.correction), s.eps));
    }
    ALWAYS_INLINE void store(const Step<V>& s) {
        for (int k = 0; k < B::parts; ++k) {
            float* at = param + k * V::width;
            V::store(at, V::sub(V::mul(V::load(at), s.decay), V::mul(quotient[k], s.step_size)));
        }
    }
    void finish(const Step<V>& s) {
        if (stage >= 2) store(s);
        param += B::width;
        divide(s);
        store(s);
    }
};

// Decoding, the step and the maxima in one loop: the step waits for its root and division most of the time.
template <class B, class First, class Second>
void front_as(const Front& f) {
    using V = typename B::Part;
    Step<V> step_of(*f.scalars);
    Runs firsts(f.moments[0]), seconds(f.moments[1]);
    BatchReader<First, B> read_first(*f.moments[0].format);
    BatchReader<Second, B> read_second(*f.moments[1].format);
    int64_t run = firsts.run < seconds.run ? firsts.run : seconds.run;
    auto mask = V::set_int(0x7fffffff);
    auto first_most = V::set_int(0), second_most = first_most;
    Late<B> late(f.param);
    Words<B> first_words(f.moments[0]), second_words(f.moments[1]);
    if constexpr (std::is_same_v<Second, LogHalves>)
        read_second.prepare(f.moments[1].scale, f.n / f.moments[1].block_size);
    Fetch fetch(f);
    for (int64_t begin = 0; begin < f.n; begin += run) {
        firsts.start(read_first);
        seconds.start(read_second);
        for (int64_t i = 0; i < run; i += B::width) {
            fetch(begin + i);
            first_words(begin + i);
            second_words(begin + i);
            typename V::F first[B::parts], second[B::parts], grad[B::parts], square[B::parts];
            read_first(i, first);
            read_second(i, second);
            load_gradients<B>(f.grad + begin + i, grad, square);
#pragma GCC unroll 4
            for (int k = 0; k < B::parts; ++k) {
                int64_t at = begin + i + k * V::width;
                step_of.moments(grad[k], square[k], first[k], second[k]);
                V::store(f.moments[0].to + at, first[k]);
                V::store(f.moments[1].to + at, second[k]);
                first_most = V::max_int(first_most, V::bit_and(V::float_to_bits(first[k]), mask));
                // Not negative, but a NaN may be.
                second_most = V::max_unsigned(second_most, V::float_to_bits(second[k]));
            }
            late(step_of, first, second);
        }
        if (firsts.advance(run)) {
            f.moments[0].absmax[firsts.block - 1] = V::reduce_max(first_most);
            first_most = V::set_int(0);
        }
        if (seconds.advance(run)) {
            f.moments[1].absmax[seconds.block - 1] = V::reduce_max(V::bit_and(second_most, mask));
            second_most = V::set_int(0);
        }
    }
    late.finish(step_of);
}

template <class First>
FrontStage* front_with(const MomentFormat& second) {
    if (second.map == LOG) return front_as<Widest32, First, LogHalves>;
    if (second.bits == 4 && !second.is_signed) return front_as<Widest32, First, Halves>;
    if (second.map == FLOAT && !second.is_signed) return front_as<Widest32, First, Float<false>>;
    if (second.map == POWER && !second.is_signed && second.exponent == 8) return front_as<Widest32, First, Power<8, false>>;
    return nullptr;
}

FrontStage* front(const MomentFormat& first, const MomentFormat& second) {
    if (first.bits == 4) return front_with<Halves>(second);
    if (first.map == FLOAT && first.is_signed) return front_with<Float<true>>(second);
    if (first.map == POWER && first.is_signed && first.exponent == 4) return front_with<Power<4, true>>(second);
    return nullptr;
}

// ---- packing, and numbers for tests --------------------------------------------------------------------------------

int64_t pack(const uint8_t* codes, uint8_t* packed, int64_t n) {
    int64_t half = (n + 1) / 2;
    for (int64_t i = 0; i < n / 2; ++i) packed[i] = static_cast<uint8_t>((codes[i] & 0x0f) | (codes[i + half] << 4));
    if (n % 2) packed[half - 1] = codes[half - 1] & 0x0f;
    return half;
}

void pack_half(const uint8_t* codes, int shift, uint8_t* packed, int64_t n) {
    if (shift == 0)
        for (int64_t i = 0; i < n; ++i) packed[i] = static_cast<uint8_t>((packed[i] & 0xf0) | (codes[i] & 0x0f));
    else
        for (int64_t i = 0; i < n; ++i) packed[i] = static_cast<uint8_t>((packed[i] & 0x0f) | (codes[i] << 4));
}

template <class B>
void uniform16_of(const Source<B>& s, uint32_t* to, int64_t n) {
    using V = typename B::Part;
    auto uniform16 = s.uniform16();
    int64_t i = 0;
    for (; i + B::width <= n; i += B::width) {
        typename V::I draws[B::parts];
        uniform16(s.draws.index + i, draws);
        for (int k = 0; k < B::parts; ++k) V::store_int(to + i + k * V::width, draws[k]);
    }
    if constexpr (B::width > 1) uniform16_of<typename B::Rest>(s.from(i), to + i, n - i);
}

void uniform16(const Draws& draws, uint32_t* to, int64_t n) {
    for_each_stretch(draws, n, [&](const Draws& part, int64_t begin, int64_t length, bool is_aligned) {
        if (is_aligned)
            uniform16_of<Widest32>({nullptr, 0.0f, part}, to + begin, length);
        else
            uniform16_of<Batch<Scalar, 1>>({nullptr, 0.0f, part}, to + begin, length);
    });
}

const Stages STAGES = {
    load, store, join_masters, split_masters, moments, step<Widest, true>, absmax_of<Widest>,
    front, back, decode, encode, pack, pack_half, decode_log, encode_log, fit_log<Widest>, uniform16,
};

}  // namespace

extern "C" const Stages* DS_QUANT_JOIN(ds_quant_stages_, DS_QUANT_ISA)() { return &STAGES; }
