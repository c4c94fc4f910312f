// The codes of whole blocks in one call, 4-bit ones packed as they arise: what follows the fused front of the step.
//
// Encoders are made once for all blocks, and signs, limits and packing are dealt with in words and bytes, for two or
// four vectors at once.
#pragma once

#include "adamw.h"
#include "encode.h"
#include "log_codes.h"
#include "random.h"
#include "simd.h"

// GCC leaves each chain of instructions in one piece, longer than what a processor looks ahead, unless it schedules.
#if defined(__GNUC__) && !defined(__clang__) && defined(__AVX2__) && !defined(__AVX512F__)
#pragma GCC push_options
#pragma GCC optimize("schedule-insns", "sched-pressure")
#endif

namespace {

#if defined(__AVX512F__)
// Packing works within lanes of 128 bits. `in_order` brings the bytes of four packed vectors in the order of elements.
struct Packing {
    using V = Avx512;
    using I = V::I;

    static I words(I a, I b) { return _mm512_packs_epi32(a, b); }
    static I bytes(I a, I b) { return _mm512_packs_epi16(a, b); }
    static I unsigned_bytes(I a, I b) { return _mm512_packus_epi16(a, b); }
    static I sub_words(I a, I b) { return _mm512_sub_epi16(a, b); }
    static I set_words(int x) { return _mm512_set1_epi16(static_cast<int16_t>(x)); }
    static I arithmetic_right(I x, int count) { return _mm512_srai_epi32(x, count); }
    static bool any_below_2(I bytes) { return _mm512_cmplt_epi8_mask(bytes, _mm512_set1_epi8(2)); }
    static I in_order(I x) {
        return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), x);
    }
    static I max_bytes(I a, I b) { return _mm512_max_epi8(a, b); }
    static I add_bytes(I a, I b) { return _mm512_add_epi8(a, b); }
    static I mask(V::M m) { return _mm512_movm_epi32(m); }
    static ALWAYS_INLINE void draws(const uint32_t* words, I (&to)[4]) {
        for (int k = 0; k < 4; k += 2) {
            auto found = halves_of<V>(V::load_int(words + 8 * k));
            to[k] = found.a, to[k + 1] = found.b;
        }
    }
};
#elif defined(__AVX2__)
struct Packing {
    using V = Avx2;
    using I = V::I;

    static I words(I a, I b) { return _mm256_packs_epi32(a, b); }
    static I bytes(I a, I b) { return _mm256_packs_epi16(a, b); }
    static I unsigned_bytes(I a, I b) { return _mm256_packus_epi16(a, b); }
    static I sub_words(I a, I b) { return _mm256_sub_epi16(a, b); }
    static I set_words(int x) { return _mm256_set1_epi16(static_cast<int16_t>(x)); }
    static I arithmetic_right(I x, int count) { return _mm256_srai_epi32(x, count); }
    static bool any_below_2(I bytes) { return _mm256_movemask_epi8(_mm256_cmpgt_epi8(_mm256_set1_epi8(2), bytes)); }
    static I in_order(I x) { return _mm256_permutevar8x32_epi32(x, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)); }
    static I max_bytes(I a, I b) { return _mm256_max_epi8(a, b); }
    static I add_bytes(I a, I b) { return _mm256_add_epi8(a, b); }
    static I mask(V::M m) { return V::float_to_bits(m); }
    static ALWAYS_INLINE void draws(const uint32_t* words, I (&to)[4]) {
        auto found = halves_of<Lanes16>(Lanes16::load_int(words));
        to[0] = found.a.a, to[1] = found.a.b, to[2] = found.b.a, to[3] = found.b.b;
    }
};
#endif

#if defined(__AVX2__)
// Codes of 4 * width elements. Rounding is a sum on the bits of x, sign included, and a shift; packing that saturates
// stands for the limits.
template <bool is_signed, bool stochastic>
struct FloatBatch {
    using P = Packing;
    using V = P::V;
    static constexpr bool is_stochastic = stochastic;
    static constexpr int width = 4 * V::width;

    explicit FloatBatch(const MomentFormat&) {}

