"""A narrow residual layer, backward, in one kernel: rows of up to 128 features, which fit into a program as wholes.

    z = x wᵀ + b                dz = drop(a g φ'(z))        IS_POST: first g ← g φ'(λ s + a drop(z)), φ' = 1 after that
    dx = dz w + ds  (identity),  dz w  (no skip, residual)        ds = λ g
    dw = dzᵀ x    db = Σ dz    da = Σ drop(g) φ(z)    dλ = Σ g s                         sums over rows
    x, dx [M, K]   g, ds [M, N]   w, dw [N, K]   b, db, da, dλ [N]   s [M, N], the residual r, or x itself

A program goes through tiles of rows; w stays. A tile is read once, while the one before it is computed, z is multiplied
again, and sums stay in registers, in fp32, until the last tile. Programs leave theirs as [programs, …], and sums.py
adds them in the order of programs.

Tiles are turned, features first, [N, BLOCK_M] and [K, BLOCK_M]. So a sum over rows is one over numbers of one thread,
or of four; warps share dw among them; and no product's first operand has just been computed: Hopper would take it from
registers, which ptxas before CUDA 13.3 may use for something else meanwhile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import StackTile
from ..record import Recording
from ..spec import Gradients, LayerSpec, Operands, Wanted
from .activations import activate, slope
from .launching import cdiv, launch
from .layer import options, rows, skip_tensor, vector
from .layer_backward import needs_skip
from .philox import keeps_row
from .record import factor, fresh_rows, record
from .stack import operand, padded
from .sums import added
from .tile import branch_scale, scale, store


@triton.jit(do_not_specialize=["M", "programs", "lam", "a", "seed", "threshold", "keep_scale"])
def _backward_kernel(
    dx_ptr, ds_ptr, dw_ptr, db_ptr, da_ptr, dlam_ptr,
    g_ptr, stride_gm, x_ptr, stride_xm, w_ptr, stride_wn, stride_wk, b_ptr, r_ptr, stride_rm,
    lam_ptr, lam, a_ptr, a, seed, threshold, keep_scale,
    rows_ptr, unscale_ptr,
    M, programs, N: tl.constexpr, K: tl.constexpr,
    ACTIVATION: tl.constexpr, IS_POST: tl.constexpr, IS_IDENTITY: tl.constexpr, IS_PER_CHANNEL: tl.constexpr,
    DROPS: tl.constexpr, PRECISION: tl.constexpr, NEEDS_Z: tl.constexpr, NEEDS_SKIP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    i = tl.arange(0, BLOCK_M).to(tl.int64)
    n, k = tl.arange(0, BLOCK_N).to(tl.int64), tl.arange(0, BLOCK_K).to(tl.int64)
    in_n, in_k = n < N, k < K
    stride_gm = N if stride_gm is None else stride_gm
    stride_xm = K if stride_xm is None else stride_xm
    stride_rm = N if stride_rm is None else stride_rm

    # hold: what all tiles share
    lam = scale(lam_ptr, lam)
    a = tl.trans(branch_scale(a_ptr, a, n, in_n, True)) if IS_PER_CHANNEL else scale(a_ptr, a)
    w = tl.load(w_ptr + n[:, None] * stride_wn + k[None, :] * stride_wk, mask=in_n[:, None] & in_k[None, :], other=0.0)
    if b_ptr is not None:
        b = tl.load(b_ptr + n, mask=in_n, other=0.0).to(tl.float32)[:, None]
    dw = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    db = tl.zeros((BLOCK_N, 1), tl.float32)
    da = tl.zeros((BLOCK_N, 1), tl.float32)
    dlam = tl.zeros((BLOCK_N, 1), tl.float32)

    for tile in tl.range(program, tl.cdiv(M, BLOCK_M), programs, num_stages=STAGES):
        # place: rows first + i
        first = tl.cast(tile, tl.int64) * BLOCK_M
        in_m = i < M - first
        # (x by columns, since in narrow tiles both products ask the same of its memory only so; g and s by rows,
        # since a load that nothing but a change of layout reads would wait in registers, not in shared memory)
        x = _load_turned(x_ptr + first * stride_xm, stride_xm, i, k, in_m, in_k)
        g = tl.trans(operand(g_ptr + first * stride_gm, stride_gm, i, n, in_m, in_n)).to(tl.float32)
        if NEEDS_SKIP:
            s = x if IS_IDENTITY else tl.trans(operand(r_ptr + first * stride_rm, stride_rm, i, n, in_m, in_n))
            s = s.to(tl.float32)
        if DROPS:
            keeps = keeps_row(first + i, seed, threshold)[None, :]

        # recall: z, 0 in its padding
        if NEEDS_Z:
            z = tl.dot(w, x, input_precision=PRECISION)
            if b_ptr is not None:
                z += b
            if N < BLOCK_N:
                z = tl.where(in_n[:, None], z, 0.0)
            if DROPS:
                z = tl.where(keeps, z, 0.0)  # of what a dropped row has there, φ and φ' may be no numbers

        # post: through the activation first, so that g is the gradient of the sum in either order
        if IS_POST and NEEDS_Z:
            v = a * z
            if DROPS:
                v = tl.where(keeps, v * keep_scale, 0.0)
            if NEEDS_SKIP:
                v += lam * s
            g *= slope(v, ACTIVATION)

        # skip: its gradient, and λ's
        if ds_ptr is not None:
            _store_turned(ds_ptr + first * N, N, i, n, in_m, in_n, lam * g)
        if dlam_ptr is not None:
            dlam += tl.sum(g * s, axis=1, keep_dims=True)
        skip = lam * g if IS_IDENTITY else tl.zeros((BLOCK_K, BLOCK_M), tl.float32)

        # branch: dz, and the sums that belong to it
        if DROPS:
            g = tl.where(keeps, g * keep_scale, 0.0)
        if da_ptr is not None:
            da += tl.sum(g * (z if IS_POST else activate(z, ACTIVATION)), axis=1, keep_dims=True)
        dz = a * g
        if NEEDS_Z and not IS_POST:
            dz *= slope(z, ACTIVATION)
        if db_ptr is not None:
            db += tl.sum(dz, axis=1, keep_dims=True)

        # products: dw, and what goes on to x
        dz_operand = dz.to(x.dtype)
        if dw_ptr is not None:
            dw = tl.dot(x, tl.trans(dz_operand), dw, input_precision=PRECISION)
        if dx_ptr is not None:
            dx = tl.dot(tl.trans(w), dz_operand, skip, input_precision=PRECISION)
            _store_turned(dx_ptr + first * K, K, i, k, in_m, in_k, dx)
            if rows_ptr is not None:
                tl.debug_barrier()  # what the last tile has left in this program's row is there for all of its threads
                dx = dx.to(dx_ptr.dtype.element_ty).to(tl.float32)  # as whoever reads it will find it
                record(rows_ptr, program, unscale_ptr, dx, skip, in_k[:, None] & in_m[None, :], IS_IDENTITY)

    # finish: this program's sums
    own = tl.cast(program, tl.int64) * N
    if dw_ptr is not None:
        _store_turned(dw_ptr + own * K, K, n, k, in_n, in_k, dw)
    if db_ptr is not None:
        tl.store(db_ptr + own + n[:, None], db, mask=in_n[:, None])
    if da_ptr is not None:
        tl.store(da_ptr + own + n[:, None], da, mask=in_n[:, None])
    if dlam_ptr is not None:
        tl.store(dlam_ptr + own + n[:, None], dlam, mask=in_n[:, None])


@triton.jit
def _load_turned(ptr, stride_m, m, n, in_m, in_n):
    """The tile [n, m] of a matrix [m, n] with unit inner stride, in its own type, 0 outside it."""
    return tl.load(ptr + n[:, None] + m[None, :] * stride_m, mask=in_n[:, None] & in_m[None, :], other=0.0)


@triton.jit
def _store_turned(ptr, stride_m, m, n, in_m, in_n, value):
    """Round a tile [n, m] once, to the type of the matrix [m, n], and write it."""
    store(ptr, stride_m, m, n, in_m, in_n, tl.trans(value))


def backward(
    g: Tensor,
    operands: Operands,
    spec: LayerSpec,
    wanted: Wanted,
    tile: StackTile,
    programs: int,
    precision: str,
    recording: Recording | None = None,
) -> Gradients:
    """The wanted gradients; g [M, N] of any strides, operands as matrices, the skip none, identity or residual."""
    g, x = rows(g), rows(operands.x)
    _, w, b, residual, _, _, lam, a, seed = operands
    (M, K), N = x.shape, w.shape[0]
    b, a = vector(b), vector(a)
    is_identity = spec.skip == "identity"
    reads_skip = needs_skip(spec, wanted.skip_scale, False)
    r = skip_tensor(operands, spec) if reads_skip and not is_identity else None
    programs = min(programs, cdiv(M, tile.BLOCK_M))

    dx = x.new_empty(M, K) if wanted.x else None
    ds = residual.new_empty(M, N) if _writes_ds(operands, spec, wanted) else None
    names = [name for name in ("bias", "branch_scale", "skip_scale") if getattr(wanted, name)]
    into = {name: x.new_empty(programs, N, dtype=torch.float32) for name in names}
    if wanted.weight:
        into["weight"] = x.new_empty(programs, N, K, dtype=torch.float32)
    parts = None if recording is None or not wanted.x else fresh_rows(x, programs, 1)

    given = (
        dx, ds, into.get("weight"), into.get("bias"), into.get("branch_scale"), into.get("skip_scale"),
        g, _row_stride(g), x, _row_stride(x), w, *w.stride(), b, r, None if r is None else _row_stride(r),
        lam, spec.skip_scale, a, spec.branch_scale,
        0 if seed is None else int(seed), spec.drop_threshold, spec.keep_scale,
        parts, None if parts is None else factor(recording.unscale, x),
        M, programs, N, K,
    )  # fmt: skip
    compiled_for = {
        **options(spec, a, x.dtype), "IS_IDENTITY": is_identity, "PRECISION": precision,
        "NEEDS_Z": spec.activation != "none" or wanted.branch_scale, "NEEDS_SKIP": reads_skip,
        "BLOCK_M": tile.BLOCK_M, "BLOCK_N": padded(N), "BLOCK_K": padded(K), "STAGES": tile.stages,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    launch(_backward_kernel, programs, given, compiled_for)

    if parts is not None:
        recording.note(parts)
    sums = added(into, operands)
    return Gradients(
        x=dx,
        weight=sums.get("weight"),
        bias=sums.get("bias"),
        residual=(g.to(residual.dtype) if ds is None else ds) if wanted.residual else None,
        projection_weight=None,
        projection_bias=None,
        skip_scale=sums.get("skip_scale"),
        branch_scale=sums.get("branch_scale"),
    )


def _row_stride(matrix: Tensor) -> int | None:
    """None where rows are dense: their stride, the width, is known to the compiler, which loads more at a time then."""
    return None if matrix.stride(0) == matrix.shape[1] else matrix.stride(0)


def _writes_ds(operands: Operands, spec: LayerSpec, wanted: Wanted) -> bool:
    """Whether a residual's gradient is more than g: behind an activation, or scaled."""
    is_scaled = operands.skip_scale is not None or spec.skip_scale != 1.0
    return wanted.residual and (is_scaled or spec.activates_sum)
