// What follows a product: bias, φ, scales and skip, on a block of its columns.
#pragma once

#include "activations.h"
#include "network.h"
#include "number.h"

namespace fusedres {

template <class T>
using Finish = void (*)(int64_t rows, int64_t n, const Compute<T> *z, int64_t ldz, const Compute<T> *bias,
                        const Compute<T> *scale, Compute<T> lambda, const T *s, int64_t lds, T *y, int64_t ldy, T *slope,
                        int64_t ldslope);

// y = λ s + a φ(z + b), or φ(λ s + a (z + b)), and the slope of φ where it is kept.
template <class T, Activation A, bool IS_POST, bool KEEPS>
void finish(int64_t rows, int64_t n, const Compute<T> *z, int64_t ldz, const Compute<T> *__restrict bias,
            const Compute<T> *__restrict scale, Compute<T> lambda, const T *s, int64_t lds, T *y, int64_t ldy, T *slope,
            int64_t ldslope) {
    using C = Compute<T>;
    for (int64_t r = 0; r < rows; r++) {
        const C *__restrict zr = z + r * ldz;
        const T *__restrict sr = s + r * lds;
        T *__restrict yr = y + r * ldy;
        T *__restrict slope_r = KEEPS ? slope + r * ldslope : nullptr;
        for (int64_t i = 0; i < n; i++) {
            C inside = zr[i] + bias[i];
            if constexpr (IS_POST) inside = lambda * wide(sr[i]) + scale[i] * inside;
            C value;
            if constexpr (KEEPS) {
                Activated<C> both = activated<A, C>(inside);
                value = both.value;
                slope_r[i] = narrow<T>(both.slope);
            } else {
                value = activate<A, C>(inside);
            }
            if constexpr (!IS_POST) value = lambda * wide(sr[i]) + scale[i] * value;
            yr[i] = narrow<T>(value);
        }
    }
}

template <class T, Activation A>
Finish<T> finish_of(bool is_post, bool keeps) {
    if constexpr (A == Activation::none) return finish<T, A, false, false>;
    if (is_post) return keeps ? finish<T, A, true, true> : finish<T, A, true, false>;
    return keeps ? finish<T, A, false, true> : finish<T, A, false, false>;
}

template <class T>
Finish<T> finish_of(Activation activation, bool is_post, bool keeps) {
    switch (activation) {
        case Activation::gelu: return finish_of<T, Activation::gelu>(is_post, keeps);
        case Activation::gelu_tanh: return finish_of<T, Activation::gelu_tanh>(is_post, keeps);
        case Activation::relu: return finish_of<T, Activation::relu>(is_post, keeps);
        case Activation::silu: return finish_of<T, Activation::silu>(is_post, keeps);
        case Activation::tanh: return finish_of<T, Activation::tanh>(is_post, keeps);
        case Activation::sin: return finish_of<T, Activation::sin>(is_post, keeps);
        case Activation::none: break;
    }
    return finish_of<T, Activation::none>(is_post, keeps);
}

}  // namespace fusedres
