// One interface to scalars and vectors of 8 and 16 fp32 numbers; the stages are written once against it.
//
// Everything is in an unnamed namespace: a function compiled for AVX-512 must not be merged with its namesake compiled
// for plain x86-64. `rough_rsqrt` and `rough_rcp` may be off by 4e-4 relative and take denormal numbers for zeros; all
// else is IEEE, rounded to nearest.
#pragma once

#include <cstdint>
#include <cstring>

// A call in the middle of a loop costs more than what is called: vectors pass through memory.
#define ALWAYS_INLINE inline __attribute__((always_inline))

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

struct Scalar {
    using Rest = Scalar;
    static constexpr int width = 1;
    using F = float;
    using I = uint32_t;
    using M = bool;

    static F load(const float* p) { return *p; }
    static void store(float* p, F x) { *p = x; }
    static F set(float x) { return x; }
    static F add(F a, F b) { return a + b; }
    static F sub(F a, F b) { return a - b; }
    static F mul(F a, F b) { return a * b; }
    static F div(F a, F b) { return a / b; }
    static F sqrt(F x) { return __builtin_sqrtf(x); }
    static F max(F a, F b) { return a > b ? a : b; }
    static F min(F a, F b) { return a < b ? a : b; }
    static F abs(F x) { return __builtin_fabsf(x); }
    static F copy_sign(F magnitude, F x) { return __builtin_copysignf(magnitude, x); }
    static F add_if(M m, F a, F b) { return m ? a + b : a; }
    static F rough_rsqrt(F x) { return 1.0f / __builtin_sqrtf(x); }
    static F rough_rcp(F x) { return 1.0f / x; }
    static F round(F x) { return static_cast<float>(static_cast<int32_t>(x + 0.5f)); }  // of x >= 0; ties do not matter
    static F floor(F x) {  // of |x| < 2^31; the sign of zero does not matter
        F whole = static_cast<float>(static_cast<int32_t>(x));
        return whole > x ? whole - 1.0f : whole;
    }
    static M greater(F a, F b) { return a > b; }
    static M at_least(F a, F b) { return a >= b; }
    static bool all(M m) { return m; }
    static F select(M m, F a, F b) { return m ? a : b; }
    static I select(M m, I a, I b) { return m ? a : b; }
    static F bits_to_float(I x) { F y; std::memcpy(&y, &x, 4); return y; }
    static I float_to_bits(F x) { I y; std::memcpy(&y, &x, 4); return y; }
    static F to_float(I x) { return static_cast<float>(static_cast<int32_t>(x)); }
    static I to_int(F x) { return static_cast<uint32_t>(static_cast<int32_t>(x)); }  // of whole numbers
    // Ties to even, of |x| < 2^22: beside 1.5 * 2^23 the units are the lowest bits.
    static I to_nearest_int(F x) { return float_to_bits(x + 0x1.8p23f) - float_to_bits(0x1.8p23f); }

    static I load_int(const uint32_t* p) { return *p; }
    static void store_int(uint32_t* p, I x) { *p = x; }
    static I load_u8(const uint8_t* p) { return *p; }
    static I load_s8(const uint8_t* p) { return static_cast<uint32_t>(static_cast<int32_t>(static_cast<int8_t>(*p))); }
    static void store_u8(uint8_t* p, I x) { *p = static_cast<uint8_t>(x); }  // of -128 to 255
    static I load_u16(const uint16_t* p) { return *p; }
    static void store_u16(uint16_t* p, I x) { *p = static_cast<uint16_t>(x); }  // of 0 to 65535
    static I set_int(uint32_t x) { return x; }
    static I iota() { return 0; }
    static I add(I a, I b) { return a + b; }
    static I sub(I a, I b) { return a - b; }
    static I mul(I a, I b) { return a * b; }
    static I bit_and(I a, I b) { return a & b; }
    static I bit_or(I a, I b) { return a | b; }
    static I bit_xor(I a, I b) { return a ^ b; }
    static I right_by(I x, I counts) { return x >> counts; }
    template <int count> static I left(I x) { return x << count; }
    template <int count> static I right(I x) { return x >> count; }
    static I right(I x, int count) { return x >> count; }
    static I max_int(I a, I b) { return static_cast<int32_t>(a) > static_cast<int32_t>(b) ? a : b; }
    static I max_unsigned(I a, I b) { return a > b ? a : b; }
    static uint32_t reduce_max(I x) { return x; }
    static M greater_int(I a, I b) { return static_cast<int32_t>(a) > static_cast<int32_t>(b); }
    static I add_if(M m, I a, I b) { return m ? a + b : a; }
    static F gather(const float* table, I i) { return table[i]; }

