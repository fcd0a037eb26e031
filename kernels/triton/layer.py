"""The residual layer, forward, in one kernel.

    z = x wᵀ + b                    y = λ s + a drop(φ(z))          IS_POST: y = φ(λ s + a drop(z))
    x [M, K]   w [N, K]   b [N]     s [M, N], one of
        r                           a tensor: a residual given, or x itself
        x pᵀ + c                    a projection, p [N, K], c [N]
    concat:  y [M, S + N] = [λ r, a drop(φ(z))],  r [M, S]; S = 0 otherwise
    λ a number;  a a number or [N];  drop: stochastic depth by rows

For backward, where their pointers are given, the projected s is written, and kept [M, N]: φ'(z), IS_POST φ' at the sum,
or z itself where a is learned. Kernels take matrices as a pointer and a row stride, the inner stride being 1; w and p
have both strides.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import Tile
from ..spec import LayerSpec, Operands
from .activations import activate, formula, slope
from .launching import cdiv, launch
from .philox import drop_rows
from .tile import add_bias, branch_scale, load, place, product, scale, store


@triton.jit(do_not_specialize=["M", "lam", "a", "seed", "threshold", "keep_scale"])
def _forward_kernel(
    y_ptr, stride_ym, kept_ptr, s_ptr,
    x_ptr, stride_xm, w_ptr, stride_wn, stride_wk, b_ptr,
    r_ptr, stride_rm, p_ptr, stride_pn, stride_pk, c_ptr,
    lam_ptr, lam, a_ptr, a, seed, threshold, keep_scale,
    M, N, K, S,
    ACTIVATION: tl.constexpr, IS_POST: tl.constexpr, IS_CONCAT: tl.constexpr, IS_PER_CHANNEL: tl.constexpr,
    DROPS: tl.constexpr, KEEPS_SLOPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    lam = scale(lam_ptr, lam)

    # concat: the programs past the last tile of z copy the skip into the front of y
    first_copy = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    if IS_CONCAT:
        if tl.program_id(0) >= first_copy:
            m, n, in_m, in_n = place(M, S, first_copy, BLOCK_M, BLOCK_N)
            r = load(r_ptr, stride_rm, m, n, in_m, in_n)
            store(y_ptr, stride_ym, m, n, in_m, in_n, lam * r)
            return

    # place: this program owns rows m, columns n of z
    m, n, in_m, in_n = place(M, N, 0, BLOCK_M, BLOCK_N)

    # accumulate: z, and the projection where there is one
    z = product(x_ptr, stride_xm, w_ptr, stride_wn, stride_wk, m, n, in_m, in_n, K, BLOCK_K, PRECISION)
    z = add_bias(z, b_ptr, n, in_n)
    s = None
    if p_ptr is not None:
        s = product(x_ptr, stride_xm, p_ptr, stride_pn, stride_pk, m, n, in_m, in_n, K, BLOCK_K, PRECISION)
        s = add_bias(s, c_ptr, n, in_n)
        if s_ptr is not None:
            store(s_ptr, N, m, n, in_m, in_n, s)
    elif r_ptr is not None and not IS_CONCAT:
        s = load(r_ptr, stride_rm, m, n, in_m, in_n)

    # finish: on the tile while it is still in registers
    a = branch_scale(a_ptr, a, n, in_n, IS_PER_CHANNEL)
    y, kept = finish(z, s, m, lam, a, seed, threshold, keep_scale, ACTIVATION, IS_POST, DROPS, KEEPS_SLOPE)
    if kept_ptr is not None:
        store(kept_ptr, N, m, n, in_m, in_n, kept)
    store(y_ptr + S, stride_ym, m, n, in_m, in_n, y)


@triton.jit
def finish(
    z, s, m, lam, a, seed, threshold, keep_scale,
    ACTIVATION: tl.constexpr, IS_POST: tl.constexpr, DROPS: tl.constexpr, KEEPS_SLOPE: tl.constexpr,
):  # fmt: skip
    """(y, what is kept for backward) of a tile of z and one of the skip s, None where there is none."""
    y = a * (z if IS_POST else activate(z, ACTIVATION))
    if DROPS:
        y = drop_rows(y, m, seed, threshold, keep_scale)
    if s is not None:
        y += lam * s
    kept = z
    if KEEPS_SLOPE:
        kept = slope(y if IS_POST else z, ACTIVATION)
    if IS_POST:
        y = activate(y, ACTIVATION)
    return y, kept


@triton.jit
def descend(
    g, kept_slope, z, s, m, lam, a, seed, threshold, keep_scale,
    ACTIVATION: tl.constexpr, IS_POST: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """The gradients of the sum of skip and branch, of the branch before its scale, and of z, from g = ∂L/∂y, on a tile.

    z and s are None where they are not needed, kept_slope where φ' comes of them. z is 0 in dropped rows.
    """
    # post: through the activation first, so that g is the gradient of the sum in either order
    if IS_POST:
        if kept_slope is not None:
            g *= kept_slope
        elif z is not None:
            v = a * z
            if DROPS:
                v = drop_rows(v, m, seed, threshold, keep_scale)
            if s is not None:
                v += lam * s
            g *= slope(v, ACTIVATION)

    gb = drop_rows(g, m, seed, threshold, keep_scale) if DROPS else g
    dz = a * gb
    if not IS_POST:
        if kept_slope is not None:
            dz *= drop_rows(kept_slope, m, seed, threshold, 1.0) if DROPS else kept_slope
        elif z is not None:
            dz *= slope(z, ACTIVATION)
    return g, gb, dz


def forward(
    operands: Operands, spec: LayerSpec, dtype: torch.dtype, tile: Tile, precision: str, keep: bool, keep_skip: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y [M, S + N] of type dtype; kept [M, N], and s [M, N] of x's type, where asked for; operands are matrices."""
    x, w, b, _, p, c, lam, a, seed = operands
    (M, K), N = x.shape, w.shape[0]
    x, r = rows(x), skip_tensor(operands, spec)
    b, c, a = vector(b), vector(c), vector(a)
    S = r.shape[1] if spec.skip == "concat" else 0

    y = x.new_empty(M, S + N, dtype=dtype)
    kept = x.new_empty(M, N, dtype=operands.kept_dtype) if keep else None
    s = x.new_empty(M, N) if keep_skip else None
    tiles = cdiv(M, tile.BLOCK_M) * (cdiv(N, tile.BLOCK_N) + cdiv(S, tile.BLOCK_N))
    given = (
        y, S + N, kept, s,
        x, x.stride(0), w, *w.stride(), b,
        r, 0 if r is None else r.stride(0), p, *((0, 0) if p is None else p.stride()), c,
        lam, spec.skip_scale, a, spec.branch_scale,
        0 if seed is None else int(seed), spec.drop_threshold, spec.keep_scale,
        M, N, K, S,
    )  # fmt: skip
    compiled_for = {
        **options(spec, a, x.dtype), "IS_CONCAT": spec.skip == "concat", "KEEPS_SLOPE": keep and operands.keeps_slope,
        "PRECISION": precision, "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N, "BLOCK_K": tile.BLOCK_K,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    launch(_forward_kernel, tiles, given, compiled_for)
    return y, kept, s


def options(spec: LayerSpec, a: Tensor | None, dtype: torch.dtype) -> dict[str, str | bool]:
    """What the kernels of a layer are compiled for, but for its skip."""
    return {
        "ACTIVATION": formula(spec.activation, dtype),
        "IS_POST": spec.order == "post",
        "IS_PER_CHANNEL": a is not None and a.dim() == 1,
        "DROPS": spec.drop_path > 0,
    }


def rows(matrix: Tensor) -> Tensor:
    """The matrix with unit inner stride: itself where it has one (slices, expanded rows), else one dense copy."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def vector(values: Tensor | None) -> Tensor | None:
    """A bias or a scale per channel, with unit stride."""
    return None if values is None else values.contiguous()


def skip_tensor(operands: Operands, spec: LayerSpec) -> Tensor | None:
    """The skip where it is a tensor in memory: the residual, or x itself; None for a projection and for no skip."""
    if spec.skip in ("none", "projection"):
        return None
    return rows(operands.x if operands.residual is None else operands.residual)
