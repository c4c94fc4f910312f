// Random bits from a counter: numerics/random.py has the definition.
#pragma once

#include <cstdint>

#include "common.h"
#include "simd.h"

namespace {

template <class V>
ALWAYS_INLINE typename V::I mix_rest(typename V::I x) {
    x = V::mul(x, V::set_int(0x21f0aaad));
    x = V::bit_xor(x, V::template right<15>(x));
    x = V::mul(x, V::set_int(0x735a2d97));
    return V::bit_xor(x, V::template right<15>(x));
}

template <class V>
ALWAYS_INLINE typename V::I mix(typename V::I x) {
    return mix_rest<V>(V::bit_xor(x, V::template right<16>(x)));
}

// Multiples of 2^-24 in [0, 1), as integers below 2^24, of elements that follow each other (`uniform`). The high words of
// their indices are the one that the constructor is given.
template <class V>
struct Uniform {
    typename V::I key0, key1;

    Uniform(const uint32_t key[2], uint32_t high_word)
        : key0(V::set_int(key[0])), key1(V::set_int(key[1] + high_word * 0x1e3779b1u)) {}

    // Of the elements index + 0, 1, ... (width).
    ALWAYS_INLINE typename V::I operator()(uint64_t index) const {
        auto number = V::add(V::set_int(static_cast<uint32_t>(index)), V::iota());
        auto bits = mix<V>(V::add(mix<V>(V::bit_xor(number, key0)), key1));
        return V::template right<8>(bits);
    }
};

// Multiples of 2^-16 in [0, 1), as integers below 2^16, of elements that follow each other (`uniform16`): an element
// and the one 16 further on share a word of bits. All words have the high word that the constructor is given.
template <class V>
struct Uniform16 {
    typename V::I key0, key1;

    Uniform16(const uint32_t key[2], uint32_t high_word)
        : key0(V::set_int(key[0])), key1(V::set_int(key[1] + high_word * 0x1e3779b1u)) {}

    // Of the elements index + 0, 1, ... (width).
    ALWAYS_INLINE typename V::I operator()(uint64_t index) const {
        auto number = V::add(V::set_int(index & 31), V::iota());
        auto of_pair = V::template left<4>(V::template right<5>(number));
        auto word = V::bit_or(of_pair, V::bit_and(number, V::set_int(15)));
        word = V::add(word, V::set_int(static_cast<uint32_t>(index >> 5 << 4)));
        auto bits = mix<V>(V::add(mix<V>(V::bit_xor(word, key0)), key1));
        return V::bit_and(V::right_by(bits, V::bit_and(number, V::set_int(16))), V::set_int(0xffff));
    }
};

// The words of 32 elements, index a multiple of 32: half the work.
template <class V>
struct Words16 {
    typename V::I key1;
    uint32_t key0;

    Words16(const uint32_t key[2], uint32_t high_word)
        : key1(V::set_int(key[1] + high_word * 0x1e3779b1u)), key0(key[0]) {}

    ALWAYS_INLINE typename V::I operator()(uint64_t index) const {
        // The number of the lane is in the four lowest bits only: the first step of `mix` is the same for all.
        uint32_t word = static_cast<uint32_t>(index >> 1) ^ key0;
        auto bits = mix_rest<V>(V::bit_xor(V::set_int(word ^ word >> 16), V::iota()));
        return mix<V>(V::add(bits, key1));
    }
};

template <class V>
ALWAYS_INLINE typename Twice<V>::I halves_of(typename V::I words) {
    return {V::bit_and(words, V::set_int(0xffff)), V::template right<16>(words)};
}

// Of the elements of a batch.
template <class V>
struct Uniform16<Batch<V, 1>> : Uniform16<V> {
    using Uniform16<V>::Uniform16;

    ALWAYS_INLINE void operator()(uint64_t index, typename V::I* to) const {
        to[0] = static_cast<const Uniform16<V>&>(*this)(index);
    }
};

#if defined(__AVX512F__)
template <>
struct Uniform16<Twice<Avx512>> : Words16<Avx512> {
    using Words16<Avx512>::Words16;

    ALWAYS_INLINE Twice<Avx512>::I operator()(uint64_t index) const {
        return halves_of<Avx512>(static_cast<const Words16<Avx512>&>(*this)(index));
    }
};
#elif defined(__AVX2__)
template <>
struct Uniform16<Batch<Avx2, 4>> : Words16<Twice<Avx2>> {
    using Words16<Twice<Avx2>>::Words16;

    ALWAYS_INLINE void operator()(uint64_t index, Avx2::I* to) const {
        auto found = halves_of<Twice<Avx2>>(static_cast<const Words16<Twice<Avx2>>&>(*this)(index));
        to[0] = found.a.a, to[1] = found.a.b, to[2] = found.b.a, to[3] = found.b.b;
    }
};
#endif

inline void absorb(uint32_t key[2], uint32_t number, uint32_t word) {
    key[0] = mix<Scalar>((key[0] + (number + 1) * 0x9e3779b9u) ^ word);
    key[1] = mix<Scalar>((key[1] + (number + 1) * 0xc2b2ae35u) ^ word);
}

inline void derive_key(uint32_t key[2], uint64_t stream) {
    absorb(key, 10, static_cast<uint32_t>(stream));
    absorb(key, 11, static_cast<uint32_t>(stream >> 32));
}

}  // namespace
