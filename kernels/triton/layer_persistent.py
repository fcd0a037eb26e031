"""The residual layer, forward, on chips that copy tiles by descriptors (TMA): programs stay and go from tile to tile.

    z = x wᵀ + b                    y = λ s + a drop(φ(z))          IS_POST: y = φ(λ s + a drop(z))
    x [M, K]   w [N, K]   b [N]     s [M, N]: a residual r, or x itself          the rest as in layer.py

x, w, r, y and kept are descriptors: of matrices whose rows are multiples of 16 bytes, with unit inner stride.
A tile is finished in PARTS of its columns, so that activation and skip have registers beside the product's.

Where one tile is as wide and as deep as the layer, w stays with the program, each tile of rows is read once, ahead of
its turn, and the skip of an identity is that same tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..config import PersistentTile
from ..spec import LayerSpec, Operands
from .launching import cdiv, launch
from .layer import finish, options, rows, skip_tensor, vector
from .tile import add_bias, branch_scale, scale


@triton.jit(do_not_specialize=["M", "programs", "lam", "a", "seed", "threshold", "keep_scale"])
def _tiled_kernel(
    y, kept, x, w, r, b_ptr, lam_ptr, lam, a_ptr, a, seed, threshold, keep_scale,
    M, N, K, programs,
    ACTIVATION: tl.constexpr, IS_POST: tl.constexpr, IS_PER_CHANNEL: tl.constexpr, DROPS: tl.constexpr,
    KEEPS_SLOPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    lam = scale(lam_ptr, lam)
    for tile in range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N), programs):
        m0, n0 = grouped(tile, M, N, BLOCK_M, BLOCK_N, GROUP)

        # accumulate: z
        z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            z = tl.dot(x.load([m0, k0]), tl.trans(w.load([n0, k0])), z, input_precision=PRECISION)

        # finish: one part after another
        for part in tl.static_range(PARTS):
            at = n0 + part * (BLOCK_N // PARTS)
            n = at + tl.arange(0, BLOCK_N // PARTS)
            write(
                add_bias(columns(z, part, PARTS), b_ptr, n, n < N), None if r is None else r.load([m0, at]),
                y, kept, lam, branch_scale(a_ptr, a, n, n < N, IS_PER_CHANNEL), seed, threshold, keep_scale, m0, at,
                ACTIVATION, IS_POST, DROPS, KEEPS_SLOPE,
            )  # fmt: skip


@triton.jit(do_not_specialize=["M", "programs", "lam", "a", "seed", "threshold", "keep_scale"])
def _whole_kernel(
    y, kept, x, w, r, b_ptr, lam_ptr, lam, a_ptr, a, seed, threshold, keep_scale,
    M, N, programs,
    ACTIVATION: tl.constexpr, IS_POST: tl.constexpr, IS_PER_CHANNEL: tl.constexpr, DROPS: tl.constexpr,
    KEEPS_SLOPE: tl.constexpr, PRECISION: tl.constexpr, IS_IDENTITY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # once: what all rows meet
    lam = scale(lam_ptr, lam)
    n = tl.arange(0, BLOCK_N)
    weight = w.load([0, 0])
    bias = add_bias(tl.zeros((1, BLOCK_N), tl.float32), b_ptr, n, n < N)
    a = branch_scale(a_ptr, a, n, n < N, IS_PER_CHANNEL)

    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), programs, num_stages=STAGES):
        m0 = tile * BLOCK_M
        rows = x.load([m0, 0])
        z = tl.dot(rows, tl.trans(weight), input_precision=PRECISION) + bias
        for part in tl.static_range(PARTS):
            at = part * (BLOCK_N // PARTS)
            if IS_IDENTITY:
                s = columns(rows, part, PARTS)
            else:
                s = None if r is None else r.load([m0, at])
            write(
                columns(z, part, PARTS), s, y, kept, lam, columns(a, part, PARTS) if IS_PER_CHANNEL else a,
                seed, threshold, keep_scale, m0, at, ACTIVATION, IS_POST, DROPS, KEEPS_SLOPE,
            )  # fmt: skip


@triton.jit
def grouped(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of a tile. GROUP tiles of rows go through all columns: a cache holds what they share."""
    down, across = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = tile // (GROUP * across) * GROUP
    high = tl.minimum(down - first, GROUP)
    within = tile % (GROUP * across)
    return (first + within % high) * BLOCK_M, within // high * BLOCK_N


