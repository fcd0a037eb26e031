"""The product over rows of a linear layer's backward, with its rows dealt out in shares.

    dw = dzᵀ x        dz [M, N]   x [M, K]   dw [N, K]

M is large, and dw has too few tiles to fill a GPU. So the rows, in steps of BLOCK_M, go in `splits` shares to programs
of their own: each leaves a tile of parts [splits, N, K] in fp32, and sums.py adds these, in one order, and rounds
once. A single share is rounded to dw at once.

An item of work is a tile and a share. Items of a share are neighbours, so that its rows come from memory once, and from
a cache for all but the first tile that reads them. By pointers a program has one item; by descriptors, whose rows begin
at multiples of 16 bytes, a program on every multiprocessor goes through items, and what is outside a matrix reads as 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..config import SplitTile
from .launching import cdiv, launch
from .sums import add_rows
from .tile import store

GROUP = tl.constexpr(16)  # tiles in a column of a wave of programs: 16 x 128 columns of dz meet as many of x


@triton.jit(do_not_specialize=["M", "splits"])
def _pointer_kernel(
    dw_ptr, dz_ptr, stride_dzm, x_ptr, stride_xm, M, N, K, splits,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    # place: this program owns rows n, columns k of dw, and the rows of x and dz from step `first` on
    split, n0, k0 = _place(tl.program_id(0), N, K, BLOCK_N, BLOCK_K)
    first, last = _share(split, splits, M, BLOCK_M)
    n = n0.to(tl.int64) + tl.arange(0, BLOCK_N)
    k = k0.to(tl.int64) + tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_M)
    m = first.to(tl.int64) * BLOCK_M + r
    in_n, in_k = n < N, k < K

    # accumulate: both operands as they lie, rows first
    dz_tile = dz_ptr + m[:, None] * stride_dzm + n[None, :]
    x_tile = x_ptr + m[:, None] * stride_xm + k[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for step in range(first, last):
        in_m = r < M - step * BLOCK_M
        dz = tl.load(dz_tile, mask=in_m[:, None] & in_n[None, :], other=0.0)
        x = tl.load(x_tile, mask=in_m[:, None] & in_k[None, :], other=0.0)
        total = tl.dot(tl.trans(dz), x, total, input_precision=PRECISION)
        dz_tile += tl.cast(BLOCK_M, tl.int64) * stride_dzm
        x_tile += tl.cast(BLOCK_M, tl.int64) * stride_xm

    store(_part(dw_ptr, split, N, K), K, n, k, in_n, in_k, total)


@triton.jit(do_not_specialize=["M", "splits"])
def _descriptor_kernel(
    dw_ptr, dz_rows, x_rows, M, N, K, splits,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    items = splits * tl.cdiv(N, BLOCK_N) * tl.cdiv(K, BLOCK_K)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        # place: rows and columns of dw, and the share of rows of x and dz
        split, n0, k0 = _place(item, N, K, BLOCK_N, BLOCK_K)
        first, last = _share(split, splits, M, BLOCK_M)

        # accumulate: both operands as they lie, rows first
        total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for step in range(first, last):
            dz = dz_rows.load([step * BLOCK_M, n0])
            x = x_rows.load([step * BLOCK_M, k0])
            total = tl.dot(tl.trans(dz), x, total, input_precision=PRECISION)

        n = n0.to(tl.int64) + tl.arange(0, BLOCK_N)
        k = k0.to(tl.int64) + tl.arange(0, BLOCK_K)
        store(_part(dw_ptr, split, N, K), K, n, k, n < N, k < K, total)


@triton.jit
def _place(item, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """An item's share, and the first row and column of its tile: down columns of GROUP tiles, then down the next."""
    row_tiles, column_tiles = tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    split, tile = item // (row_tiles * column_tiles), item % (row_tiles * column_tiles)
    above = tile // (GROUP * column_tiles) * GROUP
    height = min(GROUP, row_tiles - above)
    tile -= above * column_tiles
    return split, (above + tile % height) * BLOCK_N, tile // height * BLOCK_K


@triton.jit
def _share(split, splits, M, BLOCK_M: tl.constexpr):
    """The first step of a share of the rows, and the one after its last; shares differ by a step at most."""
    steps = tl.cdiv(M, BLOCK_M)
    least, more = steps // splits, steps % splits
    first = split * least + min(split, more)
    return first, first + least + (split < more).to(tl.int32)


@triton.jit
def _part(ptr, split, N, K):
    """Where a share's sums begin."""
    return ptr + split.to(tl.int64) * N * K


def weight_gradient(
    dz: Tensor,
    x: Tensor,
    dtype: torch.dtype,
    tile: SplitTile,
    precision: str,
    multiprocessors: int,
) -> Tensor:
    """dw [N, K] of this dtype, dz and x with unit inner stride; descriptors want rows at multiples of 16 bytes."""
    (M, N), K = dz.shape, x.shape[1]
    splits = tile.splits
    dw = x.new_empty(N, K, dtype=dtype)
    into = dw if splits == 1 else x.new_empty(splits, N, K, dtype=torch.float32)
    blocks = {"BLOCK_N": tile.BLOCK_N, "BLOCK_K": tile.BLOCK_K, "BLOCK_M": tile.BLOCK_M}
    compiled = {"PRECISION": precision, **blocks, "num_warps": tile.warps, "num_stages": tile.stages}

    items = splits * cdiv(N, tile.BLOCK_N) * cdiv(K, tile.BLOCK_K)
    if tile.by_descriptors:
        dz_rows = TensorDescriptor.from_tensor(dz, [tile.BLOCK_M, tile.BLOCK_N])
        x_rows = TensorDescriptor.from_tensor(x, [tile.BLOCK_M, tile.BLOCK_K])
        launch(_descriptor_kernel, min(items, multiprocessors), (into, dz_rows, x_rows, M, N, K, splits), compiled)
    else:
        launch(_pointer_kernel, items, (into, dz, dz.stride(0), x, x.stride(0), M, N, K, splits), compiled)

    if splits > 1:
        add_rows([into], [dw])
    return dw
