// φ and φ' of one number without branches, so that a loop over it becomes SIMD of any width.
//
//     gelu       z Φ(z),  Φ(z) = (1 + erf(z/√2)) / 2         Hendrycks and Gimpel, "Gaussian error linear units" (2016)
//     gelu_tanh  z σ(2u),  u = √(2/π) (z + 0.044715 z³)      the same paper's approximation; σ(2u) = (1 + tanh u) / 2
//     silu       z σ(z),  σ(z) = 1 / (1 + exp(-z))
//     relu, tanh, sin, none
//
// The first three are z p(z) with p(-z) = 1 - p(z). They are computed from the left tail, x = |z|, q = p(-x), where
// 1 + erf and 1 + tanh would cancel:
//
//     φ(z) = max(z, 0) - x q         φ'(-x) = d,  φ'(x) = 1 - d
//     gelu                           q = e R(x),  d = e (R(x) - x/√2π)         e = exp(-x²/2)
//     silu, gelu_tanh                q = e / (1 + e),  d = q (1 - x v' / (1 + e))     e = exp(-v), v = x or 2u(x)
//
// NaN gives NaN (but relu' = 1, as in torch) and ±inf the limits, where torch's gelu and silu may give NaN; sin of ±inf
// is NaN. double asks libm. float has minimax fits of its own, made by reweighted least squares (Lawson) to erfcx,
// exp, expm1, sin and cos in double; their errors are relative to the function named. gelu's tail may be off by 1e-7 (1 + x²/2)
// of itself, where 1 + erf loses more.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "network.h"

namespace fusedres {

template <class C>
struct Activated {
    C value, slope;
};

namespace elementary {

inline uint32_t bits_of(float value) { return __builtin_bit_cast(uint32_t, value); }
inline uint64_t bits_of(double value) { return __builtin_bit_cast(uint64_t, value); }
inline float of_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }

// a b + c, rounded once where the machine has such an instruction.
#if defined(__FMA__) || defined(__FP_FAST_FMAF)
constexpr bool HAS_FUSED = true;
inline float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
constexpr bool HAS_FUSED = false;
inline float fused(float a, float b, float c) { return a * b + c; }
#endif

// |z| up to a bound that keeps inf out of the formulas; NaN stays NaN.
inline float distance(float z, float bound, double) { return std::abs(z) > bound ? bound : std::abs(z); }
inline double distance(double z, float, double bound) { return std::abs(z) > bound ? bound : std::abs(z); }

struct Decay {
    float power, drop;
};

// exp(-v) = power (1 - drop), v = a b from 0 to 88, where the power has become 0: power 2ⁿ, drop 1 - exp(-r),
// r = v + n log 2.
inline Decay decay(float a, float b) {
    constexpr float to_integer = 0x1.8p23f + 127;  // added to a float leaves its nearest integer and an exponent's bias
    constexpr float log2_high = 0x1.62e4p-1f;      // times n exact
    constexpr float log2_low = 0x1.7f7d1cp-20f;
    float biased = to_integer - a * b * 1.44269504f;
    float n = biased - to_integer;
    float power = of_bits(bits_of(biased) << 23);
    float r = fused(a, b, n * log2_high) + n * log2_low;
    float s = -1.388251643e-3f * r + 8.366547131e-3f;  // drop = r - r² s, error 1.3e-8
    s = s * r - 4.16672007e-2f;
    s = s * r + 1.666654342e-1f;
    s = 0.5f - r * s;
    return {power, r - r * r * s};
}

// exp(-a b), a b ≥ 0.
inline float exp_minus(float a, float b) {
    Decay e = decay(a, b);
    return e.power - e.power * e.drop;
}
inline double exp_minus(double a, double b) {
    double v = a * b, e = std::exp(-v);
    return e - e * std::fma(a, b, -v);
}

// exp(-x²/2), 0 ≤ x ≤ 13.28, where it has become 0: 2⁻ᵗ = power (1 - f p), t = n + f. Its error, 1e-7 (1 + x²/2), grows as
// Φ(-x), its only use, becomes less.
inline float bell(float x) {
    constexpr float to_integer = 0x1.8p23f + 127;
    constexpr float half_log2_e = 0.72134752f;
    float xx = x * x;
    float biased = to_integer - xx * half_log2_e;
    float power = of_bits(bits_of(biased) << 23);
    float f = xx * half_log2_e + (biased - to_integer);
    float p = 1.3264645315e-3f * f - 9.6715764479e-3f;  // error 9e-8
    p = p * f + 5.550734516e-2f;
    p = p * f - 2.4022241111e-1f;
    p = p * f + 6.931469769e-1f;
    return power - power * (f * p);
}

// Φ(-x) exp(x²/2), 0 ≤ x ≤ 13.28, error 2.2e-8 (1 + 2 x²).
inline float mills_ratio(float x) {
    float p = 1.3663844577e-2f * x + 1.0492343744e-1f;
    p = p * x + 3.3605644121e-1f;
    p = p * x + 0.49999998881f;
    float q = 3.4264958726e-2f * x + 2.6253846636e-1f;
    q = q * x + 8.827535014e-1f;
    q = q * x + 1.4699957778f;
    q = q * x + 1;
    return p / q;
}

// tanh x = (1 - e) / (1 + e), e = exp(-2x): the quotient, then what rounding took from its two sides and from itself. Where
// that rest cannot be had, the slope is 4 e / (1 + e)².
inline Activated<float> tanh(float z) {
    float x = distance(z, 44.0f, 0.0);
    Decay e = decay(x, 2);
    float less = 1 - e.power, more = 1 + e.power;
    float over = less + e.power * e.drop, under = more - e.power * e.drop;
    float over_rest = (1 - less - e.power) + (less - over + e.power * e.drop);
    float under_rest = (1 - more + e.power) + (more - under - e.power * e.drop);
    float inverse = 1 / under, quotient = over * inverse;
    float rest = fused(-quotient, under, over) + (over_rest - quotient * under_rest);
    float t = quotient + rest * inverse, t_rest = (quotient - t) + rest * inverse;
    float slope = HAS_FUSED ? (1 - t * t) - 2 * t * t_rest : 4 * inverse * inverse * (e.power - e.power * e.drop);
    return {std::copysign(t, z), slope};
}
inline Activated<double> tanh(double z) {
    double t = std::tanh(z), c = std::cosh(z);
    return {t, t * t < 0.25 ? 1 - t * t : 1 / (c * c)};
}

// z = n π/2 + r. Floats beyond 2³⁰ are further than a turn apart; they count as 0.
inline Activated<float> sine(float z) {
    constexpr double to_integer = 0x1.8p52;
    double angle = std::abs(z) > 0x1p30f ? z * 0 : z;  // of ±inf NaN
    double shifted = angle * 0.63661977236758134 + to_integer;
    double exact = angle - (shifted - to_integer) * 1.5707963267948966;
    float r = float(exact);
    uint32_t quarter = uint32_t(bits_of(shifted));
    float rr = r * r;
    float s = -1.95149577e-4f * rr + 8.33215841e-3f;  // sin, error 4e-9
    s = s * rr - 1.666665457e-1f;
    s = r + r * rr * s;
    float c = 2.443278511e-5f * rr - 1.388731306e-3f;  // cos, error 1e-10
    c = c * rr + 4.16666456e-2f;
    c = c * rr - 0.5f;
    c = 1 + c * rr;
    bool swapped = quarter & 1;
    uint32_t sign_of_sin = quarter << 30 & 0x80000000u, sign_of_cos = (quarter + 1) << 30 & 0x80000000u;
    return {of_bits(bits_of(swapped ? c : s) ^ sign_of_sin), of_bits(bits_of(swapped ? s : c) ^ sign_of_cos)};
}
inline Activated<double> sine(double z) { return {std::sin(z), std::cos(z)}; }

// From φ's left tail to φ: see above.
template <class C>
inline Activated<C> mirrored(C z, C x, C q, C d) {
    return {(z < 0 ? 0 : z) - x * q, z < 0 ? d : 1 - d};
}

}  // namespace elementary

