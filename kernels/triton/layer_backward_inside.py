"""The residual layer, backward, on chips that copy tiles by descriptors: dz is made inside the product that reads it.

    dz = drop(a g φ'(z))        dx = dz w + λ g  (identity),  dz w  (no skip, or one whose gradient is g)
    db = Σ dz    da = Σ drop(g) φ(z)    dλ = Σ g s        IS_POST: first g ← g φ' at the sum, and φ' = 1 after that
    g, kept, dz [M, N]   dx [M, K]   w [N, K]   s [M, N]        the rest as in layer_backward.py

A program owns a tile of dx and makes the dz of its rows as the product goes through them. The programs of the first
columns write it, for dw, and its sums over rows: a row of partial sums per tile of rows, added in that order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import PersistentTile
from ..spec import LayerSpec, Operands, Wanted
from .activations import activate
from .launching import cdiv, launch
from .layer import descend, options, skip_tensor, vector
from .layer_persistent import columns, described, grouped, is_described
from .philox import drop_rows
from .tile import branch_scale, scale


@triton.jit(do_not_specialize=["M", "programs", "lam", "a", "seed", "threshold", "keep_scale"])
def _kernel(
    dx, dz, g, kept, w, s, g_skip, kept_skip, db_ptr, da_ptr, dlam_ptr,
    lam_ptr, lam, a_ptr, a, seed, threshold, keep_scale,
    M, N, K, programs,
    ACTIVATION: tl.constexpr, IS_POST: tl.constexpr, IS_PER_CHANNEL: tl.constexpr, DROPS: tl.constexpr,
    HAS_SLOPE: tl.constexpr, PRECISION: tl.constexpr, IS_ONE_ACROSS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    lam = scale(lam_ptr, lam)
    for tile in range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tl.cdiv(K, BLOCK_N), programs):
        m0, k0 = grouped(tile, M, K, BLOCK_M, BLOCK_N, GROUP)

        # accumulate: dx through the branch
        if IS_ONE_ACROSS:
            total = through_branch(
                dz, g, kept, w, s, db_ptr, da_ptr, dlam_ptr, lam, a_ptr, a, seed, threshold, keep_scale, m0, k0, N,
                ACTIVATION, IS_POST, IS_PER_CHANNEL, DROPS, HAS_SLOPE, PRECISION, True, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            if k0 == 0:
                total = through_branch(
                    dz, g, kept, w, s, db_ptr, da_ptr, dlam_ptr, lam, a_ptr, a, seed, threshold, keep_scale, m0, k0, N,
                    ACTIVATION, IS_POST, IS_PER_CHANNEL, DROPS, HAS_SLOPE, PRECISION, True, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
            else:
                total = through_branch(
                    dz, g, kept, w, s, None, None, None, lam, a_ptr, a, seed, threshold, keep_scale, m0, k0, N,
                    ACTIVATION, IS_POST, IS_PER_CHANNEL, DROPS, HAS_SLOPE, PRECISION, False, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip

        # finish: through the skip, one part after another
        for part in tl.static_range(PARTS):
            at = k0 + part * (BLOCK_N // PARTS)
            out = columns(total, part, PARTS)
            if g_skip is not None:
                ds = g_skip.load([m0, at]).to(tl.float32)
                if IS_POST and kept_skip is not None:
                    ds *= kept_skip.load([m0, at]).to(tl.float32)
                out += lam * ds
            dx.store([m0, at], out.to(dx.dtype))


@triton.jit
def through_branch(
    dz, g, kept, w, s, db_ptr, da_ptr, dlam_ptr, lam, a_ptr, a, seed, threshold, keep_scale, m0, k0, N,
    ACTIVATION: tl.constexpr, IS_POST: tl.constexpr, IS_PER_CHANNEL: tl.constexpr, DROPS: tl.constexpr,
    HAS_SLOPE: tl.constexpr, PRECISION: tl.constexpr, WRITES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dz w on the tile of rows m0, columns k0; WRITES: dz and the sums over these rows, too."""
    m = tl.cast(m0, tl.int64) + tl.arange(0, BLOCK_M)
    sums = tl.cast(m0 // BLOCK_M, tl.int64) * N
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for n0 in range(0, N, BLOCK_K):
        n = n0 + tl.arange(0, BLOCK_K)
        in_n = n < N
        kept_slope = None
        z = None
        skip = None
        if kept is not None:
            if HAS_SLOPE:
                kept_slope = kept.load([m0, n0]).to(tl.float32)
            else:
                z = kept.load([m0, n0]).to(tl.float32)
                if DROPS:
                    z = drop_rows(z, m, seed, threshold, 1.0)  # of a dropped row's, φ and φ' may be no numbers
        if s is not None and WRITES:
            skip = s.load([m0, n0]).to(tl.float32)
        scale_n = branch_scale(a_ptr, a, n, in_n, IS_PER_CHANNEL)
        at_sum, at_branch, at_z = descend(
            g.load([m0, n0]).to(tl.float32), kept_slope, z, skip, m, lam, scale_n, seed, threshold, keep_scale,
            ACTIVATION, IS_POST, DROPS,
        )  # fmt: skip
        operand = at_z.to(dz.dtype)
        total = tl.dot(operand, w.load([n0, k0]), total, input_precision=PRECISION)
        if WRITES:
            dz.store([m0, n0], operand)
            if db_ptr is not None:
                tl.store(db_ptr + sums + n, tl.sum(at_z, axis=0), mask=in_n)
            if da_ptr is not None:
                branch = z if IS_POST else activate(z, ACTIVATION)
                tl.store(da_ptr + sums + n, tl.sum(at_branch * branch, axis=0), mask=in_n)
            if dlam_ptr is not None:
                tl.store(dlam_ptr + sums + n, tl.sum(at_sum * skip, axis=0), mask=in_n)
    return total


def dz_and_dx(
    g: Tensor,
    operands: Operands,
    kept: Tensor | None,
    spec: LayerSpec,
    wanted: Wanted,
    tile: PersistentTile,
    precision: str,
    multiprocessors: int,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """dz [M, N], dx [M, K], and the wanted sums over rows in fp32, by name, in parts [tiles of M, N].

    The skip is none, an identity, or a residual whose gradient is λ g; where a is learned, φ is before the sum.
    """
    _, w, _, _, _, _, lam, a, seed = operands
    (M, N), K = g.shape, w.shape[1]
    g, a = g if is_described(g) else g.contiguous(), vector(a)
    s = skip_tensor(operands, spec) if wanted.skip_scale else None
    dz, dx = operands.x.new_empty(M, N), operands.x.new_empty(M, K)

    names = [name for name in ("bias", "branch_scale", "skip_scale") if getattr(wanted, name)]
    into = {name: dz.new_empty(cdiv(M, tile.BLOCK_M), N, dtype=torch.float32) for name in names}
    part, step = [tile.BLOCK_M, tile.BLOCK_N // tile.parts], [tile.BLOCK_M, tile.BLOCK_K]
    has_skip = spec.skip == "identity"
    tiles = cdiv(M, tile.BLOCK_M) * cdiv(K, tile.BLOCK_N)
    programs = min(tiles, tile.residents * multiprocessors)
    given = (
        described(dx, part), described(dz, step), described(g, step), described(kept, step),
        described(w, [tile.BLOCK_K, tile.BLOCK_N]), described(s, step),
        described(g, part) if has_skip else None,
        described(kept, part) if has_skip and spec.activates_sum else None,
        into.get("bias"), into.get("branch_scale"), into.get("skip_scale"),
        lam, spec.skip_scale, a, spec.branch_scale,
        0 if seed is None else int(seed), spec.drop_threshold, spec.keep_scale,
        M, N, K, programs,
    )  # fmt: skip
    compiled_for = {
        **options(spec, a, operands.x.dtype), "HAS_SLOPE": operands.keeps_slope, "PRECISION": precision,
        "IS_ONE_ACROSS": tile.BLOCK_N >= K,
        "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N, "BLOCK_K": tile.BLOCK_K,
        "PARTS": tile.parts, "GROUP": tile.group, "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    launch(_kernel, programs, given, compiled_for)
    return dz, dx, into


def skip_of_inside(g: Tensor, kept: Tensor | None, operands: Operands, spec: LayerSpec) -> Tensor | None:
    """What of dx came through an identity, λ g or λ g φ', in fp32."""
    if spec.skip != "identity":
        return None
    skip = g.float() * (spec.skip_scale if operands.skip_scale is None else operands.skip_scale)
    return skip * kept.float() if spec.activates_sum else skip
