"""φ and φ' on a tile in fp32: tile in, tile out, no memory.

gelu       z Φ(z),  Φ(z) = (1 + erf(z/√2)) / 2         Hendrycks and Gimpel, "Gaussian error linear units" (2016)
gelu_tanh  z (1 + tanh(√(2/π) (z + 0.044715 z³))) / 2  the same paper's approximation
silu       z σ(z),  σ(z) = 1 / (1 + exp(-z))
relu, tanh, sin, none

gelu_short is gelu where it is rounded to 16 bits: Φ to 1e-5 of itself wherever float32 holds it, tails too, in half the
instructions; the slope costs two more. Φ(-|z|) = exp(-z²/2) P(t), t = 1 / (1 + c |z|), after Abramowitz and Stegun,
"Handbook of Mathematical Functions" (1964), 7.1.26; P fitted for the least relative error up to |z| = 14.

Constants stand to the right of tiles: Triton's interpreter makes no tile of a constexpr times a tile.
"""

import torch
import triton
import triton.language as tl

INV_SQRT_2 = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
CUBIC = tl.constexpr(0.044715)


def formula(activation: str, dtype: torch.dtype) -> str:
    """By which φ is computed in a kernel that rounds it to this type."""
    return "gelu_short" if activation == "gelu" and dtype.itemsize == 2 else activation


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        return 0.5 * z * (1 + tl.erf(z * INV_SQRT_2))
    elif ACTIVATION == "gelu_short":
        return z * short_cdf(z)
    elif ACTIVATION == "gelu_tanh":
        return 0.5 * z * (1 + tanh((z + z * z * z * CUBIC) * SQRT_2_OVER_PI))
    elif ACTIVATION == "relu":
        return tl.where(z < 0, 0.0, z)  # NaN stays NaN, as in torch; tl.maximum would drop it
    elif ACTIVATION == "silu":
        return z / (1 + tl.exp(-z))
    elif ACTIVATION == "tanh":
        return tanh(z)
    elif ACTIVATION == "sin":
        return tl.sin(z)
    else:
        tl.static_assert(ACTIVATION == "none")
        return z


@triton.jit
def slope(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        return 0.5 * (1 + tl.erf(z * INV_SQRT_2)) + z * INV_SQRT_2PI * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "gelu_short":
        return short_cdf(z) + z * INV_SQRT_2PI * bell(z)
    elif ACTIVATION == "gelu_tanh":
        t = tanh((z + z * z * z * CUBIC) * SQRT_2_OVER_PI)
        return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * SQRT_2_OVER_PI * (1 + z * z * CUBIC * 3)
    elif ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, 1.0)
    elif ACTIVATION == "silu":
        s = 1 / (1 + tl.exp(-z))
        return s * (1 + z * (1 - s))
    elif ACTIVATION == "tanh":
        t = tanh(z)
        return 1 - t * t
    elif ACTIVATION == "sin":
        return tl.cos(z)
    else:
        tl.static_assert(ACTIVATION == "none")
        return tl.full(z.shape, 1.0, tl.float32)


@triton.jit
def tanh(u):
    """Cephes' tanhf: an odd polynomial below 0.625, where the exponential form would cancel, that form above."""
    v = u * u
    p = -5.70498872745e-3 * v + 2.06390887954e-2
    p = p * v - 5.37397155531e-2
    p = p * v + 1.33314422036e-1
    p = p * v - 3.33332819422e-1
    near = u + u * v * p
    magnitude = 1 - 2 / (tl.exp(2 * tl.abs(u)) + 1)
    far = tl.where(u < 0, -magnitude, magnitude)
    return tl.where(v < 0.390625, near, far)


@triton.jit
def short_cdf(z):
    """Φ(z). The square is for the reciprocal square root, one instruction where a division is five."""
    w = tl.abs(z) * 0.309 + 1
    t = tl.rsqrt(w * w)
    p = t * -0.0747228246 + 0.185119877
    p = p * t + 0.0114478949
    p = p * t + 0.135002234
    p = p * t + 0.11965907
    p = p * t + 0.123491642
    tail = p * t * bell(z)
    return tl.where(z > 0, 1 - tail, tail)


@triton.jit
def bell(z):
    """exp(-z²/2)."""
    return tl.exp2(z * z * -0.7213475204444817)
