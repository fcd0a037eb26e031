"""The residual layer, forward, by the vendor's products; what stands around them in one kernel, on any chip.

    z = x wᵀ + b, s = x pᵀ + c by the library        y = λ s + a drop(φ(z))        IS_POST: y = φ(λ s + a drop(z))
    z, s, y, kept [M, N]        the rest as in layer.py

Backward is that of layer_backward.py, whose dz kernel multiplies nothing where something is kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import Elementwise
from ..spec import LayerSpec, Operands
from .launching import cdiv, launch
from .layer import finish, options, skip_tensor, vector
from .tile import branch_scale, load, place, scale, store


@triton.jit(do_not_specialize=["M", "lam", "a", "seed", "threshold", "keep_scale"])
def _finish_kernel(
    y_ptr, kept_ptr, z_ptr, s_ptr, stride_sm, lam_ptr, lam, a_ptr, a, seed, threshold, keep_scale,
    M, N,
    ACTIVATION: tl.constexpr, IS_POST: tl.constexpr, IS_PER_CHANNEL: tl.constexpr, DROPS: tl.constexpr,
    KEEPS_SLOPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    m, n, in_m, in_n = place(M, N, 0, BLOCK_M, BLOCK_N)
    z = load(z_ptr, N, m, n, in_m, in_n)
    s = None
    if s_ptr is not None:
        s = load(s_ptr, stride_sm, m, n, in_m, in_n)
    y, kept = finish(
        z, s, m, scale(lam_ptr, lam), branch_scale(a_ptr, a, n, in_n, IS_PER_CHANNEL), seed, threshold, keep_scale,
        ACTIVATION, IS_POST, DROPS, KEEPS_SLOPE,
    )  # fmt: skip
    if kept_ptr is not None:
        store(kept_ptr, N, m, n, in_m, in_n, kept)
    store(y_ptr, N, m, n, in_m, in_n, y)


def forward(
    operands: Operands, spec: LayerSpec, dtype: torch.dtype, tile: Elementwise, keep: bool, keep_skip: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y [M, N] of type dtype, kept and s [M, N] where asked for; operands are matrices, no skip concatenates."""
    x, w, b, _, p, c, lam, a, seed = operands
    z = _linear(x, w, b)
    s = skip_tensor(operands, spec) if p is None else _linear(x, p, c)
    M, N = z.shape
    a = vector(a)

    # z is nobody's where it is not what is kept: y then takes its place
    keeps_slope = keep and operands.keeps_slope
    keeps_z = keep and not keeps_slope
    y = z if dtype == z.dtype and not keeps_z else z.new_empty(M, N, dtype=dtype)
    slope = z.new_empty(M, N, dtype=operands.kept_dtype) if keeps_slope else None
    given = (
        y, slope, z, s, 0 if s is None else s.stride(0), lam, spec.skip_scale, a, spec.branch_scale,
        0 if seed is None else int(seed), spec.drop_threshold, spec.keep_scale,
        M, N,
    )  # fmt: skip
    compiled_for = {
        **options(spec, a, x.dtype), "KEEPS_SLOPE": keeps_slope,
        "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N, "num_warps": tile.warps,
    }  # fmt: skip
    launch(_finish_kernel, cdiv(M, tile.BLOCK_M) * cdiv(N, tile.BLOCK_N), given, compiled_for)
    return y, z if keeps_z else slope, s if keep_skip else None


def _linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return x @ w.t() if b is None else torch.addmm(b, x, w.t())
