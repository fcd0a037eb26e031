"""A run of L residual layers of equal width, backward, in one kernel.

    dz = drop(a g φ'(z))        IS_POST: first g ← g φ'(λ h + a drop(z)), and φ' = 1 after that
    db = Σ dz    da = Σ drop(g) φ(z)    dλ = Σ g h         sums over rows, per layer and column
    dw = dzᵀ h              g ← λ g + dz w                 from the last layer down; dx = g after the first
    g, x, dx [M, d]   the rest as in stack.py

A program goes through tiles of rows, each from the last layer down to the first, with g in fp32 registers; every h is
read once. Between kept h's it first climbs again, into scratch memory of its own [every, BLOCK_M, d] in x's type.

Where products take their operands from memory (stack.py), every h is kept, at least for a segment, and read twice;
dz is written, all of them for dw, else each over the one before.

Sums are each program's own, fp32 [programs, L, …], added to in the order of its tiles, and by sums.py in the order of
programs. dw has two forms: summed like the others (dw_ptr), or a library's product over rows, of dz [L, M, d] (dz_ptr).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import StackTile, StackTiles
from ..record import Recording
from ..spec import Gradients, Run, Wanted
from .activations import activate, slope
from .launching import cdiv, launch
from .layer import rows
from .layer_backward import library_product_over_rows
from .philox import drop_rows
from .record import factor, fresh_rows, record
from .stack import (
    ALL_REGISTERS,
    at_layer,
    branch_scale,
    climb,
    forward_into,
    keeps_any,
    of_layer,
    operand,
    options,
    padded,
    parameters,
    product,
    weight,
)
from .sums import add_rows
from .tile import load, store
from .tile import product as product_from_memory

SUMS = ("bias", "branch_scale", "skip_scale")  # over rows, by layer and column


@triton.jit(do_not_specialize=["M", "L", "every", "programs", "lam", "a", "threshold", "keep_scale"])
def _backward_kernel(
    dx_ptr, dz_ptr, dw_ptr, db_ptr, da_ptr, dlam_ptr,
    g_ptr, stride_gm, kept_ptr, scratch_ptr, x_ptr, stride_xm, w_ptr, b_ptr,
    lam_ptr, lam, a_ptr, a, seed_ptr, threshold_ptr, threshold, keep_scale_ptr, keep_scale,
    rows_ptr, unscale_ptr,
    M, L, every, programs, d,
    ACTIVATION: tl.constexpr, IS_POST: tl.constexpr, HAS_SKIP: tl.constexpr, IS_PER_CHANNEL: tl.constexpr,
    PRECISION: tl.constexpr, NEEDS_Z: tl.constexpr, HAS_EVERY_DZ: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    i = tl.arange(0, BLOCK_M).to(tl.int64)
    n = tl.arange(0, BLOCK_D).to(tl.int64)
    in_n = n < WIDTH
    size = tl.cast(M, tl.int64) * WIDTH
    dz_size = size if HAS_EVERY_DZ else 0
    if scratch_ptr is not None:
        scratch_ptr += program * tl.cast(every, tl.int64) * (BLOCK_M * WIDTH)

    for tile in range(program, tl.cdiv(M, BLOCK_M), programs):
        # place: rows m; what earlier tiles have left in this program's memory is there for all of its threads
        tl.debug_barrier()
        m = tl.cast(tile, tl.int64) * BLOCK_M + i
        in_m = m < M
        g = load(g_ptr, stride_gm, m, n, in_m, in_n)

        for segment in range(tl.cdiv(L, every)):
            first = (tl.cdiv(L, every) - 1 - segment) * every
            last = tl.minimum(first + every, L)

            # climb: from a kept h through the segment's layers, unless all are kept
            if scratch_ptr is not None:
                h = operand(*rows_of_layer(x_ptr, stride_xm, kept_ptr, first // every, size, WIDTH), m, n, in_m, in_n)
                for layer in range(first, last):
                    store(scratch_ptr + (layer - first) * (BLOCK_M * WIDTH), WIDTH, i, n, in_m, in_n, h)
                    h = climb(
                        h, None, d, layer, m, n, in_m, in_n, w_ptr, b_ptr,
                        lam_ptr, lam, a_ptr, a, seed_ptr, threshold_ptr, threshold, keep_scale_ptr, keep_scale,
                        ACTIVATION, IS_POST, HAS_SKIP, IS_PER_CHANNEL, PRECISION, WIDTH, BLOCK_K,
                    )  # fmt: skip
                tl.debug_barrier()

            for back in range(last - first):
                layer = last - 1 - back
                h_ptr, stride_hm = rows_of_layer(x_ptr, stride_xm, kept_ptr, layer, size, WIDTH)
                if scratch_ptr is not None:
                    h = operand(scratch_ptr + (layer - first) * (BLOCK_M * WIDTH), WIDTH, i, n, in_m, in_n)
                else:
                    h = operand(h_ptr, stride_hm, m, n, in_m, in_n)
                g = descend(
                    g, h, h_ptr, stride_hm, d, layer, m, n, in_m, in_n, w_ptr, b_ptr,
                    lam_ptr, lam, a_ptr, a, seed_ptr, threshold_ptr, threshold, keep_scale_ptr, keep_scale,
                    dz_ptr, dw_ptr, db_ptr, da_ptr, dlam_ptr, rows_ptr, unscale_ptr,
                    tl.cast(program, tl.int64) * L + layer, tile >= programs, dz_size,
                    ACTIVATION, IS_POST, HAS_SKIP, IS_PER_CHANNEL, PRECISION, NEEDS_Z, WIDTH, BLOCK_K,
                )  # fmt: skip
            if scratch_ptr is not None:
                tl.debug_barrier()

        if dx_ptr is not None:
            store(dx_ptr, WIDTH, m, n, in_m, in_n, g)


@triton.jit
def descend(
    g, h, h_ptr, stride_hm, d, layer, m, n, in_m, in_n, w_ptr, b_ptr,
    lam_ptr, lam, a_ptr, a, seed_ptr, threshold_ptr, threshold, keep_scale_ptr, keep_scale,
    dz_ptr, dw_ptr, db_ptr, da_ptr, dlam_ptr, rows_ptr, unscale_ptr, row, is_later, dz_size,
    ACTIVATION: tl.constexpr, IS_POST: tl.constexpr, HAS_SKIP: tl.constexpr, IS_PER_CHANNEL: tl.constexpr,
    PRECISION: tl.constexpr, NEEDS_Z: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """∂/∂h_l of the rows m from their g = ∂/∂h_{layer+1}; row: where this program and layer have their sums."""
    w = None if BLOCK_K > 0 else weight(w_ptr, layer, n, in_n, WIDTH)
    a = branch_scale(a_ptr, a, layer, n, in_n, IS_PER_CHANNEL, WIDTH)
    lam = of_layer(lam_ptr, lam, layer)
    turns = 1
    if seed_ptr is not None:
        seed, threshold = tl.load(seed_ptr + layer), of_layer(threshold_ptr, threshold, layer)
        keep_scale = of_layer(keep_scale_ptr, keep_scale, layer)
        turns = keeps_any(m, in_m, seed, threshold)

    # recall: z, in no turn where the tile drops all its rows, else in one
    if NEEDS_Z:
        z = tl.zeros(h.shape, tl.float32)
        for _ in range(turns):
            z = product(h, w, h_ptr, stride_hm, d, w_ptr, b_ptr, layer, m, n, in_m, in_n, PRECISION, WIDTH, BLOCK_K)
        if seed_ptr is not None:
            z = drop_rows(z, m, seed, threshold, 1.0)  # of what a dropped row has there, φ and φ' may be no numbers

    # post: through the activation first, so that g is the gradient of the sum in either order
    if IS_POST and NEEDS_Z:
        v = a * z
        if seed_ptr is not None:
            v = drop_rows(v, m, seed, threshold, keep_scale)
        if HAS_SKIP:
            v += lam * h.to(tl.float32)
        g *= slope(v, ACTIVATION)

    # skip: its gradient, and λ's
    if dlam_ptr is not None:
        add_sum(dlam_ptr, row, n, in_n, g * h.to(tl.float32), is_later, WIDTH)
    ds = lam * g if HAS_SKIP else tl.zeros(h.shape, tl.float32)
    skip = ds

    # branch: dz and the sums that belong to it
    if seed_ptr is not None:
        g = drop_rows(g, m, seed, threshold, keep_scale)
    if da_ptr is not None:
        add_sum(da_ptr, row, n, in_n, g * (z if IS_POST else activate(z, ACTIVATION)), is_later, WIDTH)
    dz = a * g
    if NEEDS_Z and not IS_POST:
        dz *= slope(z, ACTIVATION)
    if db_ptr is not None:
        add_sum(db_ptr, row, n, in_n, dz, is_later, WIDTH)
    dz_operand = dz.to(h.dtype)
    if dz_ptr is not None:
        dz_ptr += layer * dz_size
        if BLOCK_K > 0:
            tl.debug_barrier()  # all have read what was there
        store(dz_ptr, WIDTH, m, n, in_m, in_n, dz_operand)
        if BLOCK_K > 0:
            tl.debug_barrier()  # all of dz is there

    # products: dw, and what goes on down
    for _ in range(turns):
        if dw_ptr is not None:
            dw = tl.dot(tl.trans(dz_operand), h, input_precision=PRECISION)
            own = dw_ptr + row * (WIDTH * WIDTH) + n[:, None] * WIDTH + n[None, :]
            add(own, dw, in_n[:, None] & in_n[None, :], is_later if seed_ptr is None else True)
        if BLOCK_K > 0:
            w_l = at_layer(w_ptr, layer, WIDTH)
            ds += product_from_memory(dz_ptr, WIDTH, w_l, 1, WIDTH, m, n, in_m, in_n, d, BLOCK_K, PRECISION)
        else:
            if PRECISION == "ieee" and h.dtype == tl.float32 and h.shape[1] >= 64:
                w = weight(w_ptr, layer, n, in_n, WIDTH)  # again: kept so long, exact fp32 spills 120 bytes on sm_90
            ds = tl.dot(dz_operand, w, ds, input_precision=PRECISION)
    in_tile = in_m[:, None] & in_n[None, :]
    if rows_ptr is not None:
        found = tl.where(layer == 0, ds.to(h.dtype).to(tl.float32), ds)  # dx as whoever reads it will find it
        record(rows_ptr, row, unscale_ptr, found, skip, in_tile, HAS_SKIP)
    return tl.where(in_tile, ds, 0.0)


@triton.jit
def rows_of_layer(x_ptr, stride_xm, kept_ptr, i, size, WIDTH: tl.constexpr):
    """Where the i-th of x and the kept h's begins, and its row stride."""
    return tl.where(i == 0, x_ptr, kept_ptr + (i - 1) * size), tl.where(i == 0, stride_xm, WIDTH)


