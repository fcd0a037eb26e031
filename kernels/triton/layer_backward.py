"""The residual layer, backward: dz with every sum over rows in one kernel, dx in another, and plain products.

    dz = drop(a g φ'(z))        ds = λ g        IS_POST: first g ← g φ'(λ s + a drop(z)), and φ' = 1 after that
    db = Σ dz    da = Σ drop(g) φ(z)    dλ = Σ g s    dc = Σ ds         sums over rows, per column
    dx = dz w + ds  (identity),  dz w + ds p  (projection)
    dw = dzᵀ x      dp = dsᵀ x
    g, y [M, S + N]   kept, dz [M, N]   s, ds [M, N], with concat [M, S]   the rest as in layer.py

The sums leave the kernel as one row per row tile, [tiles of M, N] in fp32, and sums.py adds them in that order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import Inside, Separate, SplitTile, Tile
from ..record import Recording
from ..spec import Gradients, LayerSpec, Operands, Wanted
from .activations import activate
from .launching import cdiv, launch
from .layer import descend, options, rows, skip_tensor, vector
from .layer_backward_inside import dz_and_dx, skip_of_inside
from .layer_persistent import is_described
from .philox import drop_rows
from .record import factor, fresh_rows, record, record_after
from .sums import added
from .tile import add_bias, branch_scale, load, place, product, row_tile, scale, store
from .weight_gradient import weight_gradient


@triton.jit
def _store_sum(ptr, tile, columns, n, in_n, value):
    """One row of partial sums, that of this row tile: its rows added up, at the columns n."""
    tl.store(ptr + tile * columns + n, tl.sum(value, axis=0), mask=in_n)


@triton.jit(do_not_specialize=["M", "lam", "a", "seed", "threshold", "keep_scale"])
def _dz_kernel(
    dz_ptr, ds_ptr, db_ptr, da_ptr, dlam_ptr, dc_ptr,
    g_ptr, stride_gm, kept_ptr, s_ptr,
    x_ptr, stride_xm, w_ptr, stride_wn, stride_wk, b_ptr,
    r_ptr, stride_rm, p_ptr, stride_pn, stride_pk, c_ptr,
    lam_ptr, lam, a_ptr, a, seed, threshold, keep_scale,
    M, N, K, S,
    ACTIVATION: tl.constexpr, IS_POST: tl.constexpr, IS_CONCAT: tl.constexpr, IS_PER_CHANNEL: tl.constexpr,
    DROPS: tl.constexpr, PRECISION: tl.constexpr,
    HAS_SLOPE: tl.constexpr, NEEDS_Z: tl.constexpr, NEEDS_SKIP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    lam = scale(lam_ptr, lam)

    # concat with a learned λ: the programs past the last tile of z sum over the front of g
    first_copy = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    if IS_CONCAT and dlam_ptr is not None:
        if tl.program_id(0) >= first_copy:
            m, n, in_m, in_n = place(M, S, first_copy, BLOCK_M, BLOCK_N)
            g = load(g_ptr, stride_gm, m, n, in_m, in_n)
            r = load(r_ptr, stride_rm, m, n, in_m, in_n)
            _store_sum(dlam_ptr, row_tile(S, first_copy, BLOCK_N), S, n, in_n, g * r)
            return

    # place: this program owns rows m, columns n of z
    m, n, in_m, in_n = place(M, N, 0, BLOCK_M, BLOCK_N)
    g = load(g_ptr + S, stride_gm, m, n, in_m, in_n)
    a = branch_scale(a_ptr, a, n, in_n, IS_PER_CHANNEL)
    tile = row_tile(N, 0, BLOCK_N)

    # recall: φ', or z, and the skip, from memory where kept, else computed again
    kept_slope = None
    z = None
    s = None
    if HAS_SLOPE:
        kept_slope = load(kept_ptr, N, m, n, in_m, in_n)
    if NEEDS_Z:
        if kept_ptr is not None:
            z = load(kept_ptr, N, m, n, in_m, in_n)
        else:
            z = product(x_ptr, stride_xm, w_ptr, stride_wn, stride_wk, m, n, in_m, in_n, K, BLOCK_K, PRECISION)
            z = add_bias(z, b_ptr, n, in_n)
        if DROPS:
            z = drop_rows(z, m, seed, threshold, 1.0)  # of what a dropped row has there, φ and φ' may be no numbers
    if NEEDS_SKIP:
        if p_ptr is None:
            s = load(r_ptr, stride_rm, m, n, in_m, in_n)
        elif s_ptr is not None:
            s = load(s_ptr, N, m, n, in_m, in_n)
        else:
            s = product(x_ptr, stride_xm, p_ptr, stride_pn, stride_pk, m, n, in_m, in_n, K, BLOCK_K, PRECISION)
            s = add_bias(s, c_ptr, n, in_n)

    g, gb, dz = descend(g, kept_slope, z, s, m, lam, a, seed, threshold, keep_scale, ACTIVATION, IS_POST, DROPS)

    # skip: its gradient and the sums that belong to it
    if ds_ptr is not None:
        store(ds_ptr, N, m, n, in_m, in_n, lam * g)
    if dc_ptr is not None:
        _store_sum(dc_ptr, tile, N, n, in_n, lam * g)
    if dlam_ptr is not None and not IS_CONCAT:
        _store_sum(dlam_ptr, tile, N, n, in_n, g * s)

    # branch: dz and the sums that belong to it
    store(dz_ptr, N, m, n, in_m, in_n, dz)
    if da_ptr is not None:
        _store_sum(da_ptr, tile, N, n, in_n, gb * (z if IS_POST else activate(z, ACTIVATION)))
    if db_ptr is not None:
        _store_sum(db_ptr, tile, N, n, in_n, dz)


@triton.jit(do_not_specialize=["M", "lam"])
def _dx_kernel(
    dx_ptr, dz_ptr, w_ptr, stride_wn, stride_wk, ds_ptr, stride_dsm, p_ptr, stride_pn, stride_pk, lam_ptr, lam,
    rows_ptr, unscale_ptr,
    M, N, K,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # place: this program owns rows m, columns k of dx; its products run over n
    m, k, in_m, in_k = place(M, K, 0, BLOCK_M, BLOCK_N)

    # accumulate: through the branch, then through the skip
    dx = product(dz_ptr, N, w_ptr, stride_wk, stride_wn, m, k, in_m, in_k, N, BLOCK_K, PRECISION)
    if p_ptr is not None:
        ds = product(ds_ptr, stride_dsm, p_ptr, stride_pk, stride_pn, m, k, in_m, in_k, N, BLOCK_K, PRECISION)
        skip = scale(lam_ptr, lam) * ds
        dx += skip
    elif ds_ptr is not None:
        skip = scale(lam_ptr, lam) * load(ds_ptr, stride_dsm, m, k, in_m, in_k)
        dx += skip
    else:
        skip = dx

    store(dx_ptr, K, m, k, in_m, in_k, dx)
    if rows_ptr is not None:
        has_skip: tl.constexpr = ds_ptr is not None
        dx = dx.to(dx_ptr.dtype.element_ty).to(tl.float32)  # as whoever reads it will find it
        record(rows_ptr, tl.program_id(0), unscale_ptr, dx, skip, in_m[:, None] & in_k[None, :], has_skip)


def backward(
    g: Tensor,
    operands: Operands,
    kept: Tensor | None,
    s: Tensor | None,
    spec: LayerSpec,
    wanted: Wanted,
    form: Separate | Inside,
    over_rows: SplitTile | None,
    precision: str,
    multiprocessors: int,
    recording: Recording | None = None,
) -> Gradients:
    """The wanted gradients; g [M, S + N] of any strides, operands as matrices, kept and s as forward left them."""
    x, weight, _, residual, p, _, lam, _, _ = operands
    g, x = rows(g), rows(x)
    N = weight.shape[0]
    S = g.shape[1] - N
    operands = operands._replace(x=x)
    if isinstance(form, Inside):
        dz, dx, parts = dz_and_dx(g, operands, kept, spec, wanted, form.dx, precision, multiprocessors)
        sums = added(parts, operands)
        if recording is not None and wanted.x:
            record_after(recording, dx, skip_of_inside(g, kept, operands, spec))
        ds = None
    else:
        dz, ds, sums = _dz(g, operands, kept, s, spec, wanted, form.dz, precision)

    # the skip's gradient is lam · ds: what the kernel wrote has λ in it already
    if ds is None:
        ds, fixed = (g[:, :S] if spec.skip == "concat" else g), spec.skip_scale
    else:
        lam, fixed = None, 1.0

    if isinstance(form, Separate):
        reaches_x = spec.skip in ("identity", "projection") or (spec.skip == "concat" and residual is None)
        through_skip = ds if reaches_x else None
        dx = _dx(dz, weight, through_skip, p, lam, fixed, form.dx, precision, recording) if wanted.x else None
    dresidual = _scaled(ds, lam, fixed).to(residual.dtype) if wanted.residual else None

    def product(left: Tensor, dtype: torch.dtype) -> Tensor:
        return product_over_rows(left, x, dtype, over_rows, precision, multiprocessors)

    dp = _scaled(product(ds, torch.float32), lam, fixed) if wanted.projection_weight else None
    return Gradients(
        x=dx if wanted.x else None,
        weight=product(dz, weight.dtype) if wanted.weight else None,
        bias=sums.get("bias"),
        residual=dresidual,
        projection_weight=dp.to(p.dtype) if wanted.projection_weight else None,
        projection_bias=sums.get("projection_bias"),
        skip_scale=sums.get("skip_scale"),
        branch_scale=sums.get("branch_scale"),
    )


def _dz(
    g: Tensor,
    operands: Operands,
    kept: Tensor | None,
    s: Tensor | None,
    spec: LayerSpec,
    wanted: Wanted,
    tile: Tile,
    precision: str,
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """dz [M, N]; ds [M, N] where it differs from g by more than λ in its type; the wanted column sums, in fp32."""
    x, w, b, residual, p, c, lam, a, seed = operands
    (M, K), N = x.shape, w.shape[0]
    S = g.shape[1] - N
    is_concat = spec.skip == "concat"
    has_slope = kept is not None and operands.keeps_slope
    sums_skip = is_concat and wanted.skip_scale
    r = skip_tensor(operands, spec) if sums_skip or needs_skip(spec, wanted.skip_scale, has_slope) else None
    b, c, a = vector(b), vector(c), vector(a)

    dz = x.new_empty(M, N)
    ds = None
    if _writes_ds(g, operands, spec, wanted):
        ds = x.new_empty(M, N, dtype=x.dtype if residual is None else residual.dtype)

    names = [name for name in ("bias", "branch_scale", "skip_scale", "projection_bias") if getattr(wanted, name)]
    # of concat, λ's sum is over the front of g, and the others over the rest
    fronts = {name: is_concat and name == "skip_scale" for name in names}
    into = {
        name: x.new_empty(cdiv(M, tile.BLOCK_M), S if is_front else N, dtype=torch.float32)
        for name, is_front in fronts.items()
    }

    copies = S if sums_skip else 0
    programs = cdiv(M, tile.BLOCK_M) * (cdiv(N, tile.BLOCK_N) + cdiv(copies, tile.BLOCK_N))
    given = (
        dz, ds, into.get("bias"), into.get("branch_scale"), into.get("skip_scale"), into.get("projection_bias"),
        g, g.stride(0), kept, s,
        x, x.stride(0), w, *w.stride(), b,
        r, 0 if r is None else r.stride(0), p, *((0, 0) if p is None else p.stride()), c,
        lam, spec.skip_scale, a, spec.branch_scale,
        0 if seed is None else int(seed), spec.drop_threshold, spec.keep_scale,
        M, N, K, S,
    )  # fmt: skip
    compiled_for = {
        **options(spec, a, x.dtype), "IS_CONCAT": is_concat, "PRECISION": precision, "HAS_SLOPE": has_slope,
        "NEEDS_Z": not has_slope and (spec.activation != "none" or wanted.branch_scale),
        "NEEDS_SKIP": needs_skip(spec, wanted.skip_scale, has_slope),
        "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N, "BLOCK_K": tile.BLOCK_K,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    launch(_dz_kernel, programs, given, compiled_for)

    return dz, ds, added(into, operands)


def needs_skip(spec: LayerSpec, wants_skip_scale: bool, has_slope: bool) -> bool:
    """Whether s is read: for φ' behind the addition, or for dλ (with concat, other programs do that)."""
    if spec.skip in ("none", "concat"):
        return False
    return wants_skip_scale or (spec.activates_sum and not has_slope)