    static I negate_if_negative(I x, F f) { return f < 0.0f ? 0 - x : x; }  // x is 0 where f is

    struct Table16 {  // looked up with the lowest four bits
        const float* values;
        explicit Table16(const float* p) : values(p) {}
        F operator[](I i) const { return values[i & 15]; }
    };

    struct Table8 {  // looked up with numbers below eight
        const float* values;
        explicit Table8(const float* p) : values(p) {}
        F operator[](I i) const { return values[i]; }
    };

    struct Small32 {  // of integers below 128, the first of which is 0; looked up with numbers below 32
        const int32_t* values;
        explicit Small32(const int32_t* p) : values(p) {}
        I operator[](I i) const { return static_cast<uint32_t>(values[i]); }
    };
};

#ifdef __AVX2__
struct Avx2 {
    using Rest = Scalar;
    static constexpr int width = 8;
    using F = __m256;
    using I = __m256i;
    using M = __m256;

    static F load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
    static F set(float x) { return _mm256_set1_ps(x); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F div(F a, F b) { return _mm256_div_ps(a, b); }
    static F sqrt(F x) { return _mm256_sqrt_ps(x); }
    static F max(F a, F b) { return _mm256_max_ps(a, b); }
    static F min(F a, F b) { return _mm256_min_ps(a, b); }
    static F abs(F x) { return _mm256_andnot_ps(set(-0.0f), x); }
    static F copy_sign(F magnitude, F x) { return _mm256_or_ps(magnitude, _mm256_and_ps(set(-0.0f), x)); }
    static F add_if(M m, F a, F b) { return add(a, _mm256_and_ps(m, b)); }
    static F rough_rsqrt(F x) { return _mm256_rsqrt_ps(x); }
    static F rough_rcp(F x) { return _mm256_rcp_ps(x); }
    static F round(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static F floor(F x) { return _mm256_floor_ps(x); }
    static M greater(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
    static M at_least(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
    static bool all(M m) { return _mm256_movemask_ps(m) == 0xff; }
    static F select(M m, F a, F b) { return _mm256_blendv_ps(b, a, m); }
    static I select(M m, I a, I b) { return _mm256_blendv_epi8(b, a, _mm256_castps_si256(m)); }
    static F bits_to_float(I x) { return _mm256_castsi256_ps(x); }
    static I float_to_bits(F x) { return _mm256_castps_si256(x); }
    static F to_float(I x) { return _mm256_cvtepi32_ps(x); }
    static I to_int(F x) { return _mm256_cvtps_epi32(x); }
    static I to_nearest_int(F x) { return _mm256_cvtps_epi32(x); }

    // Each element's partner `distance` away in the pair of runs that the two belong to.
    template <int distance> static F swap(F x) {
        if constexpr (distance == 4) return _mm256_permute2f128_ps(x, x, 1);
        else return _mm256_permute_ps(x, distance == 1 ? 0xb1 : 0x4e);
    }

    static I load_int(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static void store_int(uint32_t* p, I x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
    static I load_u8(const uint8_t* p) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    }
    static I load_s8(const uint8_t* p) {
        return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    }
    static void store_u8(uint8_t* p, I x) {
        x = bit_and(x, set_int(0xff));
        __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
    }
    static I load_u16(const uint16_t* p) {
        return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static void store_u16(uint16_t* p, I x) {
        __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), words);
    }
    static I set_int(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
    static I iota() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
    static I add(I a, I b) { return _mm256_add_epi32(a, b); }
    static I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
    static I sub_bytes(I a, I b) { return _mm256_sub_epi8(a, b); }
    static I mul(I a, I b) { return _mm256_mullo_epi32(a, b); }
    static I bit_and(I a, I b) { return _mm256_and_si256(a, b); }
    static I bit_or(I a, I b) { return _mm256_or_si256(a, b); }
    static I bit_xor(I a, I b) { return _mm256_xor_si256(a, b); }
    static I right_by(I x, I counts) { return _mm256_srlv_epi32(x, counts); }
    template <int count> static I left(I x) { return _mm256_slli_epi32(x, count); }
    template <int count> static I right(I x) { return _mm256_srli_epi32(x, count); }
    static I right(I x, int count) { return _mm256_srl_epi32(x, _mm_cvtsi32_si128(count)); }
    static I max_int(I a, I b) { return _mm256_max_epi32(a, b); }
    static I max_unsigned(I a, I b) { return _mm256_max_epu32(a, b); }
    static uint32_t reduce_max(I x) {
        __m128i y = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
        y = _mm_max_epi32(y, _mm_shuffle_epi32(y, 0x4e));
        return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epi32(y, _mm_shuffle_epi32(y, 0xb1))));
    }
    static M greater_int(I a, I b) { return _mm256_castsi256_ps(_mm256_cmpgt_epi32(a, b)); }
    static I add_if(M m, I a, I b) { return add(a, bit_and(_mm256_castps_si256(m), b)); }
    static F gather(const float* table, I i) { return _mm256_i32gather_ps(table, i, 4); }
    static I negate_if_negative(I x, F f) { return _mm256_sign_epi32(x, float_to_bits(f)); }

    // Four vectors at once: packing works within halves of 128 bits, and one permutation brings all in order.
    static void store_u8(uint8_t* p, const I (&x)[4]) {
        I byte = _mm256_set1_epi16(0xff);
        I low = bit_and(_mm256_packs_epi32(x[0], x[1]), byte), high = bit_and(_mm256_packs_epi32(x[2], x[3]), byte);
        I bytes = _mm256_packus_epi16(low, high);
        bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        store_int(reinterpret_cast<uint32_t*>(p), bytes);
    }
    // 32 bytes in an order that two rounds of unpacking turn into four vectors of consecutive elements.
    static I load_for_unpacking(const uint8_t* p) {
        I order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
        return _mm256_permutevar8x32_epi32(load_int(reinterpret_cast<const uint32_t*>(p)), order);
    }

    struct Table16 {
        F low, high;
        explicit Table16(const float* p) : low(load(p)), high(load(p + 8)) {}
        F operator[](I i) const {
            F bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(i, 28));  // blendv looks at the sign bit
            return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, i), _mm256_permutevar8x32_ps(high, i), bit3);
        }
    };