@triton.jit
def add_sum(ptr, row, n, in_n, value, is_later, WIDTH: tl.constexpr):
    """Add a tile's sum over rows, per column, to one row of partial sums."""
    add(ptr + row * WIDTH + n, tl.sum(value, axis=0), in_n, is_later)


@triton.jit
def add(ptr, value, mask, is_later):
    """Add to memory that this program alone owns. What was there before its first tile is no number."""
    before = tl.load(ptr, mask=mask & is_later, other=0.0)
    tl.store(ptr, before + value, mask=mask)


def backward(
    g: Tensor,
    x: Tensor,
    kept: Tensor,
    run: Run,
    wanted: Wanted,
    tiles: StackTiles,
    precision: str,
    keep_every: int,
    programs: int,
    sums_weight: bool,
    recording: Recording | None = None,
) -> Gradients:
    """The wanted gradients; g [M, d] of any strides, kept as forward left it.

    sums_weight: dw is summed in the kernel, else a product over rows of dz and all h's. Where not all of them are kept,
    that goes by segments, each filled by a forward kernel: 2 keep_every matrices like x at a time.
    """
    reads_memory = tiles.backward.BLOCK_K > 0
    sums = _room_for_sums(run, wanted)
    if keep_every == 1 or (not reads_memory and (sums_weight or not wanted.weight)):
        dx = _descend(
            g, x, kept, run, wanted, tiles.backward, precision, keep_every, programs, sums_weight, x.dtype, sums,
            recording,
        )  # fmt: skip
    else:
        dx = _descend_by_segments(g, x, kept, run, wanted, tiles, precision, keep_every, programs, sums, recording)
    return Gradients(
        x=dx if wanted.x else None,
        weight=sums.get("weight"),
        bias=sums.get("bias"),
        residual=None,
        projection_weight=None,
        projection_bias=None,
        skip_scale=_like(run.skip_scale, sums["skip_scale"]) if wanted.skip_scale else None,
        branch_scale=_like(run.branch_scale, sums["branch_scale"]) if wanted.branch_scale else None,
    )