@triton.jit
def columns(tile, part: tl.constexpr, PARTS: tl.constexpr):
    """The part-th of PARTS equal parts of a tile's columns; in registers, where nothing moves."""
    if PARTS == 1:
        return tile
    elif PARTS == 2:
        left, right = halves(tile)
        return left if part == 0 else right
    else:
        tl.static_assert(PARTS == 4)
        left, right = halves(tile)
        first, second = halves(left if part < 2 else right)
        return first if part % 2 == 0 else second


@triton.jit
def halves(tile):
    height: tl.constexpr = tile.shape[0]
    half: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, (height, 2, half)), (0, 2, 1)))


@triton.jit
def write(
    z, s, y, kept, lam, a, seed, threshold, keep_scale, m0, n0,
    ACTIVATION: tl.constexpr, IS_POST: tl.constexpr, DROPS: tl.constexpr, KEEPS_SLOPE: tl.constexpr,
):  # fmt: skip
    """Finish the tile of z at row m0, column n0, and hand it to the copy engine."""
    m = tl.cast(m0, tl.int64) + tl.arange(0, z.shape[0])
    if s is not None:
        s = s.to(tl.float32)
    out, keep = finish(z, s, m, lam, a, seed, threshold, keep_scale, ACTIVATION, IS_POST, DROPS, KEEPS_SLOPE)
    if kept is not None:
        kept.store([m0, n0], keep.to(kept.dtype))
    y.store([m0, n0], out.to(y.dtype))


def forward(
    operands: Operands,
    spec: LayerSpec,
    dtype: torch.dtype,
    tile: PersistentTile,
    precision: str,
    keep: bool,
    multiprocessors: int,
) -> tuple[Tensor, Tensor | None]:
    """y [M, N] of type dtype, and kept [M, N] where asked for; operands are matrices that `is_described` admits."""
    x, w, b, _, _, _, lam, a, seed = operands
    (M, K), N = x.shape, w.shape[0]
    x, r = rows(x), skip_tensor(operands, spec)
    b, a = vector(b), vector(a)
    y = x.new_empty(M, N, dtype=dtype)
    kept = x.new_empty(M, N, dtype=operands.kept_dtype) if keep else None

    is_whole = tile.BLOCK_N >= N and tile.BLOCK_K >= K
    part = [tile.BLOCK_M, tile.BLOCK_N // tile.parts]
    is_at_hand = is_whole and spec.skip == "identity" and tile.BLOCK_N == tile.BLOCK_K
    tiles = cdiv(M, tile.BLOCK_M) * cdiv(N, tile.BLOCK_N)
    programs = min(tiles, tile.residents * multiprocessors)
    given = (
        described(y, part), described(kept, part),
        described(x, [tile.BLOCK_M, tile.BLOCK_K]), described(w, [tile.BLOCK_N, tile.BLOCK_K]),
        None if is_at_hand else described(r, part), b, lam, spec.skip_scale, a, spec.branch_scale,
        0 if seed is None else int(seed), spec.drop_threshold, spec.keep_scale,
    )  # fmt: skip
    compiled_for = {
        **options(spec, a, x.dtype), "KEEPS_SLOPE": keep and operands.keeps_slope, "PRECISION": precision,
        "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N, "PARTS": tile.parts,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    if is_whole:
        compiled_for |= {"IS_IDENTITY": is_at_hand, "STAGES": tile.stages}
        launch(_whole_kernel, programs, (*given, M, N, programs), compiled_for)
    else:
        compiled_for |= {"BLOCK_K": tile.BLOCK_K, "GROUP": tile.group}
        launch(_tiled_kernel, programs, (*given, M, N, K, programs), compiled_for)
    return y, kept


def described(matrix: Tensor | None, block: list[int]) -> TensorDescriptor | None:
    return None if matrix is None else TensorDescriptor.from_tensor(matrix, block)


def is_described(matrix: Tensor) -> bool:
    """Whether the copy engine takes a matrix: unit inner stride, rows and first byte at multiples of 16 bytes."""
    row = matrix.stride(0) * matrix.itemsize
    return matrix.stride(1) == 1 and row > 0 and row % 16 == 0 and matrix.data_ptr() % 16 == 0