    struct Table8 {
        F values;
        explicit Table8(const float* p) : values(load(p)) {}
        F operator[](I i) const { return _mm256_permutevar8x32_ps(values, i); }
    };

    // Bytes of a 16-byte table, and 0 where the highest bit of the index is set: one half of the table or the other.
    struct Small32 {
        I low, high;
        explicit Small32(const int32_t* p) : low(half(p)), high(half(p + 16)) {}
        I operator[](I i) const {
            I below = _mm256_shuffle_epi8(low, add(i, set_int(0x70)));  // the upper bytes find the first value, 0
            return bit_or(below, _mm256_shuffle_epi8(high, _mm256_add_epi8(i, set_int(0x808080f0))));
        }
        I bytes(I i) const {
            I below = _mm256_shuffle_epi8(low, _mm256_add_epi8(i, set_int(0x70707070)));
            return bit_or(below, _mm256_shuffle_epi8(high, _mm256_add_epi8(i, set_int(0xf0f0f0f0))));
        }
        static I half(const int32_t* p) {
            auto at = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i)); };
            __m128i words[2] = {_mm_packus_epi32(at(0), at(4)), _mm_packus_epi32(at(8), at(12))};
            return _mm256_broadcastsi128_si256(_mm_packus_epi16(words[0], words[1]));
        }
    };

    // Any 16 values for 32 indices (bytes from `load_for_unpacking`, below 16): one look-up for each byte of fp32.
    struct Values16 {
        I bytes[4];
        explicit Values16(const float* p) {
            alignas(16) uint8_t planes[4][16];
            for (int i = 0; i < 16; ++i) {
                uint32_t bits;
                std::memcpy(&bits, p + i, 4);
                for (int b = 0; b < 4; ++b) planes[b][i] = static_cast<uint8_t>(bits >> 8 * b);
            }
            for (int b = 0; b < 4; ++b)
                bytes[b] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<__m128i*>(planes[b])));
        }
        ALWAYS_INLINE void operator()(I i, F* to) const {
            I x[4];
            for (int b = 0; b < 4; ++b) x[b] = _mm256_shuffle_epi8(bytes[b], i);
            I low[2] = {_mm256_unpacklo_epi8(x[0], x[1]), _mm256_unpackhi_epi8(x[0], x[1])};
            I high[2] = {_mm256_unpacklo_epi8(x[2], x[3]), _mm256_unpackhi_epi8(x[2], x[3])};
            for (int k = 0; k < 2; ++k) {
                to[2 * k] = bits_to_float(_mm256_unpacklo_epi16(low[k], high[k]));
                to[2 * k + 1] = bits_to_float(_mm256_unpackhi_epi16(low[k], high[k]));
            }
        }
    };
};
#endif

