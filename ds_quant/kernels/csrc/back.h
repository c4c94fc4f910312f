// The codes of whole blocks in one call, 4-bit ones packed as they arise: what follows the fused front of the step.
//
// Encoders are made once for all blocks, and signs, limits and packing are dealt with in words and bytes, for two or
// four vectors at once.
#pragma once

#include "adamw.h"
#include "encode.h"
#include "random.h"
#include "simd.h"

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
template <bool mirrored, bool stochastic>
struct HalfBatch {
    using V = Twice<Avx512>;
    using Codes = V::I;
    typename HalfCodes<mirrored, true, stochastic>::template Encoder<V> code_of;
    Uniform16<V> uniform16;

    HalfBatch(const MomentFormat& f, const Draws& draws)
        : code_of(f), uniform16(draws.key, static_cast<uint32_t>(draws.index >> 33)) {}

    ALWAYS_INLINE Codes operator()(const float* x, float inverse, uint64_t index) const {
        V::I draw = stochastic ? uniform16(index) : V::set_int(0);
        return code_of(V::mul(V::load(x), V::set(inverse)), draw);
    }
    static ALWAYS_INLINE void store(Codes low, Codes high, uint8_t* packed) {
        V::store_u8(packed, V::bit_or(V::left<4>(high), V::bit_and(low, V::set_int(15))));
    }
};
#else
template <bool mirrored, bool stochastic>
struct HalfBatch {
    using P = Packing;
    using V = Avx2;
    using Codes = V::I;
    using Values = std::conditional_t<mirrored, V::Table8, V::Values16>;
    Values next_bounds, lows, gaps;
    V::Small32 cells;
    V::I first_cell;
    __m128i cell_shift;
    Uniform16<Batch<V, 4>> uniform16;

    HalfBatch(const MomentFormat& f, const Draws& draws) : HalfBatch(f, draws, stochastic ? f.bound_cells : f.threshold_cells) {}
    HalfBatch(const MomentFormat& f, const Draws& draws, const Cells& c)
        : next_bounds((stochastic ? f.bounds : f.thresholds) + 1), lows(f.bounds), gaps(f.gaps), cells(c.codes),
          first_cell(P::set_words(c.first)), cell_shift(_mm_cvtsi32_si128(c.shift)),
          uniform16(draws.key, static_cast<uint32_t>(draws.index >> 33)) {}

    ALWAYS_INLINE Codes operator()(const float* x, float inverse, uint64_t index) const {
        V::I draws[4], cell[4], up[4];
        if constexpr (stochastic) uniform16(index, draws);
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
        // The last bound that x has reached; the first counts as reached.
        V::F values[4];
        look_up(next_bounds, code, values);
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) up[k] = P::mask(V::at_least(size[k], values[k]));
        code = V::sub_bytes(code, packed(up));
        if constexpr (stochastic) {
            V::F gap[4];
            look_up(lows, code, values);
            look_up(gaps, code, gap);
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k)
                up[k] = P::mask(V::greater(V::sub(size[k], values[k]), V::mul(V::to_float(draws[k]), gap[k])));
            code = V::sub_bytes(code, packed(up));
        }
        if constexpr (mirrored) {
            for (int k = 0; k < 4; ++k) up[k] = V::float_to_bits(quotient[k]);
            // Packed bits of a negative number but -0 are negative; codes of zeros are 0.
            code = _mm256_sign_epi8(code, V::bit_or(packed(up), V::set_int(0x01010101)));
        }
        return code;
    }
    static ALWAYS_INLINE void store(Codes low, Codes high, uint8_t* codes) {
        auto low_bits = V::set_int(0x0f0f0f0f);
        auto shifted = V::bit_and(V::left<4>(high), V::set_int(0xf0f0f0f0));
        V::store_int(reinterpret_cast<uint32_t*>(codes), P::in_order(V::bit_or(shifted, V::bit_and(low, low_bits))));
    }

private:
    static ALWAYS_INLINE V::I packed(const V::I (&x)[4]) { return P::bytes(P::words(x[0], x[1]), P::words(x[2], x[3])); }
    static ALWAYS_INLINE void look_up(const V::Values16& table, V::I code, V::F (&to)[4]) { table(code, to); }
    static ALWAYS_INLINE void look_up(const V::Table8& table, V::I code, V::F (&to)[4]) {
        V::I words[2] = {_mm256_unpacklo_epi8(code, code), _mm256_unpackhi_epi8(code, code)};
        for (int k = 0; k < 2; ++k) {
            to[2 * k] = table[_mm256_unpacklo_epi16(words[k], words[k])];
            to[2 * k + 1] = table[_mm256_unpackhi_epi16(words[k], words[k])];
        }
    }
};
#endif

template <class Half>
void back_of_halves(const Back& b) {
    Half codes_of(*b.format, b.draws);
    int64_t half = b.block_size / 2;
    uint8_t* codes = b.codes;
    for (int64_t begin = 0, block = 0; begin < b.n; begin += b.block_size, ++block, codes += half) {
        float inverse = inverse_of(b.scales[block]);
        for (int64_t i = 0; i < half; i += 32) {
            auto low = codes_of(b.x + begin + i, inverse, b.draws.index + begin + i);
            auto high = codes_of(b.x + begin + half + i, inverse, b.draws.index + begin + half + i);
            Half::store(low, high, codes + i);
        }
    }
}

template <class Encoder>
void back_of_bytes(const Back& b) {
    using V = typename Encoder::V;
    Encoder encode_batch(*b.format);
    Uniform16<Batch<V, 4>> uniform16(b.draws.key, static_cast<uint32_t>(b.draws.index >> 33));
    for (int64_t begin = 0, block = 0; begin < b.n; begin += b.block_size, ++block) {
        auto inverse = V::set(inverse_of(b.scales[block]));
        for (int64_t i = begin; i < begin + b.block_size; i += Encoder::width) {
            typename V::I draws[4];
            if constexpr (Encoder::is_stochastic) uniform16(b.draws.index + i, draws);
            encode_batch(b.x + i, inverse, draws, b.codes + i);
        }
    }
}

template <bool stochastic>
BackStage* back_with(const MomentFormat& f) {
    if (f.bits == 8 && f.map == FLOAT)
        return f.is_signed ? back_of_bytes<FloatBatch<true, stochastic>> : back_of_bytes<FloatBatch<false, stochastic>>;
    if (f.bits != 4 || !(stochastic ? f.bound_cells : f.threshold_cells).shift) return nullptr;
    return f.mirrored ? back_of_halves<HalfBatch<true, stochastic>> : back_of_halves<HalfBatch<false, stochastic>>;
}

BackStage* back(const MomentFormat& f, bool stochastic) { return stochastic ? back_with<true>(f) : back_with<false>(f); }
#else
BackStage* back(const MomentFormat&, bool) { return nullptr; }
#endif

}  // namespace
