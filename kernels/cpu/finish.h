// What follows a product: bias, φ, scales and skip, on a block of its columns.
#pragma once

#include <algorithm>

#include "activations.h"
#include "network.h"
#include "number.h"
#include "vector.h"

namespace fusedres {

template <class T>
using Finish = void (*)(int64_t rows, int64_t n, const Compute<T> *z, int64_t ldz, const Compute<T> *bias,
                        const Compute<T> *scale, Compute<T> lambda, const T *s, int64_t lds, T *y, int64_t ldy, T *slope,
                        int64_t ldslope);

// y = λ s + a φ(z + b), or φ(λ s + a (z + b)), and the slope of φ where it is kept.
template <class T, Activation A, bool IS_POST, bool KEEPS>
void finish(int64_t rows, int64_t n, const Compute<T> *__restrict z, int64_t ldz, const Compute<T> *__restrict bias,
            const Compute<T> *__restrict scale, Compute<T> lambda, const T *__restrict s, int64_t lds, T *__restrict y,
            int64_t ldy, T *__restrict slope, int64_t ldslope) {
    using C = Compute<T>;
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t i = 0; i < n; i++) {
            C inside = z[i] + bias[i];
            if constexpr (IS_POST) inside = lambda * wide(s[i]) + scale[i] * inside;
            C value;
            if constexpr (KEEPS) {
                Activated<C> both = activated<A, C>(inside);
                value = both.value;
                slope[i] = narrow<T>(both.slope);
            } else {
                value = activate<A, C>(inside);
            }
            if constexpr (!IS_POST) value = lambda * wide(s[i]) + scale[i] * value;
            y[i] = narrow<T>(value);
        }
        z += ldz, s += lds, y += ldy;
        if constexpr (KEEPS) slope += ldslope;
    }
}

constexpr int64_t FEW_COLUMNS = 3;  // beyond whole vectors: as many are quicker laid end to end than one by one

// The same for columns that fill no vector: as many rows as fit are laid end to end, where they do.
template <class T>
void finish_few_columns(Finish<T> finish, int64_t rows, int64_t n, const Compute<T> *z, int64_t ldz, const Compute<T> *bias,
                        const Compute<T> *scale, Compute<T> lambda, const T *s, int64_t lds, T *y, int64_t ldy, T *slope,
                        int64_t ldslope) {
    using C = Compute<T>;
    constexpr int64_t SIZE = 512, W = LANES<C>;
    alignas(64) C line_z[SIZE] = {}, line_bias[SIZE] = {}, line_scale[SIZE] = {};
    alignas(64) T line_s[SIZE] = {}, line_y[SIZE], line_slope[SIZE];
    const int64_t at_once = SIZE / n;
    for (int64_t first = 0; first < rows; first += at_once) {
        const int64_t some = std::min(at_once, rows - first);
        for (int64_t r = 0; r < some; r++)
            for (int64_t i = 0; i < n; i++) {
                line_z[r * n + i] = z[(first + r) * ldz + i], line_s[r * n + i] = s[(first + r) * lds + i];
                if (first == 0) line_bias[r * n + i] = bias[i], line_scale[r * n + i] = scale[i];
            }
        finish(1, (some * n + W - 1) / W * W, line_z, 0, line_bias, line_scale, lambda, line_s, 0, line_y, 0,
               slope ? line_slope : nullptr, 0);
        for (int64_t r = 0; r < some; r++)
            for (int64_t i = 0; i < n; i++) {
                y[(first + r) * ldy + i] = line_y[r * n + i];
                if (slope) slope[(first + r) * ldslope + i] = line_slope[r * n + i];
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
