"""The sum that ends a residual block, and its gradients, each in one pass.

    y = a drop(b) + λ x         b, x, y, g [M, N]: dense memory as a `View` sees it, whatever shape the tensors have
    db = drop(a g)    dx = λ g    da = Σ drop(g b)    dλ = Σ g x
    λ a number;  a a number, or [C] of which row m has that of m % C, or [N];  drop: stochastic depth by `run` rows

Sums leave the backward as partial ones in fp32: of every tile; of da of every row of a tile, or of every column of one,
where a is by row or by column. torch adds them in their order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import SumTile
from ..spec import PER, LayerSpec, Terms, View, WantedTerms
from .launching import cdiv, launch
from .philox import drop_rows
from .tile import load, place, row_tile, scale, store


@triton.jit
def _branch_scale(ptr, value, m, n, in_n, C, PER: tl.constexpr):
    """a, shaped to multiply a tile."""
    if PER == "stretch":
        return tl.load(ptr + m % C).to(tl.float32)[:, None]
    elif PER == "column":
        return tl.load(ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    else:
        return scale(ptr, value)


@triton.jit(do_not_specialize=["M", "a", "lam", "C", "run", "seed", "threshold", "keep_scale"])
def _forward_kernel(
    y_ptr, b_ptr, x_ptr, a_ptr, a, lam_ptr, lam, M, N, C, run, seed, threshold, keep_scale,
    PER: tl.constexpr, DROPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # place: this program owns rows m, columns n
    m, n, in_m, in_n = place(M, N, 0, BLOCK_M, BLOCK_N)

    y = _branch_scale(a_ptr, a, m, n, in_n, C, PER) * load(b_ptr, N, m, n, in_m, in_n)
    if DROPS:
        y = drop_rows(y, m // run, seed, threshold, keep_scale)
    y += scale(lam_ptr, lam) * load(x_ptr, N, m, n, in_m, in_n)
    store(y_ptr, N, m, n, in_m, in_n, y)


def forward(terms: Terms, spec: LayerSpec, view: View, y: Tensor, tile: SumTile) -> None:
    """Writes y, which lies in memory as branch and x do."""
    b, x, a, lam, seed = terms
    (M, N), programs = _cut(view, tile)
    a = None if a is None else a.contiguous()
    given = (y, b, x, a, spec.branch_scale, lam, spec.skip_scale, *_numbers(view, spec, seed, M, N))
    launch(_forward_kernel, programs, given, _options(view, spec, tile))


@triton.jit(do_not_specialize=["M", "a", "lam", "C", "run", "seed", "threshold", "keep_scale"])
def _backward_kernel(
    db_ptr, dx_ptr, da_ptr, dlam_ptr, g_ptr, b_ptr, x_ptr, a_ptr, a, lam_ptr, lam,
    M, N, C, run, seed, threshold, keep_scale,
    PER: tl.constexpr, DROPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # place: this program owns rows m, columns n
    m, n, in_m, in_n = place(M, N, 0, BLOCK_M, BLOCK_N)
    g = load(g_ptr, N, m, n, in_m, in_n)

    # skip: its gradient and the sum that belongs to it
    if dx_ptr is not None:
        store(dx_ptr, N, m, n, in_m, in_n, scale(lam_ptr, lam) * g)
    if dlam_ptr is not None:
        tl.store(dlam_ptr + tl.program_id(0), tl.sum(g * load(x_ptr, N, m, n, in_m, in_n)))

    # branch: likewise
    if db_ptr is not None:
        db = _branch_scale(a_ptr, a, m, n, in_n, C, PER) * g
        if DROPS:
            db = drop_rows(db, m // run, seed, threshold, keep_scale)
        store(db_ptr, N, m, n, in_m, in_n, db)
    if da_ptr is not None:
        da = g * load(b_ptr, N, m, n, in_m, in_n)
        if DROPS:
            da = drop_rows(da, m // run, seed, threshold, keep_scale)
        if PER == "stretch":
            tiles = tl.cdiv(N, BLOCK_N)
            tl.store(da_ptr + m * tiles + tl.program_id(0) % tiles, tl.sum(da, axis=1), mask=in_m)
        elif PER == "column":
            tl.store(da_ptr + row_tile(N, 0, BLOCK_N) * N + n, tl.sum(da, axis=0), mask=in_n)
        else:
            tl.store(da_ptr + tl.program_id(0), tl.sum(da))


def backward(
    g: Tensor,
    terms: tuple,
    spec: LayerSpec,
    view: View,
    db: Tensor | None,
    dx: Tensor | None,
    wanted: WantedTerms,
    tile: SumTile,
) -> tuple[Tensor | None, Tensor | None]:
    """Writes db and dx where given, which lie as g does; da, shaped and typed as a is, and dλ, where wanted.

    terms are `Terms`, without those that backward does not read.
    """
    b, x, a, lam, seed = terms
    (M, N), programs = _cut(view, tile)
    rows, columns = cdiv(M, tile.BLOCK_M), cdiv(N, tile.BLOCK_N)
    parts = {"all": (programs,), "stretch": (M, columns), "column": (rows, N)}[PER[view.per]]
    da = g.new_empty(parts, dtype=torch.float32) if wanted.branch_scale else None
    dlam = g.new_empty(programs, dtype=torch.float32) if wanted.skip_scale else None
    scales = (None if a is None else a.contiguous(), spec.branch_scale, lam, spec.skip_scale)
    given = (db, dx, da, dlam, g, b, x, *scales, *_numbers(view, spec, seed, M, N))
    launch(_backward_kernel, programs, given, _options(view, spec, tile))
    if da is not None:
        total = da.view(-1, view.channels, columns).sum((0, 2)) if PER[view.per] == "stretch" else da.sum(0)
        da = total.reshape(a.shape).to(a.dtype)
    return da, None if dlam is None else dlam.sum().to(lam.dtype)


def _cut(view: View, tile: SumTile) -> tuple[tuple[int, int], int]:
    """The memory as M rows of N columns, and how many programs share it."""
    size = view.stretches * view.length
    N = view.channels if PER[view.per] == "column" else view.length
    return (size // N, N), cdiv(size // N, tile.BLOCK_M) * cdiv(N, tile.BLOCK_N)


def _options(view: View, spec: LayerSpec, tile: SumTile) -> dict[str, Any]:
    return {
        "PER": PER[view.per],
        "DROPS": spec.drop_path > 0,
        "BLOCK_M": tile.BLOCK_M,
        "BLOCK_N": tile.BLOCK_N,
        "num_warps": tile.warps,
    }


def _numbers(view: View, spec: LayerSpec, seed: Tensor | None, M: int, N: int) -> tuple:
    """M, N, C, rows to a sample, and what drops samples."""
    run = M // view.samples
    return M, N, view.channels, run, 0 if seed is None else int(seed), spec.drop_threshold, spec.keep_scale