def _writes_ds(g: Tensor, operands: Operands, spec: LayerSpec, wanted: Wanted) -> bool:
    """Whether ds is more than λ g: behind an activation, scaled into a residual's gradient, or of another type."""
    if spec.skip in ("none", "concat"):
        return False
    wants = wanted.residual if spec.skip == "residual" else wanted.x or wanted.projection_weight
    if spec.skip == "residual":
        differs = operands.skip_scale is not None or spec.skip_scale != 1.0
    else:
        differs = spec.skip == "projection" and g.dtype != operands.x.dtype
    return wants and (differs or spec.activates_sum)


def _dx(
    dz: Tensor,
    w: Tensor,
    ds: Tensor | None,
    p: Tensor | None,
    lam: Tensor | None,
    fixed: float,
    tile: Tile | None,
    precision: str,
    recording: Recording | None,
) -> Tensor:
    """dx [M, K] = dz w + λ ds, or dz w + λ ds p."""
    if tile is None:
        return _dx_by_library(dz, w, ds, p, lam, fixed, recording)
    (M, N), K = dz.shape, w.shape[1]
    dx = dz.new_empty(M, K)
    programs = cdiv(M, tile.BLOCK_M) * cdiv(K, tile.BLOCK_N)
    parts = None if recording is None else fresh_rows(dz, programs, 1)
    given = (
        dx, dz, w, *w.stride(), ds, 0 if ds is None else ds.stride(0), p, *((0, 0) if p is None else p.stride()),
        lam, fixed,
        parts, None if recording is None else factor(recording.unscale, dz),
        M, N, K,
    )  # fmt: skip
    compiled_for = {
        "PRECISION": precision, "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N, "BLOCK_K": tile.BLOCK_K,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    launch(_dx_kernel, programs, given, compiled_for)
    if recording is not None:
        recording.note(parts)
    return dx


def _dx_by_library(
    dz: Tensor,
    w: Tensor,
    ds: Tensor | None,
    p: Tensor | None,
    lam: Tensor | None,
    fixed: float,
    recording: Recording | None,
) -> Tensor:
    """The same by the vendor's products, which add λ ds before they round, where λ is a number."""
    if ds is None:
        dx, skip = dz @ w, None
    else:
        skip = _scaled(ds.to(dz.dtype), lam, 1.0)
        number = fixed if lam is None else 1.0
        dx = torch.addmm(skip, dz, w, beta=number) if p is None else torch.addmm(dz @ w, skip, p, alpha=number)
    if recording is not None:
        half = None if skip is None else (skip if p is None else skip @ p).float() * number
        record_after(recording, dx, half)
    return dx


def product_over_rows(
    dz: Tensor, x: Tensor, dtype: torch.dtype, tile: SplitTile | None, precision: str, multiprocessors: int
) -> Tensor:
    """dzᵀ x [N, K], accumulated in fp32 and rounded once to dtype: by our kernel, or by the vendor's library."""
    if tile is not None and not (tile.by_descriptors and not (is_described(dz) and is_described(x))):
        return weight_gradient(dz, x, dtype, tile, precision, multiprocessors)
    return library_product_over_rows(dz, x).to(dtype)


def library_product_over_rows(dz: Tensor, x: Tensor) -> Tensor:
    """dzᵀ x [N, K] in fp32, accumulated in fp32."""
    if dz.dtype == torch.float32:
        return dz.t() @ x
    if dz.is_cuda:
        return torch.mm(dz.t(), x, out_dtype=torch.float32)
    return dz.float().t() @ x.float()


def _scaled(value: Tensor, learned: Tensor | None, fixed: float) -> Tensor:
    if learned is not None:
        return value * learned
    return value if fixed == 1.0 else value * fixed
