// The largest magnitude of a run of numbers.
#pragma once

#include "simd.h"

namespace {

// Bits of max |x|: as integers, NaN is above Inf and Inf above every number.
template <class V>
uint32_t absmax_of(const float* x, int64_t n) {
    auto mask = V::set_int(0x7fffffff);
    typename V::I most[2] = {V::set_int(0), V::set_int(0)};
    int64_t i = 0;
    for (; i + 2 * V::width <= n; i += 2 * V::width)
        for (int k = 0; k < 2; ++k)
            most[k] = V::max_int(most[k], V::bit_and(V::float_to_bits(V::load(x + i + k * V::width)), mask));
    uint32_t result = V::reduce_max(V::max_int(most[0], most[1]));
    for (; i < n; ++i) result = Scalar::max_int(result, Scalar::float_to_bits(x[i]) & 0x7fffffff);
    return result;
}

}  // namespace