    ALWAYS_INLINE void operator()(const float* x, V::F inverse, const V::I (&draws)[4], uint8_t* codes) const {
        V::I found[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
            auto carry = V::set_int((1u << (FLOAT_SHIFT - 1)) - 1);
            if constexpr (stochastic) carry = V::left<FLOAT_SHIFT - 16>(draws[k]);
            auto bits = V::float_to_bits(V::mul(V::load(x + k * V::width), inverse));
            found[k] = P::arithmetic_right(V::add(bits, carry), FLOAT_SHIFT);
        }
        auto base = P::set_words(FLOAT_BASE[is_signed] >> FLOAT_SHIFT);
        V::I words[2] = {P::words(found[0], found[1]), P::words(found[2], found[3])}, bytes;
        if constexpr (is_signed) {
            V::I sizes[2];
            for (int k = 0; k < 2; ++k) sizes[k] = P::sub_words(V::bit_and(words[k], P::set_words(0x7ff)), base);
            bytes = P::bytes(sizes[0], sizes[1]);
            // What is below the lowest value, code 1, is there or below: few, if the block is not half dead.
            if (__builtin_expect(P::any_below_2(bytes), false)) bytes = with_zeros(bytes, x, inverse, draws);
            // Negative words are below -128.
            bytes = V::bit_or(bytes, V::bit_and(P::bytes(words[0], words[1]), V::set_int(0x80808080)));
        } else {
            bytes = P::unsigned_bytes(P::sub_words(words[0], base), P::sub_words(words[1], base));
        }
        V::store_int(reinterpret_cast<uint32_t*>(codes), P::in_order(bytes));
    }

    // Between 0 and the lowest value the values decide. All bounds are below the lowest value.
    static ALWAYS_INLINE V::I with_zeros(V::I bytes, const float* x, V::F inverse, const V::I (&draws)[4]) {
        constexpr float lowest = 1.25f * 0x1p-16f;
        V::I is_zero[4];
        for (int k = 0; k < 4; ++k) {
            auto bound = V::set(lowest * 0.5f);
            if constexpr (stochastic) bound = V::mul(V::to_float(draws[k]), V::set(lowest * 0x1p-16f));
            is_zero[k] = P::mask(V::at_least(bound, V::abs(V::mul(V::load(x + k * V::width), inverse))));
        }
        auto zeros = P::bytes(P::words(is_zero[0], is_zero[1]), P::words(is_zero[2], is_zero[3]));
        return P::add_bytes(P::max_bytes(bytes, V::set_int(0x01010101)), zeros);
    }
};

// 4-bit codes of 4 * width elements, found with cells: see HalfCodes.
template <bool mirrored, bool stochastic>
struct HalfBatch;

#if defined(__AVX512F__)
struct HalfBatchStore {
    using Codes = Twice<Avx512>::I;

    static ALWAYS_INLINE void store(Codes low, Codes high, uint8_t* packed) {
        using V = Twice<Avx512>;
        V::store_u8(packed, V::bit_or(V::left<4>(high), V::bit_and(low, V::set_int(15))));
    }
};

template <bool mirrored, bool stochastic>
struct HalfBatch : HalfBatchStore {
    using V = Twice<Avx512>;
    using Codes = V::I;
    typename HalfCodes<mirrored, true, stochastic>::template Encoder<V> code_of;

    explicit HalfBatch(const MomentFormat& f) : code_of(f) {}

    ALWAYS_INLINE Codes operator()(const float* x, float inverse, const uint32_t* words) const {
        V::I draw = stochastic ? halves_of<Avx512>(Avx512::load_int(words)) : V::set_int(0);
        return code_of(V::mul(V::load(x), V::set(inverse)), draw);
    }
};
#else
struct HalfBatchStore {
    static ALWAYS_INLINE void store(Avx2::I low, Avx2::I high, uint8_t* codes) {
        using V = Avx2;
        auto low_bits = V::set_int(0x0f0f0f0f);
        auto shifted = V::bit_and(V::left<4>(high), V::set_int(0xf0f0f0f0));
        auto both = V::bit_or(shifted, V::bit_and(low, low_bits));
        V::store_int(reinterpret_cast<uint32_t*>(codes), Packing::in_order(both));
    }
};