#ifdef __AVX512F__
struct Avx512 {
    using Rest = Scalar;
    static constexpr int width = 16;
    using F = __m512;
    using I = __m512i;
    using M = __mmask16;

    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
    static F set(float x) { return _mm512_set1_ps(x); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    static F sqrt(F x) { return _mm512_sqrt_ps(x); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static F min(F a, F b) { return _mm512_min_ps(a, b); }
    static F abs(F x) { return _mm512_andnot_ps(set(-0.0f), x); }
    static F copy_sign(F magnitude, F x) {
        I sign = set_int(0x80000000);  // sign ? x : magnitude, bit by bit
        return bits_to_float(_mm512_ternarylogic_epi32(sign, float_to_bits(x), float_to_bits(magnitude), 0xca));
    }
    static F add_if(M m, F a, F b) { return _mm512_mask_add_ps(a, m, a, b); }
    static F rough_rsqrt(F x) { return _mm512_rsqrt14_ps(x); }
    static F rough_rcp(F x) { return _mm512_rcp14_ps(x); }
    static F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static F floor(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
    static M greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
    static M at_least(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
    static bool all(M m) { return m == 0xffff; }
    static F select(M m, F a, F b) { return _mm512_mask_blend_ps(m, b, a); }
    static I select(M m, I a, I b) { return _mm512_mask_blend_epi32(m, b, a); }
    static F bits_to_float(I x) { return _mm512_castsi512_ps(x); }
    static I float_to_bits(F x) { return _mm512_castps_si512(x); }
    static F to_float(I x) { return _mm512_cvtepi32_ps(x); }
    static I to_int(F x) { return _mm512_cvtps_epi32(x); }
    static I to_nearest_int(F x) { return _mm512_cvtps_epi32(x); }

    template <int distance> static F swap(F x) {
        if constexpr (distance >= 4) return _mm512_shuffle_f32x4(x, x, distance == 4 ? 0xb1 : 0x4e);
        else return _mm512_permute_ps(x, distance == 1 ? 0xb1 : 0x4e);
    }

    static I load_int(const uint32_t* p) { return _mm512_loadu_si512(p); }
    static void store_int(uint32_t* p, I x) { _mm512_storeu_si512(p, x); }
    static I load_u8(const uint8_t* p) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static I load_s8(const uint8_t* p) {
        return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static void store_u8(uint8_t* p, I x) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
    }
    static I load_u16(const uint16_t* p) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static void store_u16(uint16_t* p, I x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x));
    }
    static I set_int(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
    static I iota() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
    static I add(I a, I b) { return _mm512_add_epi32(a, b); }
    static I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
    static I mul(I a, I b) { return _mm512_mullo_epi32(a, b); }
    static I bit_and(I a, I b) { return _mm512_and_si512(a, b); }
    static I bit_or(I a, I b) { return _mm512_or_si512(a, b); }
    static I bit_xor(I a, I b) { return _mm512_xor_si512(a, b); }
    static I right_by(I x, I counts) { return _mm512_srlv_epi32(x, counts); }
    template <int count> static I left(I x) { return _mm512_slli_epi32(x, count); }
    template <int count> static I right(I x) { return _mm512_srli_epi32(x, count); }
    static I right(I x, int count) { return _mm512_srl_epi32(x, _mm_cvtsi32_si128(count)); }
    static I max_int(I a, I b) { return _mm512_max_epi32(a, b); }
    static I max_unsigned(I a, I b) { return _mm512_max_epu32(a, b); }
    static uint32_t reduce_max(I x) { return static_cast<uint32_t>(_mm512_reduce_max_epi32(x)); }
    static M greater_int(I a, I b) { return _mm512_cmpgt_epi32_mask(a, b); }
    static I add_if(M m, I a, I b) { return _mm512_mask_add_epi32(a, m, a, b); }
    static F gather(const float* table, I i) { return _mm512_i32gather_ps(i, table, 4); }
    static I negate_if_negative(I x, F f) { return select(greater(set(0.0f), f), sub(set_int(0), x), x); }

    struct Table16 {
        F values;
        explicit Table16(const float* p) : values(load(p)) {}
        F operator[](I i) const { return _mm512_permutexvar_ps(i, values); }
    };

    using Table8 = Table16;

    struct Small32 {
        I low, high;
        explicit Small32(const int32_t* p) : low(_mm512_loadu_si512(p)), high(_mm512_loadu_si512(p + 16)) {}
        I operator[](I i) const { return _mm512_permutex2var_epi32(low, i, high); }
    };
};
#endif

// Two vectors side by side, instruction by instruction: a loop over them has two independent chains in flight where the
// processor's schedulers would hold little more than one.
template <class V>
struct Twice {
    using Rest = V;
    static constexpr int half = V::width;
    static constexpr int width = 2 * half;
    struct F { typename V::F a, b; };
    struct I { typename V::I a, b; };
    struct M { typename V::M a, b; };

    static F load(const float* p) { return {V::load(p), V::load(p + half)}; }
    static void store(float* p, F x) { V::store(p, x.a), V::store(p + half, x.b); }
    static F set(float x) { return {V::set(x), V::set(x)}; }
    static F add(F x, F y) { return {V::add(x.a, y.a), V::add(x.b, y.b)}; }
    static F sub(F x, F y) { return {V::sub(x.a, y.a), V::sub(x.b, y.b)}; }
    static F mul(F x, F y) { return {V::mul(x.a, y.a), V::mul(x.b, y.b)}; }
    static F div(F x, F y) { return {V::div(x.a, y.a), V::div(x.b, y.b)}; }
    static F sqrt(F x) { return {V::sqrt(x.a), V::sqrt(x.b)}; }
    static F max(F x, F y) { return {V::max(x.a, y.a), V::max(x.b, y.b)}; }
    static F min(F x, F y) { return {V::min(x.a, y.a), V::min(x.b, y.b)}; }
    static F abs(F x) { return {V::abs(x.a), V::abs(x.b)}; }
    static F copy_sign(F magnitude, F x) { return {V::copy_sign(magnitude.a, x.a), V::copy_sign(magnitude.b, x.b)}; }
    static F add_if(M m, F x, F y) { return {V::add_if(m.a, x.a, y.a), V::add_if(m.b, x.b, y.b)}; }
    static F rough_rsqrt(F x) { return {V::rough_rsqrt(x.a), V::rough_rsqrt(x.b)}; }
    static F rough_rcp(F x) { return {V::rough_rcp(x.a), V::rough_rcp(x.b)}; }
    static F round(F x) { return {V::round(x.a), V::round(x.b)}; }
    static F floor(F x) { return {V::floor(x.a), V::floor(x.b)}; }
    static M greater(F x, F y) { return {V::greater(x.a, y.a), V::greater(x.b, y.b)}; }
    static M at_least(F x, F y) { return {V::at_least(x.a, y.a), V::at_least(x.b, y.b)}; }
    static F select(M m, F x, F y) { return {V::select(m.a, x.a, y.a), V::select(m.b, x.b, y.b)}; }
    static I select(M m, I x, I y) { return {V::select(m.a, x.a, y.a), V::select(m.b, x.b, y.b)}; }
    static F bits_to_float(I x) { return {V::bits_to_float(x.a), V::bits_to_float(x.b)}; }
    static I float_to_bits(F x) { return {V::float_to_bits(x.a), V::float_to_bits(x.b)}; }
    static F to_float(I x) { return {V::to_float(x.a), V::to_float(x.b)}; }
    static I to_int(F x) { return {V::to_int(x.a), V::to_int(x.b)}; }
    static I to_nearest_int(F x) { return {V::to_nearest_int(x.a), V::to_nearest_int(x.b)}; }

    static I load_u8(const uint8_t* p) { return {V::load_u8(p), V::load_u8(p + half)}; }
    static I load_s8(const uint8_t* p) { return {V::load_s8(p), V::load_s8(p + half)}; }
    static void store_u8(uint8_t* p, I x) { V::store_u8(p, x.a), V::store_u8(p + half, x.b); }
    static I load_int(const uint32_t* p) { return {V::load_int(p), V::load_int(p + half)}; }
    static void store_int(uint32_t* p, I x) { V::store_int(p, x.a), V::store_int(p + half, x.b); }
    static I set_int(uint32_t x) { return {V::set_int(x), V::set_int(x)}; }
    static I iota() { return {V::iota(), V::add(V::iota(), V::set_int(half))}; }
    static I add(I x, I y) { return {V::add(x.a, y.a), V::add(x.b, y.b)}; }
    static I mul(I x, I y) { return {V::mul(x.a, y.a), V::mul(x.b, y.b)}; }
    static I bit_and(I x, I y) { return {V::bit_and(x.a, y.a), V::bit_and(x.b, y.b)}; }
    static I bit_or(I x, I y) { return {V::bit_or(x.a, y.a), V::bit_or(x.b, y.b)}; }
    static I bit_xor(I x, I y) { return {V::bit_xor(x.a, y.a), V::bit_xor(x.b, y.b)}; }
    static I sub(I x, I y) { return {V::sub(x.a, y.a), V::sub(x.b, y.b)}; }
    static I right_by(I x, I counts) { return {V::right_by(x.a, counts.a), V::right_by(x.b, counts.b)}; }
    template <int count> static I left(I x) { return {V::template left<count>(x.a), V::template left<count>(x.b)}; }
    template <int count> static I right(I x) { return {V::template right<count>(x.a), V::template right<count>(x.b)}; }
    static I right(I x, int count) { return {V::right(x.a, count), V::right(x.b, count)}; }
    static I max_int(I x, I y) { return {V::max_int(x.a, y.a), V::max_int(x.b, y.b)}; }
    static I max_unsigned(I x, I y) { return {V::max_unsigned(x.a, y.a), V::max_unsigned(x.b, y.b)}; }
    static bool all(M m) { return V::all(m.a) && V::all(m.b); }
    static uint32_t reduce_max(I x) { return V::reduce_max(V::max_int(x.a, x.b)); }
    static M greater_int(I x, I y) { return {V::greater_int(x.a, y.a), V::greater_int(x.b, y.b)}; }
    static I add_if(M m, I x, I y) { return {V::add_if(m.a, x.a, y.a), V::add_if(m.b, x.b, y.b)}; }
    static F gather(const float* table, I i) { return {V::gather(table, i.a), V::gather(table, i.b)}; }
    static I negate_if_negative(I x, F f) { return {V::negate_if_negative(x.a, f.a), V::negate_if_negative(x.b, f.b)}; }

    struct Table16 {
        typename V::Table16 table;
        explicit Table16(const float* p) : table(p) {}
        F operator[](I i) const { return {table[i.a], table[i.b]}; }
    };

    struct Table8 {
        typename V::Table8 table;
        explicit Table8(const float* p) : table(p) {}
        F operator[](I i) const { return {table[i.a], table[i.b]}; }
    };

    struct Small32 {
        typename V::Small32 table;
        explicit Small32(const int32_t* p) : table(p) {}
        I operator[](I i) const { return {table[i.a], table[i.b]}; }
    };
};

// The elements of one turn of a loop, as vectors that are worked on one after the other. With sixteen registers the
// intermediate results of one vector fill them, and the processor finds the independent work of the next by itself.
template <class V, int n>
struct Batch {
    using Part = V;
    using Rest = Batch<V, 1>;
    static constexpr int parts = n, width = n * V::width;

    static void store_u8(uint8_t* p, const typename V::I (&x)[n]) { V::store_u8(p, x); }
};

template <class V>
struct Batch<V, 1> {
    using Part = V;
    using Rest = Batch<typename V::Rest, 1>;
    static constexpr int parts = 1, width = V::width;

    static void store_u8(uint8_t* p, const typename V::I (&x)[1]) { V::store_u8(p, x[0]); }
};

#if defined(__AVX512F__)
using Widest = Avx512;
using Wide = Twice<Avx512>;
using Widest32 = Batch<Twice<Avx512>, 1>;
using Lanes16 = Avx512;
#elif defined(__AVX2__)
using Widest = Avx2;
using Wide = Twice<Twice<Avx2>>;
using Widest32 = Batch<Avx2, 4>;
using Lanes16 = Twice<Avx2>;
#else
using Widest = Scalar;
using Wide = Scalar;
using Widest32 = Batch<Scalar, 1>;
#endif

}  // namespace
