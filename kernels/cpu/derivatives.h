// Derivatives of φ up to the third, and their products with other numbers: what is left of a network, beside its matrix
// products, where its gradients are differentiated again.
//
//     p = φ⁽ᵏ⁾(z) f₁ … fₖ        dz = φ⁽ᵏ⁺¹⁾(z) f₁ … fₖ v        dfᵢ = φ⁽ᵏ⁾(z) v ∏_{j≠i} fⱼ        v = ∂L/∂p,  k ≤ 2
//
//     gelu               φ'' = (2 - z²) ϕ    φ''' = z (z² - 4) ϕ                        ϕ = exp(-z²/2) / √2π
//     silu, gelu_tanh    φ'' = z σ'' + 2 σ'  φ''' = z σ''' + 3 σ''                      σ of v(z), by the chain rule
//     sin                φ'' = -sin z        φ''' = -cos z
#pragma once

#include <algorithm>

#include "activations.h"
#include "parallel.h"

namespace fusedres {

template <Activation A, int K, class C>
inline C derivative(C z) {
    using namespace elementary;
    if constexpr (K == 0) {
        return activated<A>(z).value;
    } else if constexpr (K == 1) {
        return activated<A>(z).slope;
    } else if constexpr (A == Activation::gelu) {
        C x = distance(z, 13.28f, 40.0), xx = x * x;
        C e = C(0.39894228040143268) * exp_minus(C(0.5) * x, x);
        return K == 2 ? (2 - xx) * e : (z < 0 ? -x : x) * (xx - 4) * e;
    } else if constexpr (A == Activation::silu || A == Activation::gelu_tanh) {
        constexpr bool is_silu = A == Activation::silu;
        constexpr C a = is_silu ? 1 : C(1.5957691216057308), cubic = is_silu ? 0 : C(0.044715);  // v = a (z + cubic z³)
        C x = is_silu ? distance(z, 88.0f, 800.0) : distance(z, 10.03f, 25.0);
        C e = is_silu ? exp_minus(x, C(1)) : exp_minus(a * x, 1 + cubic * (x * x));
        C less = 1 / (1 + e), p = e * less * less, w = (e - 1) * less;  // σ' and 1 - 2 σ at v(x)
        C v1 = a + 3 * a * cubic * (x * x), v2 = 6 * a * cubic * x, v3 = 6 * a * cubic;
        C first = p * v1, second = p * (w * v1 * v1 + v2);
        if constexpr (K == 2) return x * second + 2 * first;
        C third = p * ((1 - 6 * p) * v1 * v1 * v1 + 3 * w * v1 * v2 + v3);
        C odd = x * third + 3 * second;
        return z < 0 ? -odd : odd;
    } else {
        static_assert(A == Activation::sin);
        Activated<C> s = sine(z);
        return K == 2 ? -s.value : -s.slope;
    }
}

// φ⁽ᴷ⁾ of each of n numbers.
using Derivative = void (*)(int64_t n, const float *__restrict z, float *__restrict to);

template <Activation A, int K>
void derivatives(int64_t n, const float *__restrict z, float *__restrict to) {
    for (int64_t i = 0; i < n; i++) to[i] = derivative<A, K, float>(z[i]);
}

template <Activation A>
Derivative derivative_of(int order) {
    constexpr Derivative by_order[] = {derivatives<A, 0>, derivatives<A, 1>, derivatives<A, 2>, derivatives<A, 3>};
    return by_order[order];
}

inline Derivative derivative_of(Activation activation, int order) {
    switch (activation) {
        case Activation::gelu: return derivative_of<Activation::gelu>(order);
        case Activation::gelu_tanh: return derivative_of<Activation::gelu_tanh>(order);
        case Activation::silu: return derivative_of<Activation::silu>(order);
        default: return derivative_of<Activation::sin>(order);
    }
}

void multiply(const Products &call) {
    constexpr int64_t PIECE = 1024;
    const int order = call.order;
    const Derivative own = derivative_of(call.activation, order);
    const Derivative next = derivative_of(call.activation, order + 1);
    auto product = [&](int64_t first, int64_t n, float *__restrict to, bool times_v, int without) {
        for (int j = 0; j < order; j++)
            if (j != without)
                for (int64_t i = 0; i < n; i++) to[i] *= call.factors[j][first + i];
        if (times_v)
            for (int64_t i = 0; i < n; i++) to[i] *= call.v[first + i];
    };
    together(call.threads, [&](const Team &team) {
        const Team::Share share = team.share((call.count + PIECE - 1) / PIECE);
        for (int64_t first = share.first * PIECE; first < std::min(share.last * PIECE, call.count); first += PIECE) {
            const int64_t n = std::min(PIECE, call.count - first);
            auto write = [&](float *to, Derivative derivative, bool times_v, int without) {
                if (!to) return;
                derivative(n, call.z + first, to + first);
                product(first, n, to + first, times_v, without);
            };
            write(call.p, own, false, -1);
            write(call.dz, next, true, -1);
            for (int j = 0; j < order; j++) write(call.dfactors[j], own, true, j);
        }
    });
}

}  // namespace fusedres