template <bool mirrored, bool stochastic>
struct HalfBatch : HalfBatchStore {
    using P = Packing;
    using V = Avx2;
    using Codes = V::I;
    using Values = std::conditional_t<mirrored, V::Table8, V::Values16>;
    Values next_bounds, lows, gaps;
    V::Small32 cells;
    V::I first_cell;
    __m128i cell_shift;

    explicit HalfBatch(const MomentFormat& f) : HalfBatch(f, stochastic ? f.bound_cells : f.threshold_cells) {}
    HalfBatch(const MomentFormat& f, const Cells& c)
        : next_bounds((stochastic ? f.bounds : f.thresholds) + 1), lows(f.bounds), gaps(f.gaps), cells(c.codes),
          first_cell(P::set_words(c.first)), cell_shift(_mm_cvtsi32_si128(c.shift)) {}

    ALWAYS_INLINE Codes operator()(const float* x, float inverse, const uint32_t* words_of_bits) const {
        V::I draws[4], cell[4];
        if constexpr (stochastic) P::draws(words_of_bits, draws);
        V::F quotient[4], size[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
            quotient[k] = V::mul(V::load(x + 8 * k), V::set(inverse));
            size[k] = mirrored ? V::abs(quotient[k]) : quotient[k];
            cell[k] = _mm256_sra_epi32(V::float_to_bits(size[k]), cell_shift);
        }
        V::I words[2];
        for (int k = 0; k < 2; ++k) words[k] = P::sub_words(P::words(cell[2 * k], cell[2 * k + 1]), first_cell);
        auto code = cells.bytes(P::unsigned_bytes(words[0], words[1]));
        if constexpr (mirrored) return with_sign(code, quotient, size, draws);
        else return without_sign(code, size, draws);
    }

private:
    static ALWAYS_INLINE V::I packed(const V::I (&x)[4]) {
        return P::bytes(P::words(x[0], x[1]), P::words(x[2], x[3]));
    }

    // Eight values are looked up with integers of 32 bits.
    ALWAYS_INLINE V::I with_sign(
        V::I below, const V::F (&quotient)[4], const V::F (&size)[4], const V::I (&draws)[4]) const {
        auto zero = V::set_int(0);
        V::I words[2] = {_mm256_unpacklo_epi8(below, zero), _mm256_unpackhi_epi8(below, zero)}, codes[4];
        for (int k = 0; k < 2; ++k) {
            codes[2 * k] = _mm256_unpacklo_epi16(words[k], zero);
            codes[2 * k + 1] = _mm256_unpackhi_epi16(words[k], zero);
        }
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
            // The last bound that x has reached; the first counts as reached.
            auto code = V::sub(codes[k], P::mask(V::at_least(size[k], next_bounds[codes[k]])));
            if constexpr (stochastic) {
                auto gap = V::mul(V::to_float(draws[k]), gaps[code]);
                code = V::sub(code, P::mask(V::greater(V::sub(size[k], lows[code]), gap)));
            }
            codes[k] = V::negate_if_negative(code, quotient[k]);
        }
        return packed(codes);
    }

    // Sixteen are looked up with bytes.
    ALWAYS_INLINE V::I without_sign(V::I code, const V::F (&x)[4], const V::I (&draws)[4]) const {
        V::F values[4];
        V::I up[4];
        next_bounds(code, values);
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) up[k] = P::mask(V::at_least(x[k], values[k]));
        code = V::sub_bytes(code, packed(up));
        if constexpr (stochastic) {
            V::F gap[4];
            lows(code, values);
            gaps(code, gap);
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k)
                up[k] = P::mask(V::greater(V::sub(x[k], values[k]), V::mul(V::to_float(draws[k]), gap[k])));
            code = V::sub_bytes(code, packed(up));
        }
        return code;
    }
};
#endif

template <class Half>
void back_of_halves(const Back& b) {
    Half codes_of(*b.format);
    int64_t half = b.block_size / 2;
    uint8_t* codes = b.codes;
    for (int64_t begin = 0, block = 0; begin < b.n; begin += b.block_size, ++block, codes += half) {
        float inverse = inverse_of(b.scales[block]);
        for (int64_t i = 0; i < half; i += 32) {
            int64_t at[2] = {begin + i, begin + half + i};
            auto low = codes_of(b.x + at[0], inverse, b.words + at[0] / 2);
            auto high = codes_of(b.x + at[1], inverse, b.words + at[1] / 2);
            Half::store(low, high, codes + i);
        }
    }
}