// φ(z), φ'(z); where the slope is not used, its computation goes away.
template <Activation A, class C>
inline Activated<C> activated(C z) {
    using namespace elementary;
    if constexpr (A == Activation::gelu) {
        constexpr C inv_sqrt_2pi = C(0.39894228040143268);
        C x = distance(z, 13.28f, 40.0);
        if constexpr (std::is_same_v<C, float>) {
            C e = bell(x), ratio = mills_ratio(x);
            return mirrored(z, x, e * ratio, e * (ratio - x * inv_sqrt_2pi));
        } else {
            C e = exp_minus(C(0.5) * x, x), q = C(0.5) * std::erfc(x * C(0.70710678118654752));
            return mirrored(z, x, q, q - x * e * inv_sqrt_2pi);
        }
    } else if constexpr (A == Activation::gelu_tanh || A == Activation::silu) {
        constexpr C a = C(1.5957691216057308), cubic = C(0.044715);  // 2 √(2/π)
        constexpr bool is_silu = A == Activation::silu;
        C x = is_silu ? distance(z, 88.0f, 800.0) : distance(z, 10.03f, 25.0);
        C e = is_silu ? exp_minus(x, C(1)) : exp_minus(a * x, 1 + cubic * (x * x));
        C growth = is_silu ? C(1) : a + 3 * a * cubic * (x * x);
        C p = 1 / (1 + e), q = e * p;
        return mirrored(z, x, q, q - x * growth * (q * p));
    } else if constexpr (A == Activation::tanh) {
        return elementary::tanh(z);
    } else if constexpr (A == Activation::sin) {
        return sine(z);
    } else if constexpr (A == Activation::relu) {
        return {z < 0 ? 0 : z, C(z <= 0 ? 0 : 1)};
    } else {
        static_assert(A == Activation::none);
        return {z, 1};
    }
}

// φ(z).
template <Activation A, class C>
inline C activate(C z) {
    return activated<A>(z).value;
}

}  // namespace fusedres