def _room_for_sums(run: Run, wanted: Wanted) -> dict[str, Tensor]:
    """The gradients that are sums over rows, to be written; of a number for each layer, in fp32 by column at first."""
    L, d = run.weight.shape[:2]
    found = {}
    for name in ("weight", *SUMS):
        if getattr(wanted, name):
            like = getattr(run, name)
            found[name] = like.new_empty(like.shape) if like.dim() > 1 else like.new_empty(L, d, dtype=torch.float32)
    return found


def _like(scale: Tensor | float, sums: Tensor) -> Tensor:
    """Sums [L, d] as the gradient of a scale [L] or [L, d]."""
    assert isinstance(scale, Tensor), "a number has no gradient"
    return sums if scale.dim() == 2 else sums.sum(1).to(scale.dtype)


def _descend(
    g: Tensor,
    x: Tensor,
    kept: Tensor,
    run: Run,
    wanted: Wanted,
    tile: StackTile,
    precision: str,
    every: int,
    programs: int,
    sums_weight: bool,
    dtype: torch.dtype,
    sums: dict[str, Tensor],
    recording: Recording | None,
) -> Tensor | None:
    """One launch, and one for what it leaves to be added up: dx in dtype, and `sums` written, [L, d] and [L, d, d]."""
    (M, d), L = x.shape, run.weight.shape[0]
    g, x = rows(g), rows(x)
    programs = min(programs, cdiv(M, tile.BLOCK_M))

    dx = x.new_empty(M, d, dtype=dtype) if wanted.x else None
    multiplies_dz = wanted.weight and not sums_weight
    dz = x.new_empty(L if multiplies_dz else 1, M, d) if multiplies_dz or tile.BLOCK_K > 0 else None
    scratch = x.new_empty(programs, every, tile.BLOCK_M, d) if every > 1 else None
    into = {name: x.new_empty(programs, L, d, dtype=torch.float32) for name in SUMS if name in sums}
    if wanted.weight and sums_weight:
        new = x.new_empty if run.seeds is None else x.new_zeros  # a tile that drops all its rows adds nothing
        into["weight"] = new(programs, L, d, d, dtype=torch.float32)
    parts = None if recording is None else fresh_rows(x, programs, L)

    given = (
        dx, dz, into.get("weight"), into.get("bias"), into.get("branch_scale"), into.get("skip_scale"),
        g, g.stride(0), kept, scratch, x, x.stride(0), *parameters(run),
        parts, None if recording is None else factor(recording.unscale, x),
        M, L, every if every > 1 else L, programs, d,
    )  # fmt: skip
    compiled_for = {
        **options(run), "PRECISION": precision, "NEEDS_Z": run.activation != "none" or wanted.branch_scale,
        "HAS_EVERY_DZ": multiplies_dz, "WIDTH": d,
        "BLOCK_M": tile.BLOCK_M, "BLOCK_D": padded(d), "BLOCK_K": tile.BLOCK_K,
        "num_warps": tile.warps, "num_stages": tile.stages, **ALL_REGISTERS,
    }  # fmt: skip
    launch(_backward_kernel, programs, given, compiled_for)

    if recording is not None:
        known = 0 if wanted.x else 1  # nobody asked for the first layer's
        recording.from_layer(known).note(parts[:, known:])
    if into:
        add_rows(list(into.values()), [sums[name] for name in into])
    if multiplies_dz:
        _write_products_over_rows(dz, x, kept, sums["weight"])
    return dx