template <class Encoder>
void back_of_bytes(const Back& b) {
    using V = typename Encoder::V;
    Encoder encode_batch(*b.format);
    for (int64_t begin = 0, block = 0; begin < b.n; begin += b.block_size, ++block) {
        auto inverse = V::set(inverse_of(b.scales[block]));
        for (int64_t i = begin; i < begin + b.block_size; i += Encoder::width) {
            typename V::I draws[4];
            if constexpr (Encoder::is_stochastic) Packing::draws(b.words + i / 2, draws);
            encode_batch(b.x + i, inverse, draws, b.codes + i);
        }
    }
}

// 32 codes of map LOG, 4 bits each.
#if defined(__AVX512F__)
template <bool stochastic>
struct LogBatch : HalfBatchStore {
    using V = Twice<Avx512>;
    typename LogCodes<stochastic>::template Encoder<V> code_of;

    explicit LogBatch(const LogBlock& block) : code_of(block) {}

    ALWAYS_INLINE V::I operator()(const float* x, float inverse, const uint32_t* words) const {
        V::I draw = stochastic ? halves_of<Avx512>(Avx512::load_int(words)) : V::set_int(0);
        return code_of(V::mul(V::load(x), V::set(inverse)), draw);
    }
};
#else
template <bool stochastic>
struct LogBatch : HalfBatchStore {
    using P = Packing;
    using V = Avx2;
    typename LogCodes<stochastic>::template Encoder<V> code_of;

    explicit LogBatch(const LogBlock& block) : code_of(block) {}

    ALWAYS_INLINE V::I operator()(const float* x, float inverse, const uint32_t* words) const {
        V::I draws[4], code[4];
        if constexpr (stochastic) P::draws(words, draws);
        for (int k = 0; k < 4; ++k) code[k] = code_of(V::mul(V::load(x + 8 * k), V::set(inverse)), draws[k]);
        return P::bytes(P::words(code[0], code[1]), P::words(code[2], code[3]));
    }
};
#endif

template <bool stochastic>
void back_of_log(const Back& b) {
    int64_t half = b.block_size / 2, num_blocks = b.n / b.block_size;
    for (int64_t block = 0; block < num_blocks; ++block)
        if (b.scales[block]) fit_log<Widest>(b.x + block * b.block_size, b.block_size, b.scales[block], b.ends + 2 * block);
    LogRoots roots;
    roots.find(b.ends, num_blocks);
    uint8_t* codes = b.codes;
    for (int64_t begin = 0, block = 0; begin < b.n; begin += b.block_size, ++block, codes += half) {
        LogBatch<stochastic> codes_of(LogBlock(roots.quotients[block], roots.roots[block]));
        float inverse = inverse_of(b.scales[block]);
        for (int64_t i = 0; i < half; i += 32) {
            int64_t at[2] = {begin + i, begin + half + i};
            auto low = codes_of(b.x + at[0], inverse, b.words + at[0] / 2);
            auto high = codes_of(b.x + at[1], inverse, b.words + at[1] / 2);
            LogBatch<stochastic>::store(low, high, codes + i);
        }
    }
}

template <bool stochastic>
BackStage* back_with(const MomentFormat& f) {
    if (f.bits == 8 && f.map == FLOAT)
        return f.is_signed ? back_of_bytes<FloatBatch<true, stochastic>> : back_of_bytes<FloatBatch<false, stochastic>>;
    if (f.map == LOG) return back_of_log<stochastic>;
    if (f.bits != 4 || !(stochastic ? f.bound_cells : f.threshold_cells).shift) return nullptr;
    return f.mirrored ? back_of_halves<HalfBatch<true, stochastic>> : back_of_halves<HalfBatch<false, stochastic>>;
}

BackStage* back(const MomentFormat& f, bool stochastic) {
    return stochastic ? back_with<true>(f) : back_with<false>(f);
}
#else
BackStage* back(const MomentFormat&, bool) { return nullptr; }
#endif

}  // namespace

#if defined(__GNUC__) && !defined(__clang__) && defined(__AVX2__) && !defined(__AVX512F__)
#pragma GCC pop_options
#endif
