// The rules of Lion, SGD and AdEMAMix (numerics/lion.py, sgd.py, ademamix.py), each operation rounded by itself. Compiled
// once for each instruction set, with DS_QUANT_ISA its name and -ffp-contract=off.
#include "elementwise.h"
#include "simd.h"

namespace {

// A rule is made of the scalars in the order in which elementwise/cpu.py sends them.
template <class V>
struct Lion {
    using F = typename V::F;
    static constexpr int num_states = 1;
    F beta1, rest1, beta2, rest2, decay, lr, zero = V::set(0.0f), one = V::set(1.0f), minus_one = V::set(-1.0f);

    explicit Lion(const float* s)
        : beta1(V::set(s[0])), rest1(V::set(s[1])), beta2(V::set(s[2])), rest2(V::set(s[3])),
          decay(V::set(s[4])), lr(V::set(s[5])) {}

    ALWAYS_INLINE void operator()(F& param, F grad, F (&states)[num_states]) const {
        grad = V::add(grad, V::mul(grad, zero));
        auto direction = V::add(V::mul(states[0], beta1), V::mul(grad, rest1));
        auto sign = V::select(V::greater(direction, zero), one, V::select(V::greater(zero, direction), minus_one, zero));
        sign = V::add(sign, V::mul(direction, zero));
        param = V::sub(V::mul(param, decay), V::mul(sign, lr));
        states[0] = V::add(V::mul(states[0], beta2), V::mul(grad, rest2));
    }
};

template <class V>
struct SGD {
    using F = typename V::F;
    static constexpr int num_states = 1;
    F momentum, kept, weight_decay, lr, from_grad, from_buffer;

    explicit SGD(const float* s)
        : momentum(V::set(s[0])), kept(V::set(s[1])), weight_decay(V::set(s[2])), lr(V::set(s[3])),
          from_grad(V::set(s[4])), from_buffer(V::set(s[5])) {}

    ALWAYS_INLINE void operator()(F& param, F grad, F (&states)[num_states]) const {
        grad = V::add(grad, V::mul(param, weight_decay));
        states[0] = V::add(V::mul(states[0], momentum), V::mul(grad, kept));
        auto update = V::add(V::mul(grad, from_grad), V::mul(states[0], from_buffer));
        param = V::sub(param, V::mul(update, lr));
    }
};

template <class V>
struct AdEMAMix {
    using F = typename V::F;
    static constexpr int num_states = 3;
    F beta1, rest1, beta2, rest2, beta3, rest3, alpha, eps, decay, lr, fast, correction;
    F zero = V::set(0.0f), largest = V::set(0x1p63f), least = V::set(-0x1p63f);

    explicit AdEMAMix(const float* s)
        : beta1(V::set(s[0])), rest1(V::set(s[1])), beta2(V::set(s[2])), rest2(V::set(s[3])),
          beta3(V::set(s[4])), rest3(V::set(s[5])), alpha(V::set(s[6])), eps(V::set(s[7])),
          decay(V::set(s[8])), lr(V::set(s[9])), fast(V::set(s[10])), correction(V::set(s[11])) {}

    ALWAYS_INLINE void operator()(F& param, F grad, F (&states)[num_states]) const {
        grad = V::add(V::min(V::max(grad, least), largest), V::mul(grad, zero));
        states[0] = V::add(V::mul(states[0], beta1), V::mul(grad, rest1));
        states[1] = V::add(V::mul(states[1], beta3), V::mul(grad, rest3));
        states[2] = V::add(V::mul(states[2], beta2), V::mul(V::mul(grad, grad), rest2));
        auto sum = V::add(V::mul(states[0], fast), V::mul(states[1], alpha));
        auto update = V::div(sum, V::add(V::mul(V::sqrt(states[2]), correction), eps));
        param = V::sub(V::mul(param, decay), V::mul(update, lr));
    }
};

template <class V, template <class> class Kind>
void step(float* param, const float* grad, float* const* states, int64_t n, const float* scalars) {
    constexpr int num_states = Kind<V>::num_states;
    const Kind<V> rule(scalars);
    int64_t i = 0;
    for (; i + V::width <= n; i += V::width) {
        typename V::F values[num_states];
        for (int k = 0; k < num_states; ++k) values[k] = V::load(states[k] + i);
        auto updated = V::load(param + i);
        rule(updated, V::load(grad + i), values);
        V::store(param + i, updated);
        for (int k = 0; k < num_states; ++k) V::store(states[k] + i, values[k]);
    }
    if constexpr (V::width > 1) {
        float* rest[num_states];
        for (int k = 0; k < num_states; ++k) rest[k] = states[k] + i;
        step<typename V::Rest, Kind>(param + i, grad + i, rest, n - i, scalars);
    }
}

const Rule RULES[] = {
    {step<Widest, Lion>, Lion<Widest>::num_states},
    {step<Widest, SGD>, SGD<Widest>::num_states},
    {step<Widest, AdEMAMix>, AdEMAMix<Widest>::num_states},
};

}  // namespace

extern "C" const Rule* DS_QUANT_JOIN(ds_quant_rules_, DS_QUANT_ISA)() { return RULES; }