def _descend_by_segments(
    g: Tensor,
    x: Tensor,
    kept: Tensor,
    run: Run,
    wanted: Wanted,
    tiles: StackTiles,
    precision: str,
    every: int,
    programs: int,
    sums: dict[str, Tensor],
    recording: Recording | None,
) -> Tensor | None:
    """Launches from one kept h down to the one before it; g passes between them in fp32, as it does within."""
    L = run.weight.shape[0]
    for first in reversed(range(0, L, every)):
        segment = run.layers(first, first + every)
        h = x if first == 0 else kept[first // every - 1]
        inner = x.new_empty(min(every, L - first) - 1, *x.shape)
        if len(inner):
            forward_into(inner[-1], inner, h, segment.layers(0, len(inner)), tiles.forward, precision, 1)
        g = _descend(
            g, h, inner, segment, wanted._replace(x=wanted.x or first > 0),
            tiles.backward, precision, 1, programs, False, torch.float32 if first > 0 else x.dtype,
            {name: t[first : first + every] for name, t in sums.items()},
            None if recording is None else recording.from_layer(first),
        )  # fmt: skip
    return g


def _write_products_over_rows(dz: Tensor, x: Tensor, kept: Tensor, dw: Tensor) -> None:
    """dz_lᵀ h_l [L, d, d], h_0 = x and the others kept: plain products, so the vendor's library does them, in fp32."""
    others = dz[1:].mT
    if dz.dtype == torch.float32:
        torch.mm(dz[0].t(), x, out=dw[0])
        torch.bmm(others, kept, out=dw[1:])
        return
    dw[0] = library_product_over_rows(dz[0], x)
    if dz.is_cuda:
        dw[1:] = torch.bmm(others, kept, out_dtype=torch.float32)
    else:
        dw[1:] = others.float() @ kept.float()
